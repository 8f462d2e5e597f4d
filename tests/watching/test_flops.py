import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import PartitionSpec as P

from nuwa_jax.models.attention import dot_product_attention
from nuwa_jax.watching.flops import model_flops


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def xla_flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_products_of_matrices_are_counted_by_their_formula():
    assert model_flops(lambda a, b: a @ b, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    pattern = functools.partial(jnp.einsum, "bqd,bkd->bqk")
    assert model_flops(pattern, array(4, 3, 5), array(4, 6, 5)) == 2 * 4 * 3 * 6 * 5


def test_a_gradient_costs_twice_what_the_product_does():
    def loss(w, x):
        return jnp.sum(x @ w)

    grad = jax.grad(loss, argnums=(0, 1))
    assert model_flops(jax.value_and_grad(loss, (0, 1)), array(5, 7), array(3, 5)) == 2 * 105 * 3
    assert model_flops(grad, array(5, 7), array(3, 5)) == 2 * 105 * 3


def conv(x, w, stride=1, padding="VALID", groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def test_a_convolution_is_counted_by_its_formula():
    assert model_flops(conv, array(2, 8, 10, 4), array(3, 3, 4, 6)) == 2 * 2 * 6 * 8 * 9 * 4 * 6
    # Taps on the padding multiply nothing: 3 * 8 - 2 of them meet a value along 8 pixels.
    same = functools.partial(conv, padding="SAME")
    assert model_flops(same, array(1, 8, 8, 4), array(3, 3, 4, 6)) == 2 * 22 * 22 * 4 * 6
    grouped = functools.partial(conv, groups=2)
    assert model_flops(grouped, array(1, 3, 3, 4), array(3, 3, 2, 6)) == 2 * 9 * 2 * 6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_a_convolution_and_both_its_gradients_cost_the_same(stride, padding):
    fn = functools.partial(conv, stride=stride, padding=padding)
    x, w = array(2, 9, 8, 4), array(3, 3, 4, 6)
    forward = model_flops(fn, x, w)
    both = model_flops(lambda x, w: jax.vjp(fn, x, w)[1](fn(x, w)), x, w)
    assert both == 4 * forward  # the function is called twice


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.Conv(16, (3, 3), strides=2, name="down")(nn.relu(x))
        x = x.reshape(x.shape[0], -1, 16)
        q, k, v = (nn.Dense(16)(x) for _ in range(3))
        out = jax.nn.dot_product_attention(*(a[:, :, None] for a in (q, k, v)))
        return nn.Dense(4)(out)


def test_xla_counts_as_much_but_for_what_is_elementwise():
    network = Network()
    x = array(2, 16, 16, 3)
    params = jax.eval_shape(network.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(network.apply(params, x) ** 2)

    ours, theirs = (count(jax.grad(loss), params, x) for count in (model_flops, xla_flops))
    assert 0.9 * theirs < ours <= theirs


def test_loops_count_as_often_as_they_run_and_of_branches_the_costliest_or_default():
    w = array(4, 4)

    def loop(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), w, length=5)[0]

    assert model_flops(loop, w) == 5 * 2 * 64

    def condition(w):
        return jax.lax.cond(w[0, 0] > 0, lambda: w @ w, lambda: w @ w @ w)

    assert model_flops(condition, w) == 2 * 2 * 64

    def by_platform(w):
        return jax.lax.platform_dependent(w, cpu=lambda w: w @ w @ w, default=lambda w: w @ w)

    assert model_flops(jax.jit(by_platform), w) == 2 * 64


def test_a_product_in_a_loop_of_unknown_length_is_refused():
    def loop(w):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, w)

    with pytest.raises(ValueError, match="while loop"):
        model_flops(loop, array(4, 4))


def test_what_rematerialisation_computes_again_is_left_out():
    def layer(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(layer, w, x):
        return jnp.sum(layer(w, x))

    def step(layer):
        return jax.grad(functools.partial(loss, layer))

    w, x = array(8, 8), array(4, 8)
    kept, again = model_flops(step(layer), w, x), model_flops(step(jax.checkpoint(layer)), w, x)
    assert again == kept == 5 * 2 * 4 * 8 * 8  # forward 2, backward 3: x needs no gradient


def test_both_ways_of_attention_cost_nearly_the_same():
    q = array(1, 1024, 2, 16)

    def loss(attention, q):
        return jnp.sum(attention(q, q, q))

    def count(attention):
        return model_flops(jax.grad(functools.partial(loss, attention)), q)

    direct, chunked = count(jax.nn.dot_product_attention), count(dot_product_attention)
    assert direct == 6 * 2 * 2 * 1024**2 * 16
    # Our own backward pass makes the scores anew, once.
    assert direct <= chunked < 1.17 * direct


def test_a_shard_map_counts_for_all_its_devices():
    mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"))
    fn = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), axis_names={"x"}
    )
    assert model_flops(jax.jit(fn), array(8, 4), array(4, 4)) == 2 * 8 * 4 * 4


def test_a_pallas_kernel_counts_at_every_point_of_its_grid():
    def kernel(a, b, out):
        out[...] = jnp.dot(a[...], b[...])

    def matmul(a, b):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 8), lambda i: (i, 0)), pl.BlockSpec((8, 8))],
            out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
            interpret=True,
        )(a, b)

    assert model_flops(matmul, array(32, 8), array(8, 8)) == 2 * 32 * 8 * 8


@pytest.mark.parametrize("fused", [False, True])
def test_splash_attention_counts_as_attention_does(fused):
    b, n, lq, lk, d = 3, 2, 256, 128, 64
    blocks = splash.BlockSizes(
        block_q=128, block_kv=128, block_kv_compute=128, block_q_dkv=128, block_kv_dkv=128,
        block_kv_dkv_compute=128, block_q_dq=None if fused else 128,
        block_kv_dq=None if fused else 128, use_fused_bwd_kernel=fused,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((lq, lk))] * n)
    kernel = splash.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=True
    )
    q, k = array(b, n, lq, d), array(b, n, lk, d)
    product = 2 * b * n * lq * lk * d
    attend = jax.vmap(kernel)
    assert model_flops(attend, q, k, k) == 2 * product

    def loss(*qkv):
        return jnp.sum(attend(*qkv))

    # And what the softmax takes from the gradient, one number per query.
    assert model_flops(jax.grad(loss, (0, 1, 2)), q, k, k) == 6 * product + 2 * b * n * lq * d
