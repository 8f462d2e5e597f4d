"""Products with weights, matrix products and convolutions, as each platform runs them fastest.

Where activations are bfloat16, biases are added in float32 (`nuwa_jax.models.layers` says why).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nuwa_jax.models.partition import by_samples, platform

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
    """`jax.lax.conv_general_dilated`; on a CPU the weight's gradient is a product for every tap."""
    others = (more["lhs_dilation"], more["rhs_dilation"], (more["feature_group_count"],))
    plain = all(factor == 1 for factors in (strides, *others) for factor in factors)
    if platform() == "cpu" and plain and kernel.ndim == 4 and not isinstance(padding, str):
        return _convolve_by_taps(x, kernel, tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimension_numbers, **more
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_by_taps(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c c2"], padding: Any
) -> Float[Array, "n h2 w2 c2"]:
    return _of_pictures(x, kernel, padding)


def _of_pictures(x: Array, kernel: Array, padding: Any) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)


def _taps_forward(x: Array, kernel: Array, padding: Any) -> tuple[Array, tuple[Array, Array]]:
    return _of_pictures(x, kernel, padding), (x, kernel)


def _taps_backward(padding: Any, kept: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    """XLA's own form is a convolution with a window as large as the picture, at half the speed."""
    x, kernel = kept
    (by_x,) = jax.linear_transpose(lambda x: _of_pictures(x, kernel, padding), x)(change)
    _, h, w, features = change.shape
    rows = change.reshape(-1, features).T
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def tap(i: int, j: int) -> Array:
        seen = padded[:, i : i + h, j : j + w].reshape(-1, x.shape[-1])
        return jnp.dot(rows, seen, preferred_element_type=jnp.float32).T.astype(kernel.dtype)

    height, width = kernel.shape[:2]
    by_kernel = jnp.stack([jnp.stack([tap(i, j) for j in range(width)]) for i in range(height)])
    return by_x, by_kernel


_convolve_by_taps.defvjp(_taps_forward, _taps_backward)


class Conv(nn.Conv):
    """`nn.Conv` with the bias added in float32."""

    dtype: Any = jnp.float32
    promote_dtype: Any = _all_but_bias
    conv_general_dilated: Any = _convolve

    @nn.compact
    def __call__(self, inputs: Float[Array, "n ... c"]) -> Float[Array, "n ... features"]:
        return by_samples(super().__call__(by_samples(inputs))).astype(self.dtype)
