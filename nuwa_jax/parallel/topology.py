"""Chips and pods by name, for compiling programs for them on machines that have none."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax

from nuwa_jax.errors import UserError

# Compiling needs no chip: the compiler must not look for one, nor lock the library against others,
# and what little is computed is computed on the CPU.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # These only spare the user its complaints that there is no TPU.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has, as its makers state it.

    Attributes:
      name: as the topology's name begins.
      platform: what XLA calls it.
      memory: bytes of high-bandwidth memory.
      flops: peak of dense bfloat16 products, per second.
      memory_bandwidth: bytes per second.
      link_bandwidth: bytes per second that one chip sends to its neighbours, all links together.
      clock: cycles per second of its cores.
    """

    name: str
    platform: str
    memory: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    clock: float


# From "How to Scale Your Model" (jax-ml.github.io/scaling-book, "TPU specs"; links one way times
# their number: 4 in a 2-D torus, 6 in a 3-D one). The clock follows from the peak: so many units of
# 128 x 128 or 256 x 256 multiplications and additions a cycle.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4", 32 * 2**30, 275e12, 1.2e12, 6 * 4.5e10, 1.05e9),
        Chip("v5e", "v5e", 16 * 2**30, 197e12, 8.1e11, 4 * 4.5e10, 1.5e9),
        Chip("v5p", "v5", 95 * 2**30, 459e12, 2.8e12, 6 * 9e10, 1.75e9),
        Chip("v6e", "v6e", 32 * 2**30, 918e12, 1.6e12, 4 * 9e10, 1.75e9),
    )
}
_GPUS = ("gpu", "cuda", "a100", "h100", "h200", "b200", "gb200")
_ALIASES = {"v5": "v5p"}  # as libtpu calls it


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a torus, and how many such slices."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> Topology:
        """From "v5e:16x16", "v5p:4x4x4", ...

        Raises:
          UserError: the chip is unknown, or the shape is not one.
        """
        known = ", ".join(CHIPS)
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
        if match is None:
            raise UserError(
                f"a topology is CHIP:SHAPE, as in v5e:16x16 or v5p:4x4x4, got {name!r}; chips: "
                f"{known}"
            )
        if match[1].lower() in _GPUS:
            raise UserError(
                f"programs are compiled ahead only for TPUs ({known}), got {name!r}: the GPU's "
                "compiler needs a GPU of that kind to be told of; run a few steps on one"
            )
        kind = _ALIASES.get(match[1], match[1])
        if kind not in CHIPS:
            raise UserError(f"the chip of topology {name!r} is not known: it is one of {known}")
        if slices < 1:
            raise UserError(f"slices is at least 1, got {slices}")
        return cls(CHIPS[kind], tuple(map(int, match[2].split("x"))), slices)

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}{slices}"

    def devices(self) -> list[jax.Device]:
        """The topology's devices, which programs can be compiled for and nothing can be run on.

        Raises:
          UserError: libtpu is not installed, or knows no such topology.
        """
        from jax.experimental import topologies

        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"compiling for {self.name} needs libtpu, which holds the compiler: "
                "pip install 'nuwa_jax[tpu]' (no TPU is needed)"
            )
        shape = "x".join(map(str, self.shape))
        try:
            described = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.chip.platform}:{shape}",
                num_slices=self.slices,
            )
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"libtpu knows no topology {self.name}: {error}") from error
        return list(described.devices)


def prepare_environment() -> None:
    """Sets `ENVIRONMENT`; to be called before jax starts a backend."""
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
