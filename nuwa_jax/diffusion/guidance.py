"""Classifier-free guidance with a scale of its own for the text, the first frame and the drags.

The guided estimate is a cascade of conditions, each pushed away from the estimate without it (as in
InstructPix2Pix, arXiv 2211.09800 eq. 3, here with three):

  D = D_0 + s_image (D_i - D_0) + s_text (D_it - D_i) + s_drag (D_itd - D_it)

which is a weighted sum of branches. Only branches with a weight are ever computed: one when all
scales are 1, two when all are equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# One number for all frames, or those of the first and the last frame, linear in between.
Scale = float | tuple[float, float]


class Keep(NamedTuple):
    """Which conditions a branch is given."""

    text: bool
    image: bool
    drag: bool


@dataclasses.dataclass(frozen=True)
class GuidanceScales:
    """How strongly each condition is followed; 1 is the model as it was trained.

    A scale is a number, or a pair (first frame, last frame) that is linear in between. `None` puts
    the condition into every branch, so that it is given but not amplified. DragNUWA 1.5 (SVD) is
    `GuidanceScales(text=None, image=(1.0, 2.5), drag=None)`: its unconditional branch keeps the
    drags.
    """

    text: Scale | None = 1.0
    image: Scale | None = 1.0
    drag: Scale | None = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            scale = getattr(self, field.name)
            if scale is None or isinstance(scale, int | float):
                continue
            if len(scale) != 2:
                raise ValueError(
                    f"the {field.name} guidance scale is a number, a pair of numbers (first and "
                    f"last frame) or None, got {scale!r}"
                )
            # Configs may hold pairs as lists; a static argument of jit must be hashable.
            object.__setattr__(self, field.name, (float(scale[0]), float(scale[1])))

    def branches(self) -> list[tuple[Scale, Keep]]:
        """What has to be computed: (coefficient, conditions given), coefficients summing to 1.

        The fullest branch comes last; branches with coefficient 0 are left out.
        """
        order = ("image", "text", "drag")
        keep = {name: getattr(self, name) is None for name in order}
        kept, outer = [dict(keep)], [(1.0, 1.0)]
        for name in order:
            scale = getattr(self, name)
            if scale is not None:
                keep[name] = True
                kept.append(dict(keep))
                outer.append(_pair(scale))
        # D_n - D_(n-1) has the scale of the n-th condition, so D_n has it less that of the next.
        inner = [*outer[1:], (0.0, 0.0)]
        result: list[tuple[Scale, Keep]] = []
        for (first, last), (next_first, next_last), given in zip(outer, inner, kept, strict=True):
            coefficient = (first - next_first, last - next_last)
            if coefficient != (0.0, 0.0):
                constant = coefficient[0] == coefficient[1]
                result.append((coefficient[0] if constant else coefficient, Keep(**given)))
        return result


def guided_denoiser(
    denoise: Callable[[Array, Array, Any], Array],
    branch_conditions: Sequence[Any],
    coefficients: Sequence[Scale],
) -> Callable[[Float[Array, "b t ..."], Float[Array, ""]], Float[Array, "b t ..."]]:
    """Makes one denoiser of several branches; each call of it is one call of the network.

    Args:
      denoise: the network's estimate of clean latents, `denoise(x [n ...], sigma [n], condition)`.
      branch_conditions: the condition of each branch, pytrees of the same structure whose leaves
        all start with the batch axis b. They are stacked here, once, not once per step.
      coefficients: the weight of each branch (`GuidanceScales.branches`).

    Returns:
      `(x [b t ...], sigma scalar) -> [b t ...]`, for `samplers.sample`.

    Raises:
      ValueError: there is no branch, or not one coefficient per branch.
    """
    n = len(branch_conditions)
    if n == 0 or n != len(coefficients):
        raise ValueError(
            f"expected one coefficient per branch, got {len(coefficients)} for {n} branches"
        )
    condition = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *branch_conditions)

    def guided(x: Array, sigma: Array) -> Array:
        b = x.shape[0]
        stacked = jnp.concatenate([x] * n)  # branch-major, as the conditions
        denoised = denoise(stacked, jnp.broadcast_to(sigma, (n * b,)), condition)
        if n == 1 and tuple(_pair(coefficients[0])) == (1.0, 1.0):
            return denoised
        parts = denoised.reshape(n, *x.shape)
        weights = [_per_frame(c, x) for c in coefficients]
        return sum(weight * part for weight, part in zip(weights, parts, strict=True))

    return guided


def _pair(scale: Scale) -> tuple[float, float]:
    if isinstance(scale, tuple):
        return scale
    return float(scale), float(scale)


def _per_frame(scale: Scale, x: Float[Array, "b t ..."]) -> Array:
    first, last = _pair(scale)
    if first == last:
        return jnp.asarray(first, x.dtype)
    frames = jnp.linspace(first, last, x.shape[1], dtype=x.dtype)
    return frames.reshape(1, -1, *([1] * (x.ndim - 2)))
