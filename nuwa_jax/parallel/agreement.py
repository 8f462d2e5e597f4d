"""What the processes of a job must have in common, and what they decide together."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from nuwa_jax.data.storage import Folder
from nuwa_jax.errors import UserError

PACKAGE = Path(__file__).parents[1]
# Where files lie is each host's own affair; that clips are the same is told by their fingerprint.
LOCAL_KEYS = re.compile(r"config\.(data\.(clips|sources\[\d+\]\.path|tokenizer)|train\.init_from)$")
# Packages of which another version may compute something else.
COMPARED_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "einops"),
)
# Barriers end when the last process comes; that one was lost is for `peers` to find.
_PATIENCE_MS = 24 * 3600 * 1000


class Agreement:
    """When a stage ends: decided by all processes at the same step, from what each knows.

    Each process casts a vote with every step: the signal that it has had and its clock. Votes
    travel as the step's metrics do, and nobody waits for them: a decision is taken as many steps
    late as metrics are read late. A process alone decides at once.
    """

    def __init__(self, elapsed: float, signal: int | None) -> None:
        """Starts a stage; all processes wait here for each other.

        Args:
          elapsed: seconds that the stage has trained before.
          signal: what this process was sent so far.
        """
        self._elapsed, self._signal = elapsed, None
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        grid = np.array(devices).reshape(jax.process_count(), -1)
        mesh = Mesh(grid, ("process", "device"), axis_types=(AxisType.Auto,) * 2)
        self._own = NamedSharding(mesh, PartitionSpec("process"))
        self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.take(jax.device_get(self.cast(signal, elapsed)))

    def cast(self, signal: int | None, elapsed: float) -> dict[str, Array]:
        """This process' vote, on its way to all; nothing if there are no others."""
        if self._alone:
            return {}
        vote = np.array([[signal or 0, elapsed]], np.float32)
        # With several processes JAX takes this for an implicit transfer, which the loop forbids.
        with jax.transfer_guard_host_to_device("allow"):
            vote = jax.make_array_from_process_local_data(self._own, vote)
        return {"votes": self._gather(vote)}

    def take(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Reads the votes that came with a step's metrics; returns the rest."""
        votes = metrics.pop("votes", None)
        if votes is not None:
            # The clock is process 0's.
            self._signal = int(np.max(votes[:, 0])) or None
            self._elapsed = float(votes[0, 1])
        return metrics

    def settled(self, signal: int | None, elapsed: float) -> tuple[int | None, float]:
        """The signal and the seconds by which all processes go at this step.

        Args:
          signal: this process' own, which decides if it is alone.
          elapsed: likewise.
        """
        return (signal, elapsed) if self._alone else (self._signal, self._elapsed)


def check_same_program(config: Mapping[str, Any], workdir: str | Path) -> None:
    """Compares what the processes run: config, code, versions, devices; and that they share a disk.

    Raises:
      UserError: names the processes that differ from process 0 and in what.
    """
    if jax.process_count() == 1:
        return
    versions = {"python": platform.python_version()}
    for name in COMPARED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    mine = {"config": config, "code": _code(), "version": versions, "devices": devices}
    flat = {key: value for key, value in _flat(mine).items() if not LOCAL_KEYS.match(key)}
    check_same("what they run", flat, "start all with the same code, packages and flags")
    _check_shared(workdir)


def check_same(what: str, mine: Mapping[str, Any], mend: str) -> None:
    """Compares values among processes; all must call it, in the same order.

    Args:
      what: the values, in words.
      mine: what JSON can hold.
      mend: what the user can do if they differ.

    Raises:
      UserError: in every process the same: which of them differ from process 0 and in what.
    """
    if jax.process_count() == 1:
        return
    client, index, place = _client(), jax.process_index(), _next_place()
    mine = json.loads(json.dumps(mine))
    if index == 0:
        client.key_value_set(f"{place}/first", json.dumps(mine))
    first = json.loads(client.blocking_key_value_get(f"{place}/first", _PATIENCE_MS))
    differing = sorted(k for k in first | mine if first.get(k, "none") != mine.get(k, "none"))
    told = [
        f"{key} is {mine.get(key, 'none')}, of process 0 {first.get(key, 'none')}"
        for key in differing[:4]
    ]
    if len(differing) > 4:
        told.append(f"and {len(differing) - 4} more")
    if told:
        text = f"process {index} ({platform.node()}): {'; '.join(told)}"
        client.key_value_set(f"{place}/differs/{index:06d}", text)
    client.wait_at_barrier(place, _PATIENCE_MS)
    found = [text for _, text in sorted(client.key_value_dir_get(f"{place}/differs/"))]
    if found:
        more = f" | and {len(found) - 4} more processes" if len(found) > 4 else ""
        raise UserError(f"processes differ in {what}: {' | '.join(found[:4])}{more}: {mend}")


def _check_shared(workdir: str | Path) -> None:
    """That all processes see the same folder, by a file that process 0 writes there."""
    folder, client, place = Folder(workdir), _client(), _next_place()
    if jax.process_index() == 0:
        folder.make()
        name = f".shared-{uuid.uuid4().hex}"
        folder.write_text(name, "All processes of the job must see this file.\n")
        client.key_value_set(place, name)
    name = client.blocking_key_value_get(place, _PATIENCE_MS)
    deadline = time.monotonic() + 30  # network disks show new files late
    while not (seen := folder.size(name) >= 0) and time.monotonic() < deadline:
        time.sleep(0.5)
    try:
        check_same(
            "what they see in --workdir",
            {folder.url: "the same folder" if seen else "not what process 0 writes"},
            "give a folder that all hosts share",
        )
    finally:
        if jax.process_index() == 0:
            folder.remove(name)


def _client() -> Any:
    # The coordination service's store is not public in JAX; Orbax takes it from here, too.
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("there are several processes, but jax.distributed is not initialised")
    return client


def _next_place() -> str:
    """Where in the store the next exchange is; processes take the same ones in the same order."""
    global _places
    _places += 1
    return f"nuwa/exchange/{_places}"


_places = 0


def _code() -> str:
    """A hash of the package's source files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted keys and values."""
    if isinstance(tree, Mapping):
        parts = [(f"{path}.{key}" if path else str(key), tree[key]) for key in tree]
    elif isinstance(tree, list | tuple) and any(isinstance(each, Mapping) for each in tree):
        parts = [(f"{path}[{number}]", each) for number, each in enumerate(tree)]
    else:
        return {path: tree}
    return {key: value for name, part in parts for key, value in _flat(part, name).items()}
