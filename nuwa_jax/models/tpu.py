"""What our kernels for TPUs share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

LANES, SUBLANES = 128, 8  # of a register, in float32
PACKED = 2 * SUBLANES  # rows of a tile in bfloat16


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The product of two matrices over an axis of each, added up in float32."""
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def normal_cdf(x: Array) -> Array:
    """Of the standard normal distribution: x times it is the exact GELU."""
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
