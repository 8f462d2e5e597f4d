"""Norms against float64, of half precision too, where a variance is taken in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuwa_jax.models import layers

SHAPE = (2, 5, 33, 17, 24)


def exact(x, axes, groups):
    """Without scale and bias."""
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    mean = grouped.mean(axes, keepdims=True)
    deviation = np.sqrt(grouped.var(axes, keepdims=True) + 1e-5)
    return ((grouped - mean) / deviation).reshape(x.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("mean", [0, 20, -300], ids=str)
@pytest.mark.parametrize("kind", ["group", "layer"])
def test_norms_are_those_of_float64_however_far_from_zero(kind, mean, dtype):
    """Of means of 300 deviations, which half precision has nearly rounded away, as well."""
    x = jnp.asarray(np.random.default_rng(0).normal(mean, 1, SHAPE), dtype)
    if kind == "group":
        norm = layers.group_norm(24, 1e-5, groups=8, name="n", dtype=dtype)
        axes, groups = (1, 2, 3, 5), 8
    else:
        norm, axes, groups = layers.layer_norm("n", dtype), (5,), 1
    out, back = jax.vjp(lambda x: norm.apply(norm.init(jax.random.key(0), x), x), x)
    expected = exact(np.asarray(x, np.float64), axes, groups)
    # As far off as the last digit of the result, at most 4, and of sums: of the values, or, where a
    # variance is a difference, of their squares.
    bound = 1e-5 + 2.0**-22 * abs(mean) if dtype == jnp.float32 else 0.02 + 2.0**-21 * mean**2
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=bound)
    (gradient,) = back(jnp.ones_like(out))
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_a_variance_is_never_negative():
    """Of equal values the difference of two equal sums may be anything near zero."""
    x = jnp.full((1, 7, 9, 8), 1000.0, jnp.bfloat16)
    for norm in (
        layers.group_norm(8, 1e-5, groups=2, name="n", dtype=jnp.bfloat16),
        layers.layer_norm("n", jnp.bfloat16),
    ):
        out = norm.apply(norm.init(jax.random.key(0), x), x)
        assert np.isfinite(np.asarray(out, np.float32)).all()


def test_half_precision_alone_takes_its_variance_in_one_pass():
    assert layers.fast_variance(jnp.bfloat16)
    assert not layers.fast_variance(jnp.float32)
