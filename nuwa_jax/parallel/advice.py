"""What to change when a program does not fit a chip's memory, and whether that helps: by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections

from nuwa_jax.errors import UserError
from nuwa_jax.models.remat import POLICIES
from nuwa_jax.parallel import programs
from nuwa_jax.parallel.mesh import MeshConfig, batch_arithmetic
from nuwa_jax.parallel.report import compile_program, find_stage
from nuwa_jax.parallel.sharding import check_replicated, report
from nuwa_jax.parallel.topology import Topology
from nuwa_jax.training.state import TrainState


def changes(
    config: ml_collections.ConfigDict, topology: Topology, what: str, stage: str | None
) -> Iterator[tuple[dict[str, Any], ml_collections.ConfigDict]]:
    """Changed entries and the config with them, each needing less memory than the one before.

    What costs least comes first, and stays: rematerialisation costs up to a second forward pass,
    parameters over more devices larger exchanges, and every further micro-batch another gather of
    the parameters. What the mesh or the batch does not allow is left out.
    """
    given: dict[str, Any] = {}
    # Its shapes are those of every change.
    state = programs.abstract_state(config, find_stage(config, stage)) if what == "train" else None
    for name, values in _candidates(config, topology, what):
        for value in values:
            changed = _with(config, given | {name: value})
            if not _is_possible(changed, topology, stage, state):
                break
            given[name] = value
            yield dict(given), changed


def what_could_change(
    config: ml_collections.ConfigDict, topology: Topology, what: str, stage: str | None
) -> str:
    """The changes that `try_changes` would try, in words."""
    options = [_as_flags(given) for given, _ in changes(config, topology, what, stage)]
    if not options:
        return "rematerialisation, mesh and micro-batches leave nothing to try: take more chips"
    return f"to make it fit, these are left (--suggest compiles them in turn): {'; '.join(options)}"


def try_changes(
    config: ml_collections.ConfigDict,
    topology: Topology,
    what: str,
    stage: str | None,
    say: Callable[[str], Any] = lambda text: print(text, flush=True),
) -> list[dict[str, Any]]:
    """Compiles with one change after another until one fits; returns what was tried."""
    tried = []
    for given, changed in changes(config, topology, what, stage):
        memory = compile_program(changed, topology, what, stage)["memory"]
        tried.append({"change": given, "memory": memory})
        total = "too much" if memory["total"] is None else f"{memory['total'] / 2**30:.2f} GiB"
        say(f"{_as_flags(given)}: {total}, {'it fits' if memory['fits'] else 'it does not fit'}")
        if memory["fits"]:
            return tried
    say("none of these fits: take more chips, or chips with more memory")
    return tried


def _candidates(
    config: ml_collections.ConfigDict, topology: Topology, what: str
) -> Iterator[tuple[str, list[Any]]]:
    if what == "train":
        kept = POLICIES.index(config.model.unet.get("remat", "none"))
        yield "model.unet.remat", list(POLICIES[kept + 1 :])
    chips = topology.chips
    yield "mesh.fsdp", [n for n in _doubled(config.mesh.fsdp, chips) if n > config.mesh.fsdp]
    if what == "train":
        yield "train.accumulate", _doubled(config.train.accumulate, 64)[1:]


def _doubled(first: int, last: int) -> list[int]:
    values = [first]
    while values[-1] * 2 <= last:
        values.append(values[-1] * 2)
    return values


def _with(config: ml_collections.ConfigDict, given: dict[str, Any]) -> ml_collections.ConfigDict:
    config = copy.deepcopy(config)
    with config.unlocked():
        for name, value in given.items():
            section, _, key = name.rpartition(".")
            part = config
            for step in section.split("."):
                part = part[step]
            part[key] = value
    return config


def _is_possible(
    config: ml_collections.ConfigDict,
    topology: Topology,
    stage: str | None,
    state: TrainState | None,
) -> bool:
    """Whether the mesh exists and, for a step with that state, splits it and its batch."""
    try:
        sizes = MeshConfig.from_config(config.mesh).sizes(topology.chips)
        if state is not None:
            batch_size = find_stage(config, stage).batch_size
            batch_arithmetic(batch_size, config.train.accumulate, sizes)
            check_replicated(report(state, sizes), sizes)
    except UserError:
        return False
    return True


def _as_flags(given: dict[str, Any]) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in given.items())
