"""Attention over the frames of every pixel by a TPU kernel, on arrays as layers have them.

Frames are few, pixels many: XLA turns queries, keys and values from `[t, l]` to `[l, t]` and back,
pads t to whole tiles, and writes scores of t x t for every pixel and head, which takes ten times
as long as to read the three and write the result. Here eight pixels of all frames are one matrix,
as they lie in memory: their scores are one product, of which those between different pixels are
left out. That is eight times the arithmetic asked for, and still little beside the rest of a layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from nuwa_jax.models.tpu import LANES, PACKED, SUBLANES, dot

# Pixels of a step: as many as leave room for the seven arrays of the backward pass, each held
# twice, and for scores, in the 16 MiB that a v4 has in its core.
PIXELS = (64, 32, 16)
STEP_BYTES = 2**19  # of one array
MAX_FRAMES = 32  # scores of 256 x 256
NAME = "attention_over_time"  # of the kernels; nuwa_jax/watching/flops.py counts by it


def fits(query: Float[Array, "b t l c"], heads: int) -> bool:
    """Whether the kernel computes this: bfloat16, not too many frames, heads in whole registers."""
    width = query.shape[-1] // heads
    return (
        query.dtype == jnp.bfloat16
        and 1 < query.shape[1] <= MAX_FRAMES
        and (LANES % width == 0 or width % LANES == 0)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attention_over_time(
    query: Float[Array, "b t l c"],
    key: Float[Array, "b t l c"],
    value: Float[Array, "b t l c"],
    heads: int,
    interpret: bool = False,
) -> Float[Array, "b t l c"]:
    """Softmax attention scaled by 1/sqrt(d) over t, at every l and for every head of c / heads = d.

    Args:
      query: bfloat16, of a shape that `fits`.
      key: as many frames.
      value: what is averaged.
      heads: neighbouring channels are one head's.
      interpret: run the kernel step by step on any backend, for tests.
    """
    return _call(_forward, (query, key, value), 1, heads, interpret)[0]


def _attend(q: Array, k: Array, v: Array, heads: int, interpret: bool) -> tuple[Array, tuple]:
    return attention_over_time(q, k, v, heads, interpret), (q, k, v)


def _attend_backward(heads: int, interpret: bool, kept: tuple, change: Array) -> tuple[Array, ...]:
    return tuple(_call(_backward, (*kept, change), 3, heads, interpret))


attention_over_time.defvjp(_attend, _attend_backward)


def _call(
    body: Callable[..., list[Array]],
    arrays: tuple[Array, ...],
    results: int,
    heads: int,
    interpret: bool,
) -> list[Array]:
    """`body` of every eight pixels and every register's width of heads."""
    b, t, l, c = arrays[0].shape
    width = c // heads
    lanes = max(LANES, width)
    # Channels that are not whole registers are fetched all at once, and cut within the core.
    fetched = lanes if c % lanes == 0 else c
    held = -(-fetched // LANES) * LANES * t * 2  # bytes of a pixel
    pixels = next((n for n in PIXELS if n * held <= STEP_BYTES), PIXELS[-1])
    pixels = min(pixels, -(-l // PACKED) * PACKED)
    block = pl.BlockSpec((1, t, pixels, fetched), lambda i, j, k: (i, 0, j, k))
    products = {1: 2, 3: 5}[results]
    rows = t * SUBLANES
    groups = b * heads * pl.cdiv(l, SUBLANES)
    return pl.pallas_call(
        functools.partial(_kernel, body, width, l, len(arrays)),
        grid=(b, pl.cdiv(l, pixels), c // fetched),
        in_specs=[block] * len(arrays),
        out_specs=[block] * results,
        out_shape=[jax.ShapeDtypeStruct((b, t, l, c), arrays[0].dtype)] * results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * groups * rows * rows * lanes,
            transcendentals=groups * rows * rows,
            bytes_accessed=(len(arrays) + results) * arrays[0].nbytes,
        ),
        interpret=interpret,
        name=f"{NAME}_{body.__name__.strip('_')}",
    )(*arrays)


def _kernel(
    body: Callable[..., list[Array]], width: int, length: int, count: int, *refs: jax.Ref
) -> None:
    inputs, outputs = refs[:count], refs[count:]
    _, t, pixels, channels = inputs[0].shape
    rows = t * SUBLANES
    lanes = max(LANES, width)
    start = pl.program_id(1) * pixels
    place_of = _iota((rows, rows), 0) ^ _iota((rows, rows), 1)  # SUBLANES is a power of two
    same_pixel = place_of & (SUBLANES - 1) == 0

    def tile(i: Array, _: None) -> None:
        place = pl.ds(pl.multiple_of(i * PACKED, PACKED), PACKED)
        for first in range(0, channels, lanes):
            cut = slice(first, min(first + lanes, channels))
            whole = [ref[0, :, place, cut] for ref in inputs]
            if length % pixels:
                # Beyond the picture anything may be read, and 0 x NaN is NaN.
                real = start + i * PACKED + _iota((1, PACKED, 1), 1) < length
                whole = [jnp.where(real, x, 0) for x in whole]
            parts = []
            for half in range(2):
                part = slice(half * SUBLANES, (half + 1) * SUBLANES)
                eight = [x.astype(jnp.float32)[:, part].reshape(rows, -1) for x in whole]
                found = body(*eight, same_pixel, width)
                parts.append([out.reshape(t, SUBLANES, -1) for out in found])
            for ref, *halves in zip(outputs, *parts, strict=True):
                ref[0, :, place, cut] = jnp.concatenate(halves, axis=1).astype(ref.dtype)

    jax.lax.fori_loop(0, pixels // PACKED, tile, None)


def _forward(q: Array, k: Array, v: Array, same_pixel: Array, width: int) -> list[Array]:
    """Of `[(t 8) c]`, c being one register's heads or fewer."""
    out = jnp.zeros(q.shape, jnp.float32)
    k = k.astype(jnp.bfloat16)
    for of_head in _heads(q.shape[-1], width):
        weights, total = _weights(of_head(q), k, same_pixel, width)
        weights = weights.astype(jnp.bfloat16)
        out += dot(weights, of_head(v).astype(jnp.bfloat16), (1, 0)) / total
    return [out]


def _backward(
    q: Array, k: Array, v: Array, change: Array, same_pixel: Array, width: int
) -> list[Array]:
    to_q, to_k, to_v = (jnp.zeros(q.shape, jnp.float32) for _ in range(3))
    k16, v16 = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    scale = 1 / math.sqrt(width)
    for of_head in _heads(q.shape[-1], width):
        weights, total = _weights(of_head(q), k16, same_pixel, width)
        weights = weights / total
        own = of_head(change).astype(jnp.bfloat16)
        to_weights = dot(own, v16, (1, 1))
        common = jnp.sum(weights * to_weights, -1, keepdims=True)
        to_scores = (weights * (to_weights - common) * scale).astype(jnp.bfloat16)
        to_q += dot(to_scores, of_head(k).astype(jnp.bfloat16), (1, 0))
        to_k += dot(to_scores, of_head(q).astype(jnp.bfloat16), (0, 0))
        to_v += dot(weights.astype(jnp.bfloat16), own, (0, 0))
    return [to_q, to_k, to_v]


def _heads(channels: int, width: int) -> list[Callable[[Array], Array]]:
    """For each head, what makes all channels zero but its own: sums over heads keep them apart."""
    if channels == width:
        return [lambda x: x]
    lane = _iota((1, channels), 1)
    masks = [(lane >= first) & (lane < first + width) for first in range(0, channels, width)]
    return [lambda x, own=own: jnp.where(own, x, 0) for own in masks]


def _weights(q: Array, k: Array, same_pixel: Array, width: int) -> tuple[Array, Array]:
    """The softmax's numerators `[q k]`, and their sums `[q 1]`."""
    scores = dot((q / math.sqrt(width)).astype(jnp.bfloat16), k, (1, 1))
    scores = jnp.where(same_pixel, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
