"""Tracks to flow maps, on the device: a sum of outer products of one-dimensional Gaussians.

DragNUWA writes the displacement of a drag into one pixel of a sparse map and convolves the map
with a 199x199 Gaussian. A Gaussian is the product of one along y and one along x, so each drag adds
`displacement * outer(g(y), g(x))` to a frame, and all drags of a frame are one small
matrix product: exact, with no scatter and no convolution, differentiable in the points, and also
defined between pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from nuwa_jax.motion.tracks import TrackState


def rasterize(
    points: Float[Array, "*b k t 2"],
    state: Integer[Array, "*b k t"],
    height: int,
    width: int,
    *,
    sigma: float = 20.0,
    kernel_size: int = 199,
    normalize: bool = False,
    snap: bool = False,
    states: Sequence[int] = (TrackState.VISIBLE,),
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*b t h w 2"]:
    """Draws tracks as a flow map: frame 0 is zero, frame i shows the motion from i-1 to i.

    The displacement between two frames (pixels) is drawn about the position in the former, with
    weight exp(-r^2 / (2 sigma^2)) in a square of `kernel_size` pixels. The weight at the point is
    1, not 1 / (2 pi sigma^2): so the map equals the displacement there, and near tracks add up,
    as in DragNUWA 1.5 (its demo: 199 and 20; the paper: 99 and 10).

    Args:
      points: positions (x, y) in pixels of the map; any leading axes.
      state: track states; a displacement is drawn if the state is in `states` in both frames.
      height: of the map in pixels (static).
      width: of the map in pixels (static).
      sigma: of the Gaussian in pixels.
      kernel_size: odd width of the window outside which the Gaussian is cut to zero.
      normalize: divide by the sum of the kernel, so that it integrates to 1.
      snap: cut positions to whole pixels as DragNUWA does, instead of drawing between pixels.
      states: the states in which a track is drawn.
      dtype: of the result. The sum is taken in float32 (float64 for float64 points).

    Returns:
      The flow in pixels per frame, channels (x, y).
    """
    points, state = jnp.asarray(points), jnp.asarray(state)
    if points.shape[-1] != 2 or points.shape[:-1] != state.shape or points.ndim < 3:
        raise ValueError(
            f"rasterize takes points [.. k t 2] and state [.. k t], got {points.shape} and "
            f"{state.shape}"
        )
    _check_kernel(sigma, kernel_size)
    options = (height, width, float(sigma), kernel_size, normalize, snap, tuple(map(int, states)))
    return _rasterize(points, state, *options).astype(dtype)


@functools.partial(jax.jit, static_argnums=range(2, 9))
def _rasterize(
    points: Float[Array, "*b k t 2"],
    state: Integer[Array, "*b k t"],
    height: int,
    width: int,
    sigma: float,
    kernel_size: int,
    normalize: bool,
    snap: bool,
    states: tuple[int, ...],
) -> Float[Array, "*b t h w 2"]:
    points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    known = jnp.isin(state, jnp.asarray(states, state.dtype))
    drawn = (known[..., 1:] & known[..., :-1])[..., None]
    # Masking before and after: a position that is not drawn must not reach the result, nor, were
    # it not finite, turn the gradient of the others into NaN.
    origin = jnp.where(drawn, points[..., :-1, :], 0)
    target = jnp.where(drawn, points[..., 1:, :], 0)
    displacement = target - origin
    if snap:
        origin = jax.lax.stop_gradient(jnp.trunc(origin))

    rows = gaussian_kernel_1d(origin[..., 1], height, sigma=sigma, kernel_size=kernel_size)
    columns = gaussian_kernel_1d(origin[..., 0], width, sigma=sigma, kernel_size=kernel_size)
    if normalize:
        displacement = displacement / _kernel_sum(sigma, kernel_size) ** 2
    flow = jnp.einsum(
        "...kth,...ktwc->...thwc",
        rows,
        columns[..., None] * displacement[..., None, :],
        precision=jax.lax.Precision.HIGHEST,
    )
    first = [(0, 0)] * (flow.ndim - 4) + [(1, 0), (0, 0), (0, 0), (0, 0)]
    return jnp.pad(flow, first)


def gaussian_kernel_1d(
    centre: Float[Array, "*n"], size: int, *, sigma: float, kernel_size: int
) -> Float[Array, "*n {size}"]:
    """exp(-(p - centre)^2 / (2 sigma^2)) at pixels p = 0 .. size-1, `kernel_size` of them.

    The window is the `kernel_size` pixels about the one that `centre` rounds to, so that a whole
    `centre` gives exactly the discrete kernel of a convolution.
    """
    _check_kernel(sigma, kernel_size)
    centre = jnp.asarray(centre)[..., None]
    pixels = jnp.arange(size, dtype=centre.dtype)
    window = jnp.abs(pixels - jnp.round(centre)) <= kernel_size // 2
    # Masked on both sides of exp: far away its square may overflow, and 0 * inf in the gradient.
    offset = jnp.where(window, pixels - centre, 0)
    return jnp.where(window, jnp.exp(-0.5 * jnp.square(offset / sigma)), 0)


def _kernel_sum(sigma: float, kernel_size: int) -> float:
    offsets = np.arange(kernel_size) - kernel_size // 2
    return float(np.exp(-0.5 * np.square(offsets / sigma)).sum())


def _check_kernel(sigma: float, kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is odd and positive, got {kernel_size}")
    if not sigma > 0:
        raise ValueError(f"sigma is a positive number of pixels, got {sigma}")
