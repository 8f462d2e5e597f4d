"""The kernels for large attention: their numbers, their choice, what the compilers make of them."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.models import attention, splash
from nuwa_jax.models.attention import dot_product_attention, implementation
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.watching.flops import model_flops

ROOT = Path(__file__).parents[2]
ON_GPU = jax.default_backend() == "gpu"


@pytest.fixture(autouse=True)
def thresholds(monkeypatch):
    """Small ones: a test need not be large."""
    monkeypatch.setattr(attention, "DIRECT_SCORES", 2000)
    monkeypatch.setattr(attention, "CHUNK_SCORES", 6000)
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    monkeypatch.setattr(splash, "MIN_KEYS", 16)


def direct(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def chunked(q, k, v, mask):
    with implementation("xla"):
        return dot_product_attention(q, k, v, mask=mask)


def interpreted(q, k, v, mask):
    return splash.splash_attention(q, k, v, mask, interpret=True)


def cudnn(q, k, v, mask):
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    with implementation("cudnn"):
        return dot_product_attention(q, k, v, mask=mask).astype(jnp.float32)


def exact(q, k, v, mask, weight):
    """The output, and the gradients of its sum times `weight`, in float64 (Dao 2022, B.2)."""
    q, k, v, weight = (x.astype(np.float64) for x in (q, k, v, weight))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bqnd,bknd->bnqk", q, k) * scale
    mask = np.ones_like(scores, bool) if mask is None else mask
    scores = np.where(mask, scores, -1e30)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = np.einsum("bnqk,bknd->bqnd", shares, v)
    to_shares = np.einsum("bqnd,bknd->bnqk", weight, v)
    to_scores = shares * (to_shares - (shares * to_shares).sum(-1, keepdims=True))
    to_scores = np.where(mask, to_scores, 0) * scale
    to_q = np.einsum("bnqk,bknd->bqnd", to_scores, k)
    to_k = np.einsum("bnqk,bqnd->bknd", to_scores, q)
    return out, (to_q, to_k, np.einsum("bnqk,bqnd->bknd", shares, weight))


@pytest.mark.parametrize(
    ("attend", "tolerance"),
    [
        (direct, 1e-5),
        (chunked, 1e-5),
        (interpreted, 1e-5),
        pytest.param(
            cudnn, 0.05, marks=pytest.mark.skipif(not ON_GPU, reason="cuDNN needs an NVIDIA GPU")
        ),
    ],
)
# Odd numbers, one block of queries or keys and several; under the mask one sample has no keys.
@pytest.mark.parametrize(("b", "lq", "lk", "masked"), [(1, 131, 97, False), (2, 40, 133, True)])
def test_every_kernel_is_softmax_attention_forward_and_backward(
    attend, tolerance, b, lq, lk, masked
):
    rng = np.random.default_rng(lq)
    q, k, v = (rng.normal(size=(b, n, 3, 16)).astype(np.float32) for n in (lq, lk, lk))
    weight = rng.normal(size=q.shape).astype(np.float32)
    mask = None
    if masked:
        mask = rng.random((b, 1, 1, lk)) < 0.5
        mask[-1] = False

    @jax.jit
    def run(*inputs):
        out, pull = jax.vjp(lambda *x: attend(*x, mask), *inputs)
        return out, pull(jnp.asarray(weight))

    expected = exact(q, k, v, mask, weight)
    for ours, true in zip(jax.tree.leaves(run(q, k, v)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, true, atol=tolerance)


def run(mode, **environment):
    """What `kernels_run.py` prints as JSON."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "kernels_run.py", mode],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_device_of_a_mesh_runs_the_kernel_on_its_part():
    errors = run("mesh")
    halves = {name: errors.pop(name) for name in ("automatic over time", "nested over time")}
    assert errors.keys() == {"automatic", "nested"}
    assert all(error < 1e-5 for error in errors.values()), errors
    assert all(error < 0.02 for error in halves.values()), halves  # bfloat16


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: libtpu"
)
def test_the_tpu_compiler_takes_the_kernels_under_a_mesh():
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    found = run("tpu", **quiet)
    # Of two blocks. Where attention is kept, no block computes it twice.
    assert found["attention"] == {"fwd": 2, "dq": 2, "dkv": 2, "host": 0}
    assert found["offload"].pop("host") > 0
    assert found["offload"]["fwd"] >= 3
    assert found["over time"] == {"forward": 2, "backward": 2}
    assert found["fed forward"] == {"alone": 2, "divided": 0}


def test_kernels_that_take_no_mask_are_not_given_one(monkeypatch):
    monkeypatch.setattr(attention, "_fits_cudnn", lambda query: True)
    q, k = jnp.zeros((1, 4096, 1, 8)), jnp.zeros((1, 80, 1, 8))
    mask = jnp.ones((1, 1, 1, 80), bool)
    jaxpr = str(jax.make_jaxpr(partial(attention.dot_product_attention, mask=mask))(q, k, k))
    assert "cudnn" not in jaxpr


def test_the_arithmetic_of_large_attention_is_that_of_its_formula():
    q = jnp.zeros((2, 1440, 3, 8))

    def loss(q, k, v):
        return attention.dot_product_attention(q, k, v).sum()

    counted = model_flops(jax.grad(loss, argnums=(0, 1, 2)), q, q, q)
    exact = 6 * 2 * q.size * 1440  # two products forward, four backward
    assert exact <= counted < 1.01 * exact


def test_another_platforms_kernel_is_refused():
    other = {"cpu": "splash", "gpu": "splash", "tpu": "cudnn"}[jax.default_backend()]
    with pytest.raises(UserError, match=f"{other}.* needs a .*set model.attention to 'auto'"):
        with implementation(other):
            pass


def test_an_unknown_kernel_is_refused_with_the_names():
    with pytest.raises(UserError, match="auto.*xla.*splash.*cudnn.*'flash'"):
        VideoLDM(None, None, attention="flash")
