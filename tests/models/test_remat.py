"""What blocks keep for the backward pass changes memory, and nothing else."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro_model import randomize

from nuwa_jax.errors import UserError
from nuwa_jax.models import remat
from nuwa_jax.models.unet import Stream, UNet, UNetConfig, VideoResBlock, VideoTransformer
from nuwa_jax.models.video_ldm import QUICK_COMPILE

CONFIG = UNetConfig(
    out_channels=8,
    model_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_factors=(),
    head_channels=4,
    ff_multiplier=1,
    temporal_context=False,
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 6, 10, 8)), jnp.float32)
C_NOISE = jnp.asarray([-0.3, 0.4])


class Blocks(nn.Module):
    """What the U-Net is made of, once: as many convolutions, products and attentions as needed."""

    remat: str

    @nn.compact
    def __call__(self, x, c_noise):
        res, transformer = (
            remat.rematerialized(part, self.remat) for part in (VideoResBlock, VideoTransformer)
        )
        emb = jnp.broadcast_to(c_noise[:, None, None], (*x.shape[:2], 4))
        stream = Stream(emb, None, None, None, None)
        x = res(8, name="first")(x, stream)
        return transformer(2, 1, name="second")(x, stream)


def gradient(net, policy):
    """Gradients to all parameters, and the bytes that making them took."""
    without, net = net("none"), net(policy)
    params = jax.eval_shape(lambda: without.init(jax.random.key(0), X, C_NOISE))

    def loss(params):
        # One after another, so that what is kept of each adds up; in small steps, so that a
        # difference in the last digit does not grow.
        def step(x, _):
            return x + 0.1 * net.apply(params, x, C_NOISE), None

        return jnp.mean(jax.lax.scan(step, X, length=6)[0] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(params).compile(QUICK_COMPILE)
    return compiled(randomize(params, 1)), compiled.memory_analysis().temp_size_in_bytes


def unet(policy):
    return UNet(dataclasses.replace(CONFIG, remat=policy))


@pytest.mark.parametrize(
    ("net", "policies"),
    [
        (Blocks, ("dots", "branches", "block")),
        pytest.param(unet, ("dots", "branches", "attention", "block"), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_same_whatever_is_kept(net, policies):
    expected, bytes_of_all = gradient(net, "none")
    expected = jax.tree.leaves(expected)
    assert all(np.abs(b).max() > 0 for b in expected)
    # Of the whole: a bias before a norm has no gradient but the rounding's.
    largest = max(np.abs(b).max() for b in expected)
    taken = {}
    for policy in policies:
        found, taken[policy] = gradient(net, policy)
        for a, b in zip(jax.tree.leaves(found), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest)
    in_order = [bytes_of_all, *(taken[policy] for policy in policies)]
    assert all(more > less for more, less in itertools.pairwise(in_order)), in_order


@pytest.mark.parametrize(("policy", "hint"), [(True, "'block'"), (False, "'none'"), ("full", "")])
def test_an_unknown_policy_is_refused_with_the_names(policy, hint):
    with pytest.raises(UserError, match=f"dots.*offload.*{policy!r}.*{hint}"):
        UNetConfig(remat=policy)


def test_offloading_is_refused_where_there_is_no_other_memory():
    if jax.default_backend() != "cpu":
        pytest.skip("this backend can offload")
    with pytest.raises(UserError, match="needs a TPU or GPU.*CPU.*'block'"):
        remat.rematerialized(VideoTransformer, "offload")
