"""Checkpoints of training runs: what is stored, and where.

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
import os
import platform
import sys
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
from nuwa_jax.training.manifest import committed_steps, find_damage, later_folders, write_manifest
from nuwa_jax.training.state import TrainState
from nuwa_jax.training.workdir import checkpoint_root

# Of a whole save, in which process 0 also reads all of it again for the manifest, while the others
# wait: Orbax's 20 minutes are too few for a large model in a bucket. In seconds.
_SAVE_TIMEOUT = 4 * 3600


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
        # Step of the checkpoint that is being written, and what becomes of it.
        self._saving, self._outcome = 0, Future[None]()
        self._broken = False  # `_describe` has failed
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep or None,
                keep_period=keep_every or None,
                create=self._writing,
                # What was being written when a run was killed.
                cleanup_tmp_directories=self._writing,
                async_options=ocp.AsyncOptions(
                    timeout_secs=_SAVE_TIMEOUT, post_finalization_callback=self._describe
                ),
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
          use_previous: delete newest checkpoints until one is whole; not where a later stage has
            gone on from them.

        Raises:
          DamagedCheckpoint: it is damaged or half-written.
        """
        for step in self.steps():
            try:
                meta = self.meta(step)
                if not meta.done:
                    self.verify(step)
                return meta
            except DamagedCheckpoint:
                if not use_previous or self.later():
                    raise
                self.discard(step)
        return None

    def steps(self) -> list[int]:
        """Steps of all checkpoints, newest first."""
        return committed_steps(str(self._folder))

    def later(self) -> list[str]:
        """Labels of the later stages that have checkpoints."""
        return later_folders(str(self._folder))

    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return next(iter(self.steps()), None)

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
        before = [found for found in self.steps() if found < step]
        previous = f"that of step {before[0]}" if before else "the start of the stage"
        if later := self.later():
            raise DamagedCheckpoint(
                f"checkpoint {folder} is damaged: {fault}. Put it back from a copy; it is not "
                f"deleted, whatever train.use_previous_checkpoint says, because {', '.join(later)} "
                "went on from it: to train from before it, move those folders away first"
            )
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
        self._saving, self._outcome = meta.step, Future()
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
        self._save = self._outcome
        self._reporter.submit(self._report, meta.step, self._save)

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
            # Or it would wait for the other hosts, which wait for the commit that has failed here.
            if not (self._broken and jax.process_count() > 1):
                self._reporter.shutdown()
                self._manager.close()

    def __enter__(self) -> StageCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe(self) -> None:
        """On the first host, between a checkpoint's last file and its commit.

        Orbax would tell of a failure here only when all hosts have come, who wait for this one.
        """
        folder = self._folder / str(self._saving)
        try:
            if not folder.exists():  # as on disks, where it gets its name by the commit
                (folder,) = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_manifest(str(folder))
            if self._before_commit is not None:
                self._before_commit()
        except BaseException as error:
            print(f"error: {folder} was not saved: {error!r}", file=sys.stderr, flush=True)
            self._broken = True
            self._outcome.set_exception(error)
            raise

    def _report(self, step: int, outcome: Future[None]) -> None:
        try:
            self._manager.wait_until_finished()
            if self._saved is not None:
                self._saved(step)
        except BaseException as error:  # raised again by `check` and `close`
            if not outcome.done():
                outcome.set_exception(error)
        else:
            outcome.set_result(None)

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
