"""Operations on dense flow, on the device: warping, forward-backward checks, following points.

Flow is in pixels, channels (x, y). `flow[i]` of a clip is the displacement from frame i-1 to i
at positions of frame i-1.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from nuwa_jax.motion.tracks import Tracks, TrackState, inside


def warp(image: Float[Array, "b h w c"], flow: Float[Array, "b h w 2"]) -> Float[Array, "b h w c"]:
    """Backward warp: out(x) = image(x + flow(x)), bilinear, borders continued outwards.

    With `flow` from frame i-1 to i at positions of i-1, warping frame i gives frame i-1 wherever
    nothing is hidden.
    """
    if image.shape[:3] != flow.shape[:3] or flow.shape[-1] != 2:
        raise ValueError(
            f"warp takes image [b h w c] and flow [b h w 2] of one size, got {image.shape} and "
            f"{flow.shape}"
        )
    return _warp(image, flow)


@jax.jit
def forward_backward_error(
    forward: Float[Array, "b h w 2"], backward: Float[Array, "b h w 2"]
) -> Float[Array, "b h w"]:
    """How far, in pixels, one lands from where one started after going there and back."""
    return jnp.linalg.norm(forward + warp(backward, forward), axis=-1)


@functools.partial(jax.jit, static_argnames=("relative", "absolute"))
def consistency_mask(
    forward: Float[Array, "b h w 2"],
    backward: Float[Array, "b h w 2"],
    *,
    relative: float = 0.01,
    absolute: float = 0.5,
) -> Bool[Array, "b h w"]:
    """Where forward flow can be trusted: it stays in the picture and backward flow undoes it.

    The test |f + b|^2 < relative (|f|^2 + |b|^2) + absolute, in square pixels, and its constants
    are those of Sundaram, Brox & Keutzer, ECCV 2010.
    """
    height, width = forward.shape[1:3]
    returning = warp(backward, forward)
    error = jnp.square(forward + returning).sum(axis=-1)
    size = jnp.square(forward).sum(axis=-1) + jnp.square(returning).sum(axis=-1)
    x, y = jnp.moveaxis(_targets(forward), -1, 0)
    within = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    return within & (error < relative * size + absolute)


def chain_flow(
    flow: Float[Array, "t h w 2"],
    points: Float[Array, "k 2"],
    trusted: Bool[Array, "t h w"] | None = None,
) -> Tracks:
    """Follows points of frame 0 through the flow of a clip; a host function that returns NumPy.

    Args:
      flow: `flow[0]` is not read.
      points: (x, y) in frame 0.
      trusted: where `flow` holds, such as `consistency_mask` tells; `trusted[0]` is unread. A point
        that stood on an untrusted pixel counts as occluded from the next frame on: flow alone
        cannot tell when it comes back.

    Returns:
      Tracks that are outside from the frame on in which they leave the picture; both such points
      and occluded ones go on with the flow they stand on, borders continued outwards.
    """
    frames, height, width, _ = flow.shape
    if trusted is None:
        trusted = jnp.ones((frames, height, width), bool)

    start = np.asarray(points, np.float32)
    path, seen = _follow(jnp.asarray(flow[1:], jnp.float32), jnp.asarray(trusted[1:]), start)
    path = np.concatenate([start[:, None], rearrange(np.asarray(path), "t k xy -> k t xy")], axis=1)
    seen = np.pad(np.asarray(seen).T, ((0, 0), (1, 0)), constant_values=True)
    state = np.where(seen, TrackState.VISIBLE, TrackState.OCCLUDED)
    left = np.logical_or.accumulate(~inside(path, height, width), axis=1)
    return Tracks(path, np.where(left, TrackState.OUTSIDE, state))


@jax.jit
def _follow(
    flow: Float[Array, "t h w 2"], trusted: Bool[Array, "t h w"], points: Float[Array, "k 2"]
) -> tuple[Float[Array, "t k 2"], Bool[Array, "t k"]]:
    """Positions after each flow, and whether only trusted flow was used."""
    height, width = flow.shape[1:3]

    def step(
        carry: tuple[Array, Array], frame: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        position, seen = carry
        motion, holds = frame
        column = jnp.clip(jnp.round(position[:, 0]).astype(int), 0, width - 1)
        row = jnp.clip(jnp.round(position[:, 1]).astype(int), 0, height - 1)
        carry = position + _bilinear(motion, position), seen & holds[row, column]
        return carry, carry

    start = points, jnp.ones(len(points), bool)
    return jax.lax.scan(step, start, (flow, trusted))[1]


@jax.jit
def _warp(image: Float[Array, "b h w c"], flow: Float[Array, "b h w 2"]) -> Float[Array, "b h w c"]:
    return jax.vmap(_bilinear)(image, _targets(flow))


def _targets(flow: Float[Array, "*b h w 2"]) -> Float[Array, "*b h w 2"]:
    """Where each pixel goes."""
    height, width = flow.shape[-3:-1]
    x, y = jnp.meshgrid(jnp.arange(width), jnp.arange(height))
    return flow + jnp.stack([x, y], axis=-1)


def _bilinear(image: Float[Array, "h w c"], points: Float[Array, "*n 2"]) -> Float[Array, "*n c"]:
    """Values of the image at points (x, y) between pixels, borders continued outwards."""
    height, width = image.shape[:2]
    x = jnp.clip(points[..., 0], 0, width - 1)
    y = jnp.clip(points[..., 1], 0, height - 1)
    x0, y0 = jnp.floor(x).astype(int), jnp.floor(y).astype(int)
    x1, y1 = jnp.minimum(x0 + 1, width - 1), jnp.minimum(y0 + 1, height - 1)
    wx, wy = (x - x0)[..., None], (y - y0)[..., None]
    top = image[y0, x0] * (1 - wx) + image[y0, x1] * wx
    bottom = image[y1, x0] * (1 - wx) + image[y1, x1] * wx
    return top * (1 - wy) + bottom * wy
