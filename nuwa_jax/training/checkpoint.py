"""Checkpoints of training runs: what is stored, where, and what may be resumed with what.

    workdir/stages/<NN_name>/<step>/   one directory per checkpoint, committed as a whole:
      model/      all parameters, those in training as their running average: what is sampled from
      training/   the parameters in training themselves, the optimizer, counters
      meta/       JSON: `Meta`
      manifest.json   sizes and digests of all files (nuwa_jax/training/manifest.py)

Frozen parameters are in `model` alone. They are written in the background, and are there for
certain once that is reported. This is the only module that knows Orbax.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nuwa_jax import __version__
from nuwa_jax.errors import UserError
from nuwa_jax.training.commit import source_commit
from nuwa_jax.training.curriculum import Params, Stage, partition_for
from nuwa_jax.training.manifest import committed_steps, find_damage, write_manifest
from nuwa_jax.training.state import TrainState
from nuwa_jax.training.workdir import checkpoint_root

# Changing these changes when things are shown, stored or how fast they come, not what is learnt.
# Prepared clips are known by their contents (`Meta.clips`) and not by where they lie.
FREE_KEYS = (
    "sampling",
    "mesh",
    "model.attention",
    "model.unet.remat",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "data.prefetch_to_device",
    "data.clips",
    "data.sources[].path",
    "data.max_replaced_share",
    "data.allow_changed_clips",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_every",
    "train.sample_every",
    "train.allow_changed_batch_size",
    "train.compile_cache",
    "train.non_finite",
    "train.peak_flops",
    "train.profile_steps",
    "train.slow_host_ratio",
    "train.slow_hosts_every",
    "train.use_previous_checkpoint",
    "train.watchdog_abort",
    "train.watchdog_seconds",
)
# What `train.allow_changed_batch_size` lets a run change on its way.
_BATCH_KEYS = re.compile(r"stages\.[^.]+\.batch_size|train\.accumulate")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
      config: the run's whole config as plain JSON values.
      stage, index: the stage and its place in the curriculum.
      step: steps of the stage that are done.
      position: index of the next data element; it runs on from stage to stage.
      elapsed: seconds of this stage after compiling, over all restarts.
      done: the stage has ended; for an autoencoder's, the latents are calibrated.
      window: finite losses since the last logged line, so that the next one is what it would be.
      clips: fingerprint of the prepared clips that `position` counts in, "" without any.
      mesh: sizes of the axes that it was computed on.
      processes: hosts that computed it.
      commit: of the package's source, its version where that is not in a Git repository.
      versions: of this package and of what computed it.
    """

    config: dict[str, Any]
    stage: str
    index: int
    step: int
    position: int
    elapsed: float
    done: bool
    window: list[float]
    clips: str = ""
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    processes: int = 1
    commit: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model: `params` are the running averages where there are any."""

    params: Params
    config: ml_collections.ConfigDict
    stage: str
    step: int
    done: bool


class DamagedCheckpoint(UserError):
    """A checkpoint that was reported as saved is not what was written."""


class StageCheckpoints:
    """The checkpoints of one stage of a run."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        label: str,
        keep: int = 0,
        keep_every: int = 0,
        *,
        before_commit: Callable[[], None] | None = None,
        saved: Callable[[int], None] | None = None,
    ) -> None:
        """Opens `workdir/stages/<label>`.

        Args:
          workdir: of the run, a folder or a bucket.
          label: of the stage.
          keep: how many of the newest are kept; 0 opens them for reading alone.
          keep_every: those of steps that are multiples of it are kept, too; 0: none.
          before_commit: called on the first host when a checkpoint is about to be committed.
          saved: called with its step, on every host, when a checkpoint is there for certain. Like
            `before_commit` in another thread.
        """
        self._folder = checkpoint_root(workdir) / "stages" / label
        self._writing = keep > 0
        self._before_commit, self._saved = before_commit, saved
        self._reporter = ThreadPoolExecutor(1, "report_saved")
        self._save: Future[None] | None = None
        self._saving = 0  # step of the checkpoint that is being written
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep or None,
                keep_period=keep_every or None,
                create=self._writing,
                # What was being written when a run was killed.
                cleanup_tmp_directories=self._writing,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._describe),
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def last(self, use_previous: bool = False) -> Meta | None:
        """What the newest checkpoint says of itself; None if there is none.

        Where the stage goes on from it, all of it is compared with its manifest; where the stage
        has ended, only what is read here.

        Args:
          use_previous: delete newest checkpoints until one is whole.

        Raises:
          DamagedCheckpoint: it is damaged or half-written.
        """
        for step in committed_steps(str(self._folder)):
            try:
                meta = self.meta(step)
                if not meta.done:
                    self.verify(step)
                return meta
            except DamagedCheckpoint:
                if not use_previous:
                    raise
                self.discard(step)
        return None

    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return next(iter(committed_steps(str(self._folder))), None)

    def meta(self, step: int) -> Meta:
        """What the checkpoint of `step` says of itself.

        Raises:
          DamagedCheckpoint: that is not what was written.
        """
        self.verify(step, ("meta",))
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return Meta(**found["meta"])

    def verify(self, step: int, items: Sequence[str] = ()) -> None:
        """Compares a checkpoint, or items of it, with what was written.

        With several hosts, each reads a part, and all learn of what any has found.

        Raises:
          DamagedCheckpoint: names what is damaged, and says what to do.
          OSError: a host cannot read it.
        """
        folder = self._folder / str(step)
        fault, unreadable = None, None
        try:
            fault = find_damage(str(folder), items, jax.process_index(), jax.process_count())
        except OSError as error:  # of the disk or the network, which may be gone the next time
            unreadable = error
        if jax.process_count() > 1:
            own = np.array([fault is not None, unreadable is not None])
            faults, failures = np.asarray(multihost_utils.process_allgather(own)).T
            if unreadable is None and failures.any():
                unreadable = OSError(f"host {int(np.argmax(failures))} cannot read {folder}")
            if fault is None and faults.any():
                fault = f"host {int(np.argmax(faults))} found damage in it"
        if unreadable is not None:
            raise unreadable
        if fault is None:
            return
        before = [found for found in committed_steps(str(self._folder)) if found < step]
        previous = f"that of step {before[0]}" if before else "the start of the stage"
        raise DamagedCheckpoint(
            f"checkpoint {folder} is damaged: {fault}. Put it back from a copy, or let train.py "
            f"delete it and go on from {previous} with "
            "--config.train.use_previous_checkpoint=true"
        )

    def discard(self, step: int) -> None:
        """Deletes a damaged checkpoint."""
        if jax.process_index() == 0:
            (self._folder / str(step)).rmtree(missing_ok=True)
            print(f"deleted the damaged checkpoint {self._folder / str(step)}", flush=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"discard {self._folder} {step}")
        self._manager.reload()

    def save(self, state: TrainState, meta: Meta) -> None:
        """Starts to write a checkpoint of `meta.step`, having waited for the one before.

        When this returns, the state's buffers may be given away.
        """
        self._finish()
        self._saving = meta.step
        model, training = _to_be_written((state.all_ema(), _training_part(state)))
        self._manager.save(
            meta.step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                meta=ocp.args.JsonSave(dataclasses.asdict(meta)),
            ),
            force=True,
        )
        self._save = self._reporter.submit(self._report, meta.step)

    def check(self) -> None:
        """Raises what has gone wrong in the background."""
        if self._save is not None and self._save.done():
            self._finish()

    def restore(self, step: int, like: TrainState, stage: Stage) -> TrainState:
        """The state as it was saved, not compared with the manifest (see `last`).

        `like` gives its structure, shapes and shardings, which need not be those it was saved with.
        """
        args = ocp.args.Composite(
            model=ocp.args.StandardRestore(_abstract(like.all_ema())),
            training=ocp.args.StandardRestore(_abstract(_training_part(like))),
        )
        found = self._manager.restore(step, args=args)
        ema, frozen = partition_for(stage, found["model"])
        return TrainState(ema=ema, frozen=frozen, **found["training"])

    def restore_params(self, step: int) -> Params:
        """All parameters, averaged where they were trained, on the first local device.

        Raises:
          DamagedCheckpoint: they are not what was written.
        """
        self.verify(step, ("model",))
        metadata = self._manager.item_metadata(step)["model"].tree
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata
        )
        args = ocp.args.Composite(model=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["model"]

    def close(self) -> None:
        """Waits for what is being written and ends Orbax's threads."""
        try:
            self._finish()
        finally:
            self._reporter.shutdown()
            self._manager.close()

    def __enter__(self) -> StageCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe(self) -> None:
        """On the first host, between a checkpoint's last file and its commit."""
        folder = self._folder / str(self._saving)
        if not folder.exists():  # as on disks, where it gets its name by the commit
            (folder,) = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        write_manifest(str(folder))
        if self._before_commit is not None:
            self._before_commit()

    def _report(self, step: int) -> None:
        self._manager.wait_until_finished()
        if self._saved is not None:
            self._saved(step)

    def _finish(self) -> None:
        save, self._save = self._save, None
        if save is not None:
            save.result()


def load_final(workdir: str | os.PathLike[str], stage: str | None = None) -> Loaded:
    """The newest model of a run: the last checkpoint of its last stage, or of `stage`.

    Raises:
      UserError: there is no checkpoint in `workdir`, or none of that stage.
      DamagedCheckpoint: the newest one is damaged.
    """
    root = checkpoint_root(workdir) / "stages"
    labels = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    wanted = [label for label in labels if stage is None or label.partition("_")[2] == stage]
    for label in reversed(wanted):
        with StageCheckpoints(workdir, label) as checkpoints:
            step = checkpoints.latest()
            if step is None:
                continue
            meta = checkpoints.meta(step)
            return Loaded(
                params=checkpoints.restore_params(step),
                config=ml_collections.ConfigDict(meta.config, convert_dict=True),
                stage=meta.stage,
                step=meta.step,
                done=meta.done,
            )
    what = f"of stage {stage!r} (there are: {labels})" if stage else "(stages/<stage>/<step>)"
    raise UserError(
        f"{workdir} holds no complete checkpoint {what}: give the --workdir of a train.py run that "
        "has saved one"
    )


def plain_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as it comes back from JSON: tuples are lists, references are values."""
    return json.loads(json.dumps(config.to_dict()))


def origin(mesh: dict[str, int]) -> dict[str, Any]:
    """The entries of `Meta` that say what computed it, of this process on a mesh of such sizes."""
    return {
        "mesh": dict(mesh),
        "processes": jax.process_count(),
        "commit": source_commit(),
        "versions": {
            "nuwa_jax": __version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        },
    }


def check_same_run(config: ml_collections.ConfigDict, meta: Meta, workdir: object) -> None:
    """Refuses to go on with a checkpoint under a config that would have made another one.

    Stages after the checkpoint's may still be changed, and so may `FREE_KEYS`; with
    `train.allow_changed_batch_size` also how many clips a step takes, and in how many parts.

    Raises:
      UserError: names the keys that differ, preset first, and says what to do.
    """
    now, then = (_relevant(c, meta.index) for c in (plain_config(config), meta.config))
    differing = [key for key in now | then if now.get(key, _ABSENT) != then.get(key, _ABSENT)]
    of_batches = all(_BATCH_KEYS.fullmatch(key) for key in differing)
    if not differing or (of_batches and config.train.allow_changed_batch_size):
        return
    order = ("preset", "seed", "model.", "data.", "curriculum", "stages.")
    rank = lambda key: next((i for i, p in enumerate(order) if key.startswith(p)), len(order))  # noqa: E731
    differing.sort(key=lambda key: (rank(key), key))
    shown = [
        f"{key}: checkpoint {then.get(key, _ABSENT)}, config {now.get(key, _ABSENT)}"
        for key in differing[:4]
    ]
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise UserError(
        f"{workdir} was trained with another config ({'; '.join(shown)}{more}): use the config it "
        "was started with (its config.json) to go on, or another --workdir to start anew"
        + (
            "; or go on at the same data position with other batches, by "
            "--config.train.allow_changed_batch_size=true"
        )
        * of_batches
    )


def _training_part(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "skipped": state.skipped,
        "params": state.params,
        "opt_state": state.opt_state,
    }


def _to_be_written(tree: Any) -> Any:
    """The same arrays, safe from what becomes of their buffers while they are written.

    Orbax copies from accelerators before its save returns. On CPU it reads the arrays' own memory,
    which the next step is given to overwrite; that jaxlib leaves memory alone at which NumPy is
    looking, as it does now, is promised nowhere. It would take other memory instead: a copy, too.
    """
    device = next(iter(jax.tree.leaves(tree)[0].sharding.device_set))
    return _copy(tree) if device.platform == "cpu" else tree


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _relevant(config: dict[str, Any], index: int) -> dict[str, Any]:
    """Dotted keys and values that shaped a checkpoint of the curriculum's stage `index`."""
    reached = list(config["curriculum"])[: index + 1]
    config = {
        **config,
        "curriculum": reached,
        "stages": {name: config["stages"].get(name, {}) for name in reached},
    }
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        name = re.sub(r"\[\d+\]", "[]", path)
        if any(name == free or name.startswith(f"{free}.") for free in FREE_KEYS):
            return
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else key)
        elif isinstance(node, list) and any(isinstance(each, dict) for each in node):
            for number, each in enumerate(node):
                walk(each, f"{path}[{number}]")
        else:
            flat[path] = node

    walk(config, "")
    return flat
