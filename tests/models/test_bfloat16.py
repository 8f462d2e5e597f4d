"""A network that computes in bfloat16 learns from the loss that it has in float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from micro_model import denoiser, drops, inputs, make, random_params

from nuwa_jax.diffusion.edm import denoising_loss


@pytest.mark.slow
def test_the_loss_is_that_of_float32_within_a_percent():
    given = inputs()
    clean = np.random.default_rng(1).normal(size=given["x"].shape).astype(np.float32)
    params, losses = None, {}
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(
            make(flow_encoder={}, drag={}, text={}, attention_factors=()), dtype=jnp.dtype(dtype)
        )
        params = params or random_params(model, seed=0)
        found = denoiser(model)(params, given, drops(*[[False, False]] * 3))
        assert found.dtype == np.float32
        losses[dtype] = np.asarray(denoising_loss(found, clean, given["sigma"]))
    # 2^-8 is the rounding of one value; a network of thirty layers of random weights adds up.
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)
    assert not np.array_equal(losses["bfloat16"], losses["float32"])
