"""Reads thousands of batches onto the device and watches memory, open files and compilations."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
from jaxtyping import Array, Float

from nuwa_jax.data.batch import Batch
from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.device import complete, to_device
from nuwa_jax.data.pipeline import make_batches

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Soak:
    """What was seen.

    Attributes:
      batches: that were read.
      compilations: after the first batch.
      memory: resident bytes of the process and its workers at even distances, the first after a
        twentieth of the batches.
      files: that were open, at the same places.
      num_replaced: records that could not be read.
    """

    batches: int
    compilations: int
    memory: tuple[int, ...]
    files: tuple[int, ...]
    num_replaced: int


def soak(config: DataConfig, num_batches: int, batch_size: int) -> Soak:
    """Reads `num_batches` batches as training does, with flow, and gives each to a jitted step.

    The step does what is left to the device: enlarges flow, mirrors, normalises.
    """
    compilations = 0

    def listen(event: str, seconds: float, **_: object) -> None:
        nonlocal compilations
        del seconds
        compilations += event == _COMPILED

    def consume(batch: Batch) -> Float[Array, ""]:
        batch = complete(batch, config.height, config.width)
        parts = [jnp.mean(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(batch)]
        return jnp.sum(jnp.stack(parts))

    step = jax.jit(consume)
    batches = make_batches(
        config,
        seed=0,
        batch_size=batch_size,
        with_flow=True,
        with_picture=False,
        num_batches=num_batches,
        transfer=to_device,
    )
    memory, files = [], []
    every = max(1, num_batches // 20)
    # Listeners cannot be taken away again one by one: this one only counts.
    jax.monitoring.register_event_duration_secs_listener(listen)
    for number, batch in enumerate(batches, 1):
        jax.block_until_ready(step(batch))
        if number == 1:
            compilations = 0
        if number % every == 0:
            memory.append(sum(_resident(pid) for pid in family()))
            files.append(len(os.listdir("/proc/self/fd")))
    batches.close()
    return Soak(num_batches, compilations, tuple(memory), tuple(files), batches.num_replaced)


def family() -> list[int]:
    """This process and all that come from it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended since
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _resident(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
