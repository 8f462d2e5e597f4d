"""One comparison with the reference: how it is made, named and bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float

from nuwa_jax.models.video_ldm import QUICK_COMPILE

# YNNPACK's convolutions round twice as much as XLA's own (and PyTorch's), its sums round less.
QUICK = QUICK_COMPILE | {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

RELATIVE = "relative L2"
ELEMENTWISE = "relative, elementwise"
ABSOLUTE = "absolute"
EXACT = "exact"
MISSING = "missing"  # the folder should have it
SKIPPED = "skipped"  # not compared, for the reason in the note
UNUSABLE = "unusable"  # there, but not to be read, or of a wrong shape


class Item(NamedTuple):
    """One line of the report. What was not compared has no error and says why in its note."""

    name: str
    error: float | None
    bound: float | None
    kind: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """Compared, and within the bound; an error that is not a number is not."""
        return self.error is not None and self.bound is not None and self.error <= self.bound

    @property
    def failed(self) -> bool:
        """Beyond the bound, missing or unusable: the folder does not agree with this package."""
        return not self.passed and self.kind != SKIPPED


class Missing(KeyError):
    """The folder lacks a file, an array or an entry of its config, which it names."""

    @property
    def name(self) -> str:
        return self.args[0]

    def item(self) -> Item:
        return Item(self.name, None, None, MISSING)


class Unusable(ValueError):
    """A file of the folder cannot be read; holds its name and the reason."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for functions that run once or twice."""
    return jax.jit(function, compiler_options=QUICK)


FAULTS = (Missing, ValueError, TypeError, IndexError)  # what a wrong folder can lead to


def complaint(name: str, fault: Exception) -> Item:
    """The item that says what was wrong with the folder."""
    if isinstance(fault, Missing):
        return fault.item()
    if isinstance(fault, Unusable):
        return Item(str(fault.args[0]), None, None, UNUSABLE, str(fault.args[1]))
    # What jax says of shapes that do not fit takes many lines.
    reason = " ".join(str(fault).split())
    return Item(name, None, None, UNUSABLE, f"{type(fault).__name__}: {reason[:300]}")


def guarded(name: str, items: Iterator[Item]) -> Iterator[Item]:
    """The items, up to the first thing the folder lacks or has in a wrong shape; then that."""
    try:
        yield from items
    except FAULTS as fault:
        yield complaint(name, fault)


def relative(name: str, ours: Any, theirs: Any, bound: float, note: str = "") -> Item:
    """|ours - theirs| / |theirs| over all entries."""
    ours, theirs = _pair(ours, theirs)
    scale = np.linalg.norm(theirs)
    # Arrays that are zero throughout (a condition withheld) have no relative error.
    error = np.linalg.norm(ours - theirs) / (scale if scale > 0 else 1.0)
    return Item(name, float(error), bound, RELATIVE, note)


def elementwise(
    name: str, ours: Any, theirs: Any, bound: float, tiny: float = 0.0, note: str = ""
) -> Item:
    """Largest |ours - theirs| / (|theirs| + tiny)."""
    ours, theirs = _pair(ours, theirs)
    scale = np.abs(theirs) + tiny
    error = np.abs(ours - theirs) / np.where(scale > 0, scale, 1.0)
    return Item(name, float(error.max(initial=0.0)), bound, ELEMENTWISE, note)


def absolute(name: str, ours: Any, theirs: Any, bound: float, note: str = "") -> Item:
    """Largest |ours - theirs|."""
    ours, theirs = _pair(ours, theirs)
    return Item(name, float(np.abs(ours - theirs).max(initial=0.0)), bound, ABSOLUTE, note)


def exact(name: str, ours: Any, theirs: Any, note: str = "") -> Item:
    """The number of entries that differ; all of them where the shapes do."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        note = f"{note}; " if note else ""
        return Item(
            name, float(theirs.size), 0.0, EXACT, f"{note}{ours.shape}, theirs {theirs.shape}"
        )
    return Item(name, float((ours != theirs).sum()), 0.0, EXACT, note)


def sums(name: str, values: Any, theirs: Float[np.ndarray, "2 ..."], bound: float) -> Item:
    """Sum and sum of squares of `values` over all but the first axes, those of `theirs` [2 ...].

    The error of a sum is taken relative to what sums of such values are at most, sqrt(number of
    values · sum of squares): its own value may be anything, zero included.
    """
    values, theirs = np.asarray(values, np.float64), np.asarray(theirs, np.float64)
    values = values.reshape(*theirs.shape[1:], -1)
    both = np.stack([values.sum(-1), np.square(values).sum(-1)])
    scale = np.stack([np.sqrt(values.shape[-1] * theirs[1]), theirs[1]])
    error = np.abs(both - theirs) / np.where(scale > 0, scale, 1.0)
    return Item(name, float(error.max()), bound, "relative, of sums")


def channels_last(x: Any, frames: int | None = None) -> Float[np.ndarray, "..."]:
    """Their (b t) c h w, or (b t) c, as our b t h w c, or b t c; without frames n h w c."""
    x = np.moveaxis(as_float(x), 1, -1)
    if frames is None:
        return x
    return rearrange(x, "(b t) ... -> b t ...", t=frames)


def as_float(x: Any) -> Float[np.ndarray, "..."]:
    """Stored halves as the float32 they stand for; float64 stays."""
    x = np.asarray(x)
    return x if x.dtype == np.float64 else x.astype(np.float32)


def flow_last(flow: Any) -> Float[np.ndarray, "b t H W 2"]:
    """Their b t 2 H W as our b t H W 2."""
    return rearrange(np.asarray(flow, np.float32), "b t c h w -> b t h w c")


def _pair(ours: Any, theirs: Any) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"ours is {ours.shape}, theirs {theirs.shape}")
    return ours, theirs
