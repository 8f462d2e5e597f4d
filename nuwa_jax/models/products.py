"""Products with weights, matrix products and convolutions, as each platform runs them fastest.

Where activations are bfloat16, biases are added in float32 (`nuwa_jax.models.layers` says why).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nuwa_jax.models.partition import divides_frames_and_heads, platform

ZERO_INIT = nn.initializers.zeros_init()
LECUN = nn.initializers.lecun_normal()


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` as float32, or as it is where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _all_but_bias(
    inputs: Array, kernel: Array, bias: Array | None, *, dtype: Any, **more: Any
) -> tuple[Array, Array, Array | None]:
    """As Flax's layers promote their arrays, with the bias left as it is stored."""
    inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel, dtype=dtype, **more)
    return inputs, kernel, bias


def as_matrix(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """`x` with fewer leading axes, as products with weights take it fastest.

    On a TPU the last two are kept: arrays lie in tiles of these, and to merge another axis with one
    that is not a whole number of them is a copy. Elsewhere they are rows, to merge which is free:
    with several leading axes XLA on CPU takes 2.6 times as long for the weight's gradient.
    """
    kept = 2 if platform() == "tpu" and x.ndim > 2 else 1
    return x.reshape(-1, *x.shape[-kept:])


class Dense(nn.Dense):
    """`nn.Dense` of `as_matrix` of its inputs, the bias added in float32."""

    dtype: Any = jnp.float32
    promote_dtype: Any = _all_but_bias

    @nn.compact
    def __call__(self, inputs: Float[Array, "... c"]) -> Float[Array, "... features"]:
        out = super().__call__(as_matrix(inputs)).astype(self.dtype)
        return out.reshape(*inputs.shape[:-1], self.features)


class DenseParts(nn.Module):
    """`Dense` whose features come in equal parts, each by a product of its own.

    To cut them out of one product's result would copy them, and so would their gradients.
    """

    features: int
    parts: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "... c"]) -> list[Float[Array, "... part"]]:
        kernel = self.param("kernel", LECUN, (inputs.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", ZERO_INIT, (self.features,))
        x = as_matrix(inputs).astype(self.dtype)
        kernels, biases = jnp.split(kernel, self.parts, -1), jnp.split(bias, self.parts)
        outs = [(x @ k + b).astype(self.dtype) for k, b in zip(kernels, biases, strict=True)]
        return [out.reshape(*inputs.shape[:-1], -1) for out in outs]


def _convolve(
    x: Array, kernel: Array, strides: Any, padding: Any, *, dimension_numbers: Any, **more: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, of which the weight's gradient may be a product per tap.

    On a CPU that is twice as fast for pictures. On a mesh that divides both frames and heads, XLA's
    own gradient is wrong: where rows or frames are divided, it adds up one sum for every device of
    the other axis, so that it is as many times too large (jaxlib 0.10.2, without an error).
    """
    others = (more["lhs_dilation"], more["rhs_dilation"], (more["feature_group_count"],))
    plain = kernel.ndim in (3, 4) and all(factor == 1 for factors in others for factor in factors)
    pictures = kernel.ndim == 4 and not isinstance(padding, str) and set(strides) == {1}
    if plain and (divides_frames_and_heads() or (platform() == "cpu" and pictures)):
        if isinstance(padding, str):
            window = kernel.shape[:-2]
            padding = jax.lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
        return _convolve_by_taps(x, kernel, tuple(strides), tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimension_numbers, **more
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_by_taps(
    x: Float[Array, "n ... c"], kernel: Float[Array, "... c c2"], strides: Any, padding: Any
) -> Float[Array, "n ... c2"]:
    return _channels_last(x, kernel, strides, padding)


def _channels_last(x: Array, kernel: Array, strides: Any, padding: Any) -> Array:
    window = "HW"[: x.ndim - 2]
    numbers = (f"N{window}C", f"{window}IO", f"N{window}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def _taps_forward(
    x: Array, kernel: Array, strides: Any, padding: Any
) -> tuple[Array, tuple[Array, Array]]:
    return _channels_last(x, kernel, strides, padding), (x, kernel)


def _taps_backward(
    strides: Any, padding: Any, kept: tuple[Array, Array], change: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    transposed = jax.linear_transpose(lambda x: _channels_last(x, kernel, strides, padding), x)
    (by_x,) = transposed(change)
    rows = change.reshape(-1, change.shape[-1]).T
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def tap(*first: int) -> Array:
        steps = zip(first, change.shape[1:-1], strides, strict=True)
        window = [slice(i, i + step * (size - 1) + 1, step) for i, size, step in steps]
        seen = padded[(slice(None), *window)].reshape(-1, x.shape[-1])
        return jnp.dot(rows, seen, preferred_element_type=jnp.float32).T.astype(kernel.dtype)

    taps = [tap(*first) for first in np.ndindex(*kernel.shape[:-2])]
    return by_x, jnp.stack(taps).reshape(kernel.shape)


_convolve_by_taps.defvjp(_taps_forward, _taps_backward)


class Conv(nn.Conv):
    """`nn.Conv` with the bias added in float32."""

    dtype: Any = jnp.float32
    promote_dtype: Any = _all_but_bias
    conv_general_dilated: Any = _convolve

    @nn.compact
    def __call__(self, inputs: Float[Array, "n ... c"]) -> Float[Array, "n ... features"]:
        return super().__call__(inputs).astype(self.dtype)
