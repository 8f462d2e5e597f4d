"""The kernel of attention over frames: its numbers, which attention it computes, what it is asked.

Here it is run step by step, with NaN where a block reaches beyond an array; `kernels_run.py`
runs it on a mesh, and compiles it for a TPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from micro_model import randomize

from nuwa_jax.models import attention, layers, over_time, partition, products, splash
from nuwa_jax.watching.flops import model_flops


def halves(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def exact(heads, q, k, v, weight):
    """Output and gradients in float64."""
    b = len(q)
    q, k, v, weight = (
        rearrange(np.asarray(x, np.float64), "b t l (e d) -> b l e t d", e=heads)
        for x in (q, k, v, weight)
    )
    scale = q.shape[-1] ** -0.5
    shares = np.exp(np.einsum("bletd,blesd->blets", q, k) * scale)
    shares /= shares.sum(-1, keepdims=True)
    to_shares = np.einsum("bletd,blesd->blets", weight, v)
    to_scores = shares * (to_shares - (shares * to_shares).sum(-1, keepdims=True)) * scale
    found = (
        shares @ v,
        to_scores @ k,
        to_scores.swapaxes(-1, -2) @ q,
        shares.swapaxes(-1, -2) @ weight,
    )
    return [rearrange(x, "b l e t d -> b t l (e d)", b=b) for x in found]


# Channels in whole registers and not, heads narrower than one and as wide; one and several blocks
# of pixels, whole ones and parts.
@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((1, 14, 45, 320), 5),
        ((2, 3, 80, 256), 4),
        ((1, 5, 130, 128), 1),
        ((2, 7, 17, 64), 2),
        ((1, 2, 16, 256), 1),
    ],
    ids=str,
)
def test_it_is_softmax_attention_forward_and_backward(shape, heads):
    q, k, v, weight = (halves(*shape, seed=seed) for seed in range(4))
    assert over_time.fits(q, heads)
    out, back = jax.vjp(lambda *x: over_time.attention_over_time(*x, heads, True), q, k, v)
    for ours, true in zip((out, *back(weight)), exact(heads, q, k, v, weight), strict=True):
        assert ours.dtype == jnp.bfloat16 and ours.shape == shape
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), true, rtol=0, atol=0.01 * np.abs(true).max()
        )


def test_large_scores_do_not_overflow():
    q = 100 * halves(1, 3, 16, 64)
    out = over_time.attention_over_time(q, q, q, 1, True)
    np.testing.assert_array_equal(out, q)  # every frame attends to itself alone


@pytest.mark.parametrize(
    ("shape", "heads", "dtype", "fits"),
    [
        ((1, 14, 20, 320), 5, jnp.bfloat16, True),
        ((1, 14, 20, 320), 5, jnp.float32, False),
        ((1, 1, 20, 320), 5, jnp.bfloat16, False),
        ((1, 33, 20, 320), 5, jnp.bfloat16, False),
        ((1, 14, 20, 320), 10, jnp.bfloat16, True),
        ((1, 14, 20, 320), 4, jnp.bfloat16, False),  # heads of 80
        ((1, 14, 20, 512), 2, jnp.bfloat16, True),
        ((1, 14, 20, 384), 2, jnp.bfloat16, False),  # heads of 192
    ],
    ids=str,
)
def test_what_it_does_not_compute_is_left_to_xla(shape, heads, dtype, fits):
    assert over_time.fits(jax.ShapeDtypeStruct(shape, dtype), heads) is fits


@pytest.mark.parametrize("over", ["frame", "time"])
def test_a_layer_gives_the_same_with_kernels_and_without(over, monkeypatch):
    """By the platform's kernels as they are chosen, padded and cut on a TPU."""
    monkeypatch.setattr(attention, "DIRECT_SCORES", 2000)
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    monkeypatch.setattr(splash, "MIN_KEYS", 16)
    x = halves(2, 3, 70, 128)
    if over == "frame":
        x = x.reshape(6, 70, 128)
    layer = layers.Attention(2, dtype=jnp.bfloat16)
    params = randomize(jax.eval_shape(layer.init, jax.random.key(0), x), 1)

    def run():
        def loss(params, x):
            out = layer.apply(params, x)
            return jnp.sum(out.astype(jnp.float32) * halves(*out.shape, seed=2)), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return jax.tree.leaves((out, grads))

    plain = run()
    calls = []

    def interpreted(function):
        def call(*args, **kwargs):
            calls.append(kwargs.get("length"))
            return function(*args, **kwargs, interpret=True)

        return call

    for module in (attention, products, partition):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "kernel_over_time", interpreted(attention.kernel_over_time))
    monkeypatch.setattr(splash, "splash_attention", interpreted(splash.splash_attention))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    by_kernels = run()
    assert calls == ([70] if over == "frame" else [None])
    for ours, other in zip(by_kernels, plain, strict=True):
        ours, other = (np.asarray(part, np.float64) for part in (ours, other))
        np.testing.assert_allclose(ours, other, rtol=0, atol=0.02 * np.abs(other).max())


def test_padding_is_for_tpus_and_many_scores(monkeypatch):
    assert attention.padding(halves(1, 2880, 64), 1) == 0
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert attention.padding(halves(1, 2880, 64), 1) == 192
    assert attention.padding(halves(1, 3072, 64), 1) == 0
    assert attention.padding(halves(1, 180, 64), 1) == 0
    assert attention.padding(halves(1, 720, 64), 1) == 48
    with attention.implementation("xla"):
        assert attention.padding(halves(1, 720, 64), 1) == 0


@pytest.mark.parametrize("lq", [20, 70])
def test_keys_beyond_the_length_are_not_attended_to(lq, monkeypatch):
    monkeypatch.setattr(attention, "DIRECT_SCORES", 2000)
    q, k, v = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(2, n, 2, 8)), jnp.float32)
        for seed, n in enumerate((lq, 50, 50))
    )
    expected = attention.dot_product_attention(q, k[:, :41], v[:, :41])
    np.testing.assert_allclose(
        attention.dot_product_attention(q, k, v, length=41), expected, atol=1e-6
    )
    by_kernel = splash.splash_attention(q, k, v, length=41, interpret=True)
    np.testing.assert_allclose(by_kernel, expected, atol=1e-5)
    with pytest.raises(ValueError, match="a mask or a length"):
        attention.dot_product_attention(q, k, v, mask=jnp.ones((1, 1, 1, 50), bool), length=41)


def test_padding_is_not_counted_as_arithmetic(monkeypatch):
    """Forward, backward and computed again; but for the last of attention's chunks, of less."""
    monkeypatch.setattr(attention, "DIRECT_SCORES", 2000)
    monkeypatch.setattr(splash, "MIN_KEYS", 16)
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    x = jax.ShapeDtypeStruct((2, 70, 128), jnp.bfloat16)
    layer = layers.Attention(2, dtype=jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def counted():
        def loss(params, x):
            return layer.apply(params, x).astype(jnp.float32).sum()

        return model_flops(jax.checkpoint(jax.grad(loss, (0, 1))), params, x)

    plain = counted()
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert attention.padding(jnp.zeros(x.shape, x.dtype), 2) == 58
    jax.clear_caches()
    padded = str(jax.make_jaxpr(lambda p, x: layer.apply(p, x))(params, x))
    assert "[2,128,128]" in padded and "[2,70,128]" in padded
    assert counted() == pytest.approx(plain, rel=1e-3)


def test_its_arithmetic_is_that_of_the_formula():
    q = halves(2, 3, 20, 128)

    def loss(q, k, v):
        return over_time.attention_over_time(q, k, v, 2, True).astype(jnp.float32).sum()

    counted = model_flops(jax.grad(loss, argnums=(0, 1, 2)), q, q, q)
    assert counted == 6 * 2 * q.size * 3  # two products forward, four backward
