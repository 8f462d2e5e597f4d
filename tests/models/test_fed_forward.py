"""The kernel of feed-forward layers: its numbers, where it is used, and what is counted of it.

Here it is run step by step, with NaN where a block reaches beyond an array; `kernels_run.py`
compiles it for a TPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro_model import randomize

from nuwa_jax.models import attention, fed_forward, layers, partition, products
from nuwa_jax.models.remat import rematerialized
from nuwa_jax.models.unet import SpatialBlock, TemporalBlock
from nuwa_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from nuwa_jax.watching.flops import products as products_of


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def arguments(n, c, l, hidden):
    half = jnp.bfloat16
    return (
        normal(n, c, l, dtype=half),
        1 + 0.2 * normal(c, seed=1),
        0.2 * normal(c, seed=2),
        (normal(c, 2 * hidden, seed=3) / c**0.5).astype(half),
        0.3 * normal(2 * hidden, seed=4),
        (normal(hidden, c, seed=5) / hidden**0.5).astype(half),
        0.3 * normal(c, seed=6),
    )


def exact(x, scale, bias, kernel, kernel_bias, out_kernel, out_bias):
    x = jnp.swapaxes(x, 1, 2)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    value, gate = jnp.split(y @ kernel + kernel_bias, 2, -1)
    hidden = value * jax.nn.gelu(gate, approximate=False)
    return jnp.swapaxes(x + hidden @ out_kernel + out_bias, 1, 2)


# Whole blocks of pixels and parts, one and several; hidden channels at once and in turns.
@pytest.mark.parametrize(
    "sizes", [(2, 48, 200, 256), (1, 80, 512, 512), (1, 16, 700, 256), (2, 32, 17, 256)], ids=str
)
def test_it_is_the_layer_forward_and_backward(sizes):
    given = arguments(*sizes)
    change = normal(*given[0].shape, seed=7, dtype=jnp.bfloat16)
    out, back = jax.vjp(lambda *args: fed_forward.fed_forward(*args, True), *given)
    found = (out, *back(change))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (*given, change)]
        out, back = jax.vjp(exact, *wide[:-1])
        expected = (out, *back(wide[-1]))
    for ours, true, like in zip(found, expected, (given[0], *given), strict=True):
        assert ours.dtype == like.dtype and ours.shape == like.shape
        true = np.asarray(true)
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), true, rtol=0, atol=0.01 * np.abs(true).max()
        )


@pytest.mark.parametrize(
    ("channels", "hidden", "dtype", "fits"),
    [
        (320, 1280, jnp.bfloat16, True),
        (320, 1280, jnp.float32, False),
        (640, 2560, jnp.bfloat16, False),  # whole registers
        (336, 1280, jnp.bfloat16, False),  # kernels that do not fit the core
        (320, 320, jnp.bfloat16, False),
        (72, 256, jnp.bfloat16, False),
    ],
)
def test_what_it_does_not_compute_is_left_to_xla(channels, hidden, dtype, fits):
    assert fed_forward.fits(jax.ShapeDtypeStruct((1, 20, channels), dtype), hidden) is fits


@pytest.fixture
def on_tpu(monkeypatch):
    """Calls of the kernels in what is traced from now on as if for a TPU, run step by step."""
    calls = []
    call = fed_forward._call

    def interpreted(body, arrays, weights, sums, interpret):
        calls.append((body.__name__, arrays[0].shape))
        return call(body, arrays, weights, sums, True)

    def start():
        for module in (attention, layers, partition, products):
            monkeypatch.setattr(module, "platform", lambda: "tpu")
        monkeypatch.setattr(fed_forward, "_call", interpreted)
        over_time = partial(attention.kernel_over_time, interpret=True)
        monkeypatch.setattr(attention, "kernel_over_time", over_time)
        return calls

    return start


@pytest.mark.parametrize(
    ("block", "shape", "kernels"),
    [(SpatialBlock, (2, 20, 64), 1), (TemporalBlock, (1, 2, 20, 64), 2)],
    ids=["spatial", "temporal"],
)
def test_blocks_give_the_same_with_it_and_without(block, shape, kernels, on_tpu):
    net = block(2, 4, jnp.bfloat16)
    x = normal(*shape, dtype=jnp.bfloat16)
    params = jax.eval_shape(net.init, jax.random.key(0), x, None, None)
    drawn = randomize(params, 1)

    def run():
        def loss(params, x):
            halves = jax.tree.map(lambda a: a.astype(x.dtype) if a.ndim > 1 else a, params)
            out = net.apply(halves, x, None, None)
            return jnp.sum(out.astype(jnp.float32) * normal(*out.shape, seed=2)), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(drawn, x)
        return jax.tree.leaves((out, grads))

    plain = run()
    calls = on_tpu()
    assert jax.eval_shape(net.init, jax.random.key(0), x, None, None) == params
    calls.clear()
    for ours, other in zip(run(), plain, strict=True):
        ours, other = (np.asarray(part, np.float64) for part in (ours, other))
        np.testing.assert_allclose(ours, other, rtol=0, atol=0.03 * np.abs(other).max())
    assert sorted(name for name, _ in calls) == ["_backward"] * kernels + ["_forward"] * kernels
    assert {shape[1:] for _, shape in calls} == {(64, 20)}


def test_new_parameters_are_the_same_with_it_and_without(on_tpu):
    net = SpatialBlock(2, 4, jnp.bfloat16)
    x = normal(1, 20, 64, dtype=jnp.bfloat16)
    plain = net.init(jax.random.key(0), x, None, None)
    calls = on_tpu()
    jax.tree.map(np.testing.assert_array_equal, net.init(jax.random.key(0), x, None, None), plain)
    assert calls


def test_xla_may_be_asked_for_instead(on_tpu):
    calls = on_tpu()
    with attention.implementation("xla"):
        net = SpatialBlock(2, 4, jnp.bfloat16)
        net.init(jax.random.key(0), normal(1, 20, 64, dtype=jnp.bfloat16), None, None)
    assert not calls


def test_where_its_result_is_kept_it_is_not_computed_twice(on_tpu):
    on_tpu()
    x = normal(2, 20, 64, dtype=jnp.bfloat16)
    net = rematerialized(SpatialBlock, "branches")(2, 4, jnp.bfloat16)
    params = jax.eval_shape(net.init, jax.random.key(0), x, None, None)

    def loss(params, x):
        return jnp.sum(jnp.square(net.apply(params, x, None, None).astype(jnp.float32)))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params, x))
    for way in ("forward", "backward"):
        assert jaxpr.count(f"name=fed_forward_{way}") == 1


def test_a_device_alone_on_its_axes_adds_nothing_up_over_them(on_tpu):
    on_tpu()
    x = normal(1, 20, 64, dtype=jnp.bfloat16)
    net = SpatialBlock(2, 4, jnp.bfloat16)
    params = net.init(jax.random.key(0), x, None, None)

    def loss(params, x):
        return jnp.sum(net.apply(params, x, None, None).astype(jnp.float32))

    with use_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x))
    assert "fed_forward_backward" in jaxpr and "shard_map" in jaxpr
    assert "psum" not in jaxpr


def test_its_arithmetic_is_that_of_the_products():
    n, c, l, hidden = 2, 48, 200, 256
    given = arguments(n, c, l, hidden)

    def loss(*args):
        return fed_forward.fed_forward(*args, True).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, tuple(range(7))))(*given)
    found = list(products_of(jaxpr.jaxpr))
    each = 2 * n * l * c * hidden
    assert sum(p.flops for p in found if not p.recomputed) == 9 * each
    assert sum(p.flops for p in found if p.recomputed) == 2 * each
