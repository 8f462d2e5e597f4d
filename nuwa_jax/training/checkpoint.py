"""Checkpoints of training runs: what is stored, where, and what may be resumed with what.

    workdir/stages/<NN_name>/<step>/   one directory per checkpoint, committed as a whole:
      model/      all parameters, those in training as their running average: what is sampled from
      training/   the parameters in training themselves, the optimizer, counters
      meta/       JSON: `Meta`

Frozen parameters are in `model` alone. This is the only module that knows Orbax.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from pathlib import Path
from typing import Any

import jax
import jaxlib
import ml_collections
import orbax.checkpoint as ocp

from nuwa_jax import __version__
from nuwa_jax.errors import UserError
from nuwa_jax.training.curriculum import Params, Stage, partition_for
from nuwa_jax.training.state import TrainState

# Changing these changes when things are shown, stored or how fast they come, not what is learnt.
# Prepared clips are known by their contents (`Meta.clips`) and not by where they lie.
FREE_KEYS = (
    "sampling",
    "mesh",
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
    "train.sample_every",
    "train.compile_cache",
    "train.non_finite",
    "train.peak_flops",
    "train.profile_steps",
    "train.slow_host_ratio",
    "train.slow_hosts_every",
    "train.watchdog_abort",
    "train.watchdog_seconds",
)


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
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: _versions())


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model: `params` are the running averages where there are any."""

    params: Params
    config: ml_collections.ConfigDict
    stage: str
    step: int
    done: bool


class StageCheckpoints:
    """The checkpoints of one stage of a run."""

    def __init__(self, workdir: str | Path, label: str, keep: int = 1) -> None:
        """Opens `workdir/stages/<label>`, creating it, and keeps the `keep` newest there."""
        if keep < 1:
            raise UserError(f"train.keep must be at least 1, got {keep}")
        # Saved before it returns: on CPU a save in the background would read buffers that the next
        # step has been given to overwrite.
        self._manager = ocp.CheckpointManager(
            (Path(workdir) / "stages" / label).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def meta(self, step: int) -> Meta:
        """What the checkpoint of `step` says of itself."""
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return Meta(**found["meta"])

    def save(self, state: TrainState, meta: Meta) -> None:
        """Writes a checkpoint of `meta.step`; returns when it is complete on disk."""
        self._manager.save(
            meta.step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(state.all_ema()),
                training=ocp.args.StandardSave(_training_part(state)),
                meta=ocp.args.JsonSave(dataclasses.asdict(meta)),
            ),
            force=True,
        )

    def restore(self, step: int, like: TrainState, stage: Stage) -> TrainState:
        """The state as it was saved; `like` gives its structure, shapes and shardings."""
        args = ocp.args.Composite(
            model=ocp.args.StandardRestore(_abstract(like.all_ema())),
            training=ocp.args.StandardRestore(_abstract(_training_part(like))),
        )
        found = self._manager.restore(step, args=args)
        ema, frozen = partition_for(stage, found["model"])
        return TrainState(ema=ema, frozen=frozen, **found["training"])

    def restore_params(self, step: int) -> Params:
        """All parameters, averaged where they were trained, on the first local device."""
        metadata = self._manager.item_metadata(step)["model"].tree
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata
        )
        args = ocp.args.Composite(model=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["model"]

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()

    def __enter__(self) -> StageCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_final(workdir: str | Path, stage: str | None = None) -> Loaded:
    """The newest model of a run: the last complete checkpoint of its last stage, or of `stage`.

    Raises:
      UserError: there is no complete checkpoint in `workdir`, or none of that stage.
    """
    root = Path(workdir) / "stages"
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


def check_same_run(config: ml_collections.ConfigDict, meta: Meta, workdir: str | Path) -> None:
    """Refuses to go on with a checkpoint under a config that would have made another one.

    Stages after the checkpoint's may still be changed, and so may `FREE_KEYS`.

    Raises:
      UserError: names the keys that differ, preset first, and says what to do.
    """
    now, then = (_relevant(c, meta.index) for c in (plain_config(config), meta.config))
    differing = [key for key in now | then if now.get(key, _ABSENT) != then.get(key, _ABSENT)]
    if not differing:
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
    )


def _training_part(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "skipped": state.skipped,
        "params": state.params,
        "opt_state": state.opt_state,
    }


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


def _versions() -> dict[str, str]:
    return {
        "nuwa_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
