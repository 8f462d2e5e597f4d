"""Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).

    MFU = model FLOPs per step / (seconds per step x devices x peak)

Model FLOPs are those of `nuwa_jax.watching.flops`: what the mathematics of a step needs, whatever
is computed again to save memory. The peak is that of dense bfloat16 products, also where a run
computes in float32, so that MFUs compare.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from nuwa_jax.errors import UserError
from nuwa_jax.watching.flops import model_flops
from nuwa_jax.watching.words import flops

# (regular expression over `device.device_kind`, bfloat16 FLOP/s of one JAX device, source). The
# first that matches counts. TPU v2 and v3 have two devices per chip, later ones one.
PEAKS = (
    (r"^TPU v2", 22.5e12, "cloud.google.com/tpu/docs/v2"),
    (r"^TPU v3", 61.5e12, "cloud.google.com/tpu/docs/v3"),
    (r"^TPU v4$", 275e12, "cloud.google.com/tpu/docs/v4"),
    (r"^TPU v5 ?(lite|e)", 197e12, "cloud.google.com/tpu/docs/v5e"),
    (r"^TPU v5p?$", 459e12, "cloud.google.com/tpu/docs/v5p"),
    (r"^TPU v6 ?(lite|e)", 918e12, "cloud.google.com/tpu/docs/v6e"),
    (r"\bA100\b", 312e12, "NVIDIA A100 data sheet"),
    (r"\bH100 PCIe\b", 756e12, "NVIDIA H100 data sheet, without sparsity"),
    (r"\b(H100|H200|GH200)\b", 989e12, "NVIDIA H100 (SXM) data sheet, without sparsity"),
    (r"\bL40S\b", 362e12, "NVIDIA L40S data sheet, without sparsity"),
    (r"\bL4\b", 121e12, "NVIDIA L4 data sheet, without sparsity"),
    (r"\bB200\b", 2250e12, "NVIDIA B200 data sheet, without sparsity"),
)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most that a device can do: floating-point operations per second, and who says so."""

    flops: float
    source: str


def peak_of(kind: str, given: float = 0.0) -> Peak | None:
    """The peak of a device.

    Args:
      kind: `jax.Device.device_kind`.
      given: FLOP/s of one device from the config, which goes before the table; 0: none.

    Returns:
      None where the table does not know the device.

    Raises:
      UserError: `given` is negative.
    """
    if given < 0:
        raise UserError(f"train.peak_flops is at least 0 (0: from the table), got {given}")
    if given:
        return Peak(given, "train.peak_flops")
    found = next((row for row in PEAKS if re.search(row[0], kind)), None)
    return None if found is None else Peak(found[1], found[2])


@dataclasses.dataclass(frozen=True)
class Mfu:
    """What the MFU of a training step is made of.

    Attributes:
      step_flops: model FLOPs of a step over all devices, or None where they cannot be counted.
      devices: that share them.
      kind: of device.
      peak: of one, or None where it is not known.
      reason: why it is not reported; "" where it is.
    """

    step_flops: int | None
    devices: int
    kind: str
    peak: Peak | None
    reason: str = ""

    @classmethod
    def of_step(
        cls, step: Callable[..., Any], *args: Any, devices: list[jax.Device], given: float = 0.0
    ) -> Mfu:
        """Counts `step(*args)`, which is traced but not computed.

        With the very arrays of the first step this trace is the one that jit would make of it.
        """
        kind = devices[0].device_kind
        peak = peak_of(kind, given)
        try:
            counted = model_flops(step, *args)
        except ValueError as error:
            return cls(None, len(devices), kind, peak, str(error))
        reason = ""
        if peak is None:
            reason = f"no peak is known of {kind!r}, give it with --config.train.peak_flops=FLOP/s"
        return cls(counted, len(devices), kind, peak, reason)

    def of(self, step_seconds: float) -> float | None:
        """The MFU of steps that take so long, in [0, 1]; None where it is not reported."""
        if self.reason or not step_seconds > 0:
            return None
        return self.step_flops / (step_seconds * self.devices * self.peak.flops)

    def __str__(self) -> str:
        """The formula with what is known of it."""
        counted = "" if self.step_flops is None else f"{flops(self.step_flops)}FLOP per step"
        if self.reason:
            return f"MFU is not reported: {self.reason}" + (f"; {counted}" if counted else "")
        return (
            f"MFU = model FLOPs per step / (step seconds x devices x peak): {counted} (products "
            f"and convolutions, forward and backward), {self.devices} x {self.kind} at "
            f"{flops(self.peak.flops)}FLOP/s ({self.peak.source}); step seconds are without "
            "checkpoints and samples"
        )
