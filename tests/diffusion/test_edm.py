"""Noise levels and preconditioning, against numbers made by the DragNUWA 1.5 code."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuwa_jax.diffusion import edm

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dragnuwa_sampler.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def test_scalings_equal_the_reference(golden):
    ours = edm.scalings(jnp.asarray(golden["sigma"]))
    for value, name in zip(ours, ("c_skip", "c_out", "c_in", "c_noise"), strict=True):
        # The reference's float32 1/(s²+1) at s = 700 is itself rounded.
        np.testing.assert_allclose(value, golden[name], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("n", [5, 10, 25, 50])
def test_karras_sigmas_equal_the_reference(golden, n):
    sigmas = edm.karras_sigmas(n, 0.002, 700.0)
    assert sigmas.shape == (n + 1,) and sigmas[-1] == 0
    np.testing.assert_allclose(sigmas, golden[f"sigmas_{n}"], rtol=5e-6)


def test_karras_sigmas_follow_sigma_max(golden):
    sigmas = edm.karras_sigmas(25, 0.002, 80.0)
    np.testing.assert_allclose(sigmas, golden["sigmas_25_sigma_max_80_default"], rtol=5e-6)


def test_one_step_goes_from_sigma_max_to_zero():
    np.testing.assert_allclose(edm.karras_sigmas(1, 0.01, 50.0), [50.0, 0.0])


@pytest.mark.parametrize("arguments", [(0, 0.1, 1.0), (5, 0.0, 1.0), (5, 2.0, 1.0)])
def test_impossible_levels_are_refused(arguments):
    with pytest.raises(ValueError, match="expected|at least"):
        edm.karras_sigmas(*arguments)


def test_preconditioned_ideal_network_recovers_clean_latents():
    """F = v-prediction target makes D exact at every level, so skip, out and c_in fit together."""
    with jax.enable_x64(True):
        clean, noise = jax.random.normal(jax.random.key(0), (2, 3, 5, 4, 3, 2), jnp.float64)
        sigma = jnp.array([0.003, 1.3, 400.0], jnp.float64)
        x = edm.add_noise(clean, noise, sigma)
        c = edm.scalings(sigma.reshape(-1, 1, 1, 1, 1))
        v = c.c_in * noise - c.c_in * sigma.reshape(-1, 1, 1, 1, 1) * clean
        np.testing.assert_allclose(c.skip * x + c.out * v, clean, atol=1e-10)
        assert jnp.std(c.c_in * x) == pytest.approx(1, abs=0.1)


def test_noise_is_added_per_sample_or_with_one_level():
    clean, noise = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4))
    per_sample = edm.add_noise(clean, noise, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(per_sample[:, 0, 0], [1, 2])
    np.testing.assert_array_equal(edm.add_noise(clean, noise, 3.0), 3 * noise)


def test_sampling_starts_at_the_variance_of_noisy_data(golden):
    start = edm.initial_latents(jnp.asarray(golden["replay_noise"]), golden["sigmas_5"][0])
    np.testing.assert_allclose(start, golden["replay_x"][0], rtol=1e-5)


def test_training_levels_are_log_normal():
    sigmas = edm.sample_sigmas(jax.random.key(1), (20_000,), 0.7, 1.6)
    assert jnp.mean(jnp.log(sigmas)) == pytest.approx(0.7, abs=0.05)
    assert jnp.std(jnp.log(sigmas)) == pytest.approx(1.6, abs=0.05)


def test_loss_is_the_error_of_the_networks_output_per_sample():
    key = jax.random.key(2)
    clean, output, target = jax.random.normal(key, (3, 2, 3, 4, 5, 6))
    sigma = jnp.array([0.1, 30.0])
    c_out = edm.scalings(sigma.reshape(-1, 1, 1, 1, 1)).out
    loss = edm.denoising_loss(clean + c_out * (output - target), clean, sigma)
    expected = jnp.mean((output - target) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_loss_of_half_precision_is_summed_in_float32():
    clean = jnp.zeros((1, 2, 3, 64, 64), jnp.bfloat16)
    loss = edm.denoising_loss(clean + 0.1, clean, jnp.array([1.0]))
    assert loss.dtype == jnp.float32
    assert loss[0] == pytest.approx(2 * float(jnp.bfloat16(0.1)) ** 2, rel=1e-4)
