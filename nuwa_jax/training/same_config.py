"""With which configs a run may go on from a checkpoint."""

from __future__ import annotations

import json
import re
from typing import Any

import ml_collections

from nuwa_jax.errors import UserError
from nuwa_jax.training.checkpoint import Meta

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


def plain_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as it comes back from JSON: tuples are lists, references are values."""
    return json.loads(json.dumps(config.to_dict()))


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
