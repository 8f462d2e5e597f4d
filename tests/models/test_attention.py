"""Attention against a float64 reference, and that large attention never holds all its scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from nuwa_jax.models import attention
from nuwa_jax.models.attention import dot_product_attention

B, HEADS, D = 2, 3, 8
# (lq, lk), few scores, many scores, many and lq prime: no chunk divides it.
SIZES = [(24, 40), (96, 80), (97, 64), (61, 131)]


@pytest.fixture(autouse=True)
def thresholds(monkeypatch):
    """Small ones: a test need not be large."""
    monkeypatch.setattr(attention, "DIRECT_SCORES", 2000)
    monkeypatch.setattr(attention, "CHUNK_SCORES", 6000)


def make(lq, lk, *, bias=None, mask=None, dtype=np.float32):
    """q, k, v, and the keyword arguments; `bias` and `mask` are shapes."""
    rng = np.random.default_rng(lq * lk)
    q, k, v = (rng.normal(size=(B, n, HEADS, D)).astype(dtype) for n in (lq, lk, lk))
    more = {}
    if bias is not None:
        more["bias"] = rng.normal(size=bias, scale=2.0).astype(dtype)
    if mask is not None:
        more["mask"] = rng.random(mask) < 0.6
    return (q, k, v), more


def reference(q, k, v, bias=None, mask=None):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / D**0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = np.where(mask, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v)


def direct(q, k, v, **more):
    return jax.nn.dot_product_attention(q, k, v, **more)


def gradients(function, inputs, more, weight):
    """To q, k, v and the bias."""
    mask = more.get("mask")

    @jax.jit
    def grad(inputs, bias):
        def loss(inputs, bias):
            return jnp.sum(function(*inputs, bias=bias, mask=mask) * weight)

        return jax.grad(loss, (0, 1) if bias is not None else 0)(inputs, bias)

    return jax.tree.leaves(grad(inputs, more.get("bias")))


def shapes(lq, lk):
    """Bias and mask that are whole, shared by samples, heads or queries, or absent."""
    return [
        {},
        {"bias": (B, HEADS, lq, lk)},
        {"mask": (B, 1, 1, lk)},
        {"bias": (1, HEADS, lq, lk), "mask": (B, HEADS, lq, lk)},
        {"bias": (B, 1, 1, lk), "mask": (1, 1, lq, lk)},
    ]


@pytest.mark.parametrize(("lq", "lk"), SIZES)
@pytest.mark.parametrize("kind", range(len(shapes(1, 1))))
def test_is_softmax_attention(lq, lk, kind):
    inputs, more = make(lq, lk, **shapes(lq, lk)[kind])
    ours = dot_product_attention(*inputs, **more)
    np.testing.assert_allclose(ours, reference(*inputs, **more), atol=2e-6)


def test_few_scores_are_computed_as_jax_does():
    inputs, more = make(24, 40, bias=(B, HEADS, 24, 40))
    np.testing.assert_array_equal(dot_product_attention(*inputs, **more), direct(*inputs, **more))


@pytest.mark.parametrize("kind", range(len(shapes(1, 1))))
def test_gradients_are_those_of_the_direct_form(kind):
    lq, lk = 61, 131
    inputs, more = make(lq, lk, **shapes(lq, lk)[kind])
    weight = np.random.default_rng(0).normal(size=inputs[0].shape).astype(np.float32)
    ours = gradients(dot_product_attention, inputs, more, weight)
    theirs = gradients(direct, inputs, more, weight)
    assert len(ours) == len(theirs) == (4 if "bias" in more else 3)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_query_without_keys_attends_to_all():
    (q, k, v), more = make(61, 131, mask=(B, 1, 61, 131))
    mask = more["mask"]
    mask[:, :, 5] = False
    weight = np.ones_like(q)
    out = dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(out[:, 5], v.mean(1), atol=1e-6)
    for form in (dot_product_attention, direct):
        to_q, to_k, to_v = gradients(form, (q, k, v), {"mask": mask}, weight)
        np.testing.assert_array_equal(to_q[:, 5], 0)
        assert all(np.isfinite(g).all() for g in (to_k, to_v))


def test_scores_far_from_zero_do_not_overflow():
    (q, k, v), _ = make(61, 131)
    q = 100 * q
    out = dot_product_attention(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v), atol=1e-4)


def test_half_precision_keeps_float32_statistics():
    (q, k, v), _ = make(61, 131)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = dot_product_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.02)
    weight = jnp.ones_like(q)
    ours = gradients(dot_product_attention, (q, k, v), {}, weight)
    for a, b in zip(ours, gradients(direct, (q, k, v), {}, weight), strict=True):
        assert a.dtype == jnp.bfloat16
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b) + 0.02


@pytest.mark.parametrize("mask", [None, (B, 1, 1, 2880)])
@pytest.mark.parametrize("backward", [False, True])
def test_scores_are_never_held_all_at_once(monkeypatch, mask, backward):
    """At the sizes of the full model, in what is traced for every backend."""
    monkeypatch.undo()
    lq = lk = 2880

    def run(q, k, v, mask):
        return dot_product_attention(q, k, v, mask=mask).sum()

    function = jax.grad(run, (0, 1, 2)) if backward else run
    x = jax.ShapeDtypeStruct((B, lq, 5, 64), jnp.float32)
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, bool)
    jaxpr = jax.make_jaxpr(function)(x, x, x, mask)
    # Those of one sample are [heads lk chunk]; the chunks of all samples are traced for backends
    # that share the samples among devices.
    largest = max(sizes(jaxpr.jaxpr))
    assert largest <= B * attention.CHUNK_SCORES < B * 5 * lq * lk / 9
    if jax.default_backend() == "cpu":
        memory = jax.jit(function).lower(x, x, x, mask).compile().memory_analysis()
        # One chunk of one sample, twice, and a few arrays as large as the queries.
        assert memory.temp_size_in_bytes < 4 * (3 * attention.CHUNK_SCORES + 10 * B * lq * 5 * 64)


def sizes(jaxpr):
    """The number of elements of everything that is computed, in called functions, too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)
