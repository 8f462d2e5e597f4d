"""Chips and pods by name, for compiling programs for them on machines that have none."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from nuwa_jax.errors import UserError
from nuwa_jax.watching.mfu import peak_of

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
      kind: what JAX calls it (`jax.Device.device_kind`).
      memory: bytes of high-bandwidth memory.
      memory_bandwidth: bytes per second.
      link_bandwidth: bytes per second that one chip sends to its neighbours, all links together.
      clock: cycles per second of its cores.
    """

    name: str
    platform: str
    kind: str
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    clock: float

    @property
    def flops(self) -> float:
        """Peak of dense bfloat16 products, per second."""
        return peak_of(self.kind).flops

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What its compiler is to be told."""
        # Triton's kernels for products are chosen by running them.
        return {"xla_gpu_enable_triton_gemm": False} if self.platform == "cuda" else {}


# Peaks of arithmetic are in `nuwa_jax.watching.mfu`; the rest is from "How to Scale Your Model"
# (jax-ml.github.io/scaling-book, "TPU specs"; links one way times their number: 4 in a 2-D torus, 6
# in a 3-D one). The clock follows from the peak: so many units of 128 x 128 or 256 x 256
# multiplications and additions a cycle. H100: NVIDIA's data sheet (SXM; 18 links of NVLink, one
# way).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4", "TPU v4", 32 * 2**30, 1.2e12, 6 * 4.5e10, 1.05e9),
        Chip("v5e", "v5e", "TPU v5 lite", 16 * 2**30, 8.1e11, 4 * 4.5e10, 1.5e9),
        Chip("v5p", "v5", "TPU v5", 95 * 2**30, 2.8e12, 6 * 9e10, 1.75e9),
        Chip("v6e", "v6e", "TPU v6 lite", 32 * 2**30, 1.6e12, 4 * 9e10, 1.75e9),
        Chip("h100", "cuda", "NVIDIA H100 80GB HBM3", 84_978_434_048, 3.35e12, 18 * 2.5e10, 1.98e9),
    )
}
_ALIASES = {"v5": "v5p"}  # as libtpu calls it


# What XLA has to know of a GPU that is not there, as it describes one that is (text of its protocol
# buffer GpuTargetConfigProto; numbers of NVIDIA's H100 data sheet and CUDA's device properties).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a torus, and how many such slices; or GPUs, as hosts x GPUs of each."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> Topology:
        """From "v5e:16x16", "v5p:4x4x4", "h100:4x8" (4 hosts of 8), ...

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
          UserError: the compiler is not installed, or knows no such topology.
        """
        from jax.experimental import topologies

        shape = "x".join(map(str, self.shape))
        if self.chip.platform == "cuda":
            _need("jax_plugins.xla_cuda12", self.name, "nuwa_jax[cuda12]", "GPU")
            hosts, gpus = math.prod(self.shape[:-1]) * self.slices, self.shape[-1]
            options = dict(
                platform="cuda",
                topology_name=self.chip.name,
                target_config=H100,
                topology=f"1x{hosts}x{gpus}",
            )
        else:
            _need("libtpu", self.name, "nuwa_jax[tpu]", "TPU")
            name = f"{self.chip.platform}:{shape}"
            options = dict(platform="tpu", topology_name=name, num_slices=self.slices)
        try:
            return list(topologies.get_topology_desc(**options).devices)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"the compiler knows no topology {self.name}: {error}") from error


def _need(module: str, name: str, extra: str, device: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise UserError(
            f"compiling for {name} needs {module}, which holds the compiler: "
            f"pip install '{extra}' (no {device} is needed)"
        )


def prepare_environment() -> None:
    """Sets `ENVIRONMENT`; to be called before jax starts a backend."""
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
