"""Products with weights are those of Flax and of float64, in whichever form a platform has them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from micro_model import randomize

from nuwa_jax.models import layers, products

KEY = jax.random.key(0)


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_gradients(layer, params, x):
    """What a layer gives, and the gradients to its parameters and input of one weighted sum."""

    def run(params, x):
        out = layer.apply(params, x)
        out = jnp.concatenate(out, -1) if isinstance(out, list) else out
        return jnp.sum(out.astype(jnp.float32) * normal(*out.shape, seed=1)), out

    grads, out = jax.grad(run, argnums=(0, 1), has_aux=True)(params, x)
    return jax.tree.leaves((out, grads))


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        a, b = (np.asarray(part, np.float64) for part in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((3, 3), dict(padding=1)),
        ((3, 3), dict(padding=0)),
        ((3, 2), dict(padding=((0, 1), (2, 0)))),
        ((1, 1), dict(padding=0)),
        ((3, 3), dict(padding=1, strides=(2, 2))),
        ((3, 3), dict(padding="SAME")),
        ((3, 3), dict(padding=2, kernel_dilation=2)),
        ((3, 3), dict(padding=1, feature_group_count=2)),
        ((3,), dict(padding=1)),
    ],
    ids=str,
)
def test_convolutions_and_their_gradients_are_those_of_flax(batch, size, options):
    x = normal(batch, *(5, 8)[: len(size)], 4)
    ours, theirs = (kind(6, size, **options) for kind in (products.Conv, nn.Conv))
    params = randomize(jax.eval_shape(theirs.init, KEY, x), 2)
    assert_same(with_gradients(ours, params, x), with_gradients(theirs, params, x), 1e-5)


def test_gradients_of_convolutions_in_half_precision_are_summed_in_full():
    """Of 4,096 ones a sum in bfloat16 is 256 or less, as it does not grow from there by one."""
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    conv = products.Conv(1, (3, 3), padding=1, dtype=jnp.bfloat16)
    params = conv.init(KEY, x)
    grads = jax.grad(lambda p: conv.apply(p, x).astype(jnp.float32).sum())(params)["params"]
    assert grads["kernel"][1, 1, 0, 0] == 64 * 64
    assert grads["kernel"][0, 1, 0, 0] == 4032 == 63 * 64
    assert grads["bias"] == 64 * 64


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (1, 3, 5, 4), (2, 3, 5, 2, 4)])
def test_dense_layers_are_those_of_flax_over_any_axes(platform, shape, monkeypatch):
    monkeypatch.setattr(products, "platform", lambda: platform)
    x = normal(*shape)
    params = randomize(jax.eval_shape(nn.Dense(6).init, KEY, x), 3)
    expected = with_gradients(nn.Dense(6), params, x)
    assert_same(with_gradients(products.Dense(6), params, x), expected, 1e-5)
    assert_same(with_gradients(products.DenseParts(6, 3), params, x), expected, 1e-5)


def test_on_a_tpu_only_whole_tiles_are_merged(monkeypatch):
    x = normal(2, 3, 5, 4)
    assert products.as_matrix(x).shape == (30, 4)
    monkeypatch.setattr(products, "platform", lambda: "tpu")
    assert products.as_matrix(x).shape == (6, 5, 4)
    np.testing.assert_array_equal(products.as_matrix(x), rearrange(x, "b t l c -> (b t) l c"))
    assert products.as_matrix(x[0, 0]).shape == (5, 4)
    assert products.as_matrix(x[0, 0, 0]).shape == (1, 4)


def test_the_gated_layer_is_the_exact_gelu_times_the_value():
    value, gate = normal(7, 5), 3 * normal(7, 5, seed=1)
    change = normal(7, 5, seed=2)
    out, back = jax.vjp(layers.gated, value, gate)
    v, g, d = (np.asarray(x, np.float64) for x in (value, gate, change))
    cdf = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))(g)
    density = np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)
    assert_same([out, *back(change)], [v * g * cdf, d * g * cdf, d * v * (cdf + g * density)], 1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_gated_layer_in_half_precision_keeps_its_two_arguments_alone(batch):
    value, gate = (normal(batch, 3, 5, dtype=jnp.bfloat16, seed=seed) for seed in (0, 1))
    out, back = jax.vjp(layers.gated, value, gate)
    kept = [leaf for leaf in jax.tree.leaves(back) if hasattr(leaf, "dtype")]
    assert sorted((x.shape, x.dtype) for x in kept) == [((batch, 3, 5), jnp.bfloat16)] * 2
    wide = layers.gated(value.astype(jnp.float32), gate.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
