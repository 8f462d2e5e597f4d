"""A gated feed-forward layer with its norm and what it is added to, by a TPU kernel.

XLA writes the hidden channels of such a layer, eight times as many as its input's, to memory, and
reads them again, in the backward pass several times; where channels are few that takes longer than
to compute them. Here they never leave the core, and are made anew for the backward pass.

Arrays are `[n c l]`, with pixels in the lanes: that is how XLA lays out what has too few channels
to fill registers with. Where channels do fill them, its own products are as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from nuwa_jax.models.tpu import LANES, PACKED, dot, normal_cdf

PIXELS = 256  # of a step
HIDDEN = 256  # hidden channels that are in registers at a time
# Kernels and their gradients stay in the core throughout: of more channels, or with more pixels, a
# v4's would not hold them (16 MiB; a v5p's 64, others' 128).
MAX_CHANNELS = 320
CORE_BYTES = 48 * 2**20
EPS = 1e-5  # of the norm, as `nuwa_jax.models.layers.layer_norm` has it
NAME = "fed_forward"  # of the kernels; nuwa_jax/watching/flops.py counts by it

Weights = tuple[Array, Array, Array, Array, Array, Array]


def fits(x: Float[Array, "... l c"], hidden: int) -> bool:
    """Whether the kernel computes this, and is worth it: channels that do not fill registers."""
    channels = x.shape[-1]
    return (
        x.dtype == jnp.bfloat16
        and channels % LANES != 0
        and channels % PACKED == 0
        and channels <= MAX_CHANNELS
        and hidden % HIDDEN == 0
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def fed_forward(
    x: Float[Array, "n c l"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "c 2*h"],
    kernel_bias: Float[Array, " 2*h"],
    out_kernel: Float[Array, "h c"],
    out_bias: Float[Array, " c"],
    interpret: bool = False,
) -> Float[Array, "n c l"]:
    """`x + (value * gelu(gate)) @ out_kernel + out_bias`, GEGLU (arXiv 2002.05202) of a LayerNorm.

    Args:
      x: bfloat16, of a shape that `fits`.
      scale: of the norm over c, float32.
      bias: of the norm.
      kernel: of `[value | gate]`, bfloat16.
      kernel_bias: added to both, float32.
      out_kernel: bfloat16.
      out_bias: float32.
      interpret: run the kernel step by step on any backend, for tests.
    """
    weights = (scale, bias, kernel, kernel_bias, out_kernel, out_bias)
    return _call(_forward, [x], weights, [], interpret)[0]


def _fed_forward(x: Array, *rest: Array | bool) -> tuple[Array, tuple[Array, Weights]]:
    # By the function itself, which unlike a kernel is left out of what is computed anew if nothing
    # asks for it there.
    return fed_forward(x, *rest), (x, rest[:-1])


def _fed_backward(interpret: bool, kept: tuple[Array, Weights], change: Array) -> tuple[Array, ...]:
    x, weights = kept
    hidden, c = weights[4].shape
    # Of vectors the sums of every lane.
    sums = [(c, LANES), (c, LANES), (2 * hidden, c), (2 * hidden, LANES), (hidden, c), (c, LANES)]
    by_x, *found = _call(_backward, [x, change], weights, sums, interpret)
    found = [
        (a.T if i == 2 else a) if w.ndim == 2 else a.sum(-1)
        for i, (a, w) in enumerate(zip(found, weights, strict=True))
    ]
    return by_x, *(a.astype(w.dtype) for a, w in zip(found, weights, strict=True))


fed_forward.defvjp(_fed_forward, _fed_backward)


def _call(
    body: Callable[..., None],
    arrays: list[Array],
    weights: Weights,
    sums: list[tuple[int, int]],
    interpret: bool,
) -> list[Array]:
    """`body` of so many pixels at a time; `sums` are the shapes of what it adds up over all."""
    n, c, l = arrays[0].shape
    hidden = weights[4].shape[0]
    tiles = pl.cdiv(l, PIXELS)
    # Products have hidden channels in their rows, so that pixels stay in the lanes.
    columns = [w.T if w is weights[2] else w if w.ndim == 2 else w[:, None] for w in weights]
    products = 16 if sums else 6
    moved = [*arrays, arrays[0], *columns, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in sums)]

    def whole(shape: tuple[int, int]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i, j: (0, 0))

    block = pl.BlockSpec((1, c, PIXELS), lambda i, j: (i, 0, j))
    return pl.pallas_call(
        functools.partial(body, l),
        grid=(n, tiles),
        in_specs=[*[block] * len(arrays), *(whole(w.shape) for w in columns)],
        out_specs=[block, *map(whole, sums)],
        out_shape=[
            jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
            *(jax.ShapeDtypeStruct(s, jnp.float32) for s in sums),
        ],
        compiler_params=pltpu.CompilerParams(
            # What is added up over all steps needs them one after the other.
            dimension_semantics=("arbitrary" if sums else "parallel",) * 2,
            vmem_limit_bytes=CORE_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * n * tiles * PIXELS * c * hidden,
            transcendentals=(2 if sums else 1) * n * l * hidden,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved),
        ),
        interpret=interpret,
        name=f"{NAME}_{body.__name__.strip('_')}",
    )(*arrays, *columns)


def _forward(
    length: int,
    x: jax.Ref,
    scale: jax.Ref,
    bias: jax.Ref,
    kernel: jax.Ref,
    kernel_bias: jax.Ref,
    out_kernel: jax.Ref,
    out_bias: jax.Ref,
    out: jax.Ref,
) -> None:
    del length  # what lies beyond it stays in its own columns
    wide = x[0].astype(jnp.float32)
    normed, _ = _norm(wide)
    y = (normed * scale[...] + bias[...]).astype(x.dtype)

    def add(rows: tuple[pl.Slice, pl.Slice], total: Array) -> Array:
        value, gate = (dot(kernel[part], y, (1, 0)) + kernel_bias[part] for part in rows)
        hidden = (value * gate * normal_cdf(gate)).astype(y.dtype)
        return total + dot(out_kernel[rows[0]], hidden, (0, 0))

    out[0] = _over_hidden(out_kernel.shape[0], add, wide + out_bias[...]).astype(out.dtype)


def _backward(
    length: int,
    x: jax.Ref,
    change: jax.Ref,
    scale: jax.Ref,
    bias: jax.Ref,
    kernel: jax.Ref,
    kernel_bias: jax.Ref,
    out_kernel: jax.Ref,
    out_bias: jax.Ref,
    by_x: jax.Ref,
    by_scale: jax.Ref,
    by_bias: jax.Ref,
    by_kernel: jax.Ref,
    by_kernel_bias: jax.Ref,
    by_out_kernel: jax.Ref,
    by_out_bias: jax.Ref,
) -> None:
    del out_bias

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def start() -> None:
        for ref in (by_scale, by_bias, by_kernel, by_kernel_bias, by_out_kernel, by_out_bias):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    dtype, pixels = x.dtype, x.shape[2]
    wide, wide_change = x[0].astype(jnp.float32), change[0].astype(jnp.float32)
    if length % pixels:
        # Beyond the picture anything may be read, and sums are over all.
        lane = pl.program_id(1) * pixels + jax.lax.broadcasted_iota(jnp.int32, (1, pixels), 1)
        wide, wide_change = (jnp.where(lane < length, a, 0) for a in (wide, wide_change))
    normed, inverse = _norm(wide)
    y, d = (normed * scale[...] + bias[...]).astype(dtype), wide_change.astype(dtype)
    y_turned, d_turned = y.T, d.T

    def add(rows: tuple[pl.Slice, pl.Slice], total: Array) -> Array:
        value, gate = (dot(kernel[part], y, (1, 0)) + kernel_bias[part] for part in rows)
        by_hidden = dot(out_kernel[rows[0]], d, (1, 0))
        cdf = normal_cdf(gate)
        gelu = gate * cdf
        by_out_kernel[rows[0]] += dot((value * gelu).astype(dtype), d_turned, (1, 0))
        density = jnp.exp(-0.5 * gate**2) * (2 * jnp.pi) ** -0.5
        both = (by_hidden * gelu, by_hidden * value * (cdf + gate * density))
        for part, by in zip(rows, both, strict=True):
            by_kernel_bias[part] += _by_lane(by)
            by = by.astype(dtype)
            by_kernel[part] += dot(by, y_turned, (1, 0))
            total += dot(kernel[part], by, (0, 0))
        return total

    by_y = _over_hidden(out_kernel.shape[0], add, jnp.zeros(wide.shape, jnp.float32))
    by_out_bias[...] += _by_lane(wide_change)
    by_bias[...] += _by_lane(by_y)
    by_scale[...] += _by_lane(by_y * normed)
    by_normed = by_y * scale[...]
    mean = by_normed.mean(0, keepdims=True)
    along = (by_normed * normed).mean(0, keepdims=True)
    by_x[0] = (wide_change + inverse * (by_normed - mean - normed * along)).astype(dtype)


def _norm(x: Float[Array, "c p"]) -> tuple[Float[Array, "c p"], Float[Array, "1 p"]]:
    """What a LayerNorm scales, and the inverse of the deviations (`layers.fast_variance`)."""
    mean = x.mean(0, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(0, keepdims=True) - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + EPS)
    return (x - mean) * inverse, inverse


def _over_hidden(hidden: int, add: Callable[..., Array], total: Array) -> Array:
    """`add` of the rows of values and of gates, some hidden channels at a time."""

    def step(i: Array, total: Array) -> Array:
        first = pl.multiple_of(i * HIDDEN, HIDDEN)
        rows = (pl.ds(first, HIDDEN), pl.ds(pl.multiple_of(hidden + first, HIDDEN), HIDDEN))
        return add(rows, total)

    return jax.lax.fori_loop(0, hidden // HIDDEN, step, total)


def _by_lane(x: Float[Array, "c p"]) -> Float[Array, "c lanes"]:
    """Sums of the columns that lie in the same lane."""
    return sum(x[:, first : first + LANES] for first in range(0, x.shape[1], LANES))
