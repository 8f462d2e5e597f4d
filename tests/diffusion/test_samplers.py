"""Both samplers on problems whose denoiser, and whose solution, are known."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from nuwa_jax.diffusion import edm, samplers
from nuwa_jax.diffusion.guidance import guided_denoiser

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dragnuwa_sampler.npz"
DEVIATION = 0.6  # of the Gaussian's data
MEANS = (-1.0, 0.4, 2.0)  # of the mixture's components, each of deviation 0.3


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def gaussian_denoiser(x, sigma):
    """E[clean | x] for clean ~ N(0, DEVIATION²)."""
    return x * DEVIATION**2 / (DEVIATION**2 + sigma**2)


def mixture_denoiser(x, sigma):
    """E[clean | x] for an even mixture of Gaussians at MEANS."""
    means, variance = jnp.array(MEANS), 0.3**2
    posterior = jax.nn.softmax(-((x[..., None] - means) ** 2) / (2 * (variance + sigma**2)))
    mean = (variance * x[..., None] + sigma**2 * means) / (variance + sigma**2)
    return jnp.sum(posterior * mean, axis=-1)


def errors(method, denoise, start, exact, counts, low=0.02, high=20.0):
    """Largest error at level `low` for each number of steps."""
    result = []
    for n in counts:
        sigmas = edm.karras_sigmas(n, low, high)[:-1]  # stops at sigma_min: a smooth problem
        result.append(
            float(jnp.abs(samplers.sample(denoise, start, sigmas, method=method) - exact).max())
        )
    return np.array(result)


def orders(error, counts):
    return np.log(error[:-1] / error[1:]) / np.log(np.array(counts[1:]) / counts[:-1])


@pytest.mark.parametrize("method, order", [("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence_on_a_gaussian(x64, method, order):
    start = jnp.linspace(-30.0, 30.0, 7, dtype=jnp.float64)[None]
    exact = start * math.sqrt((DEVIATION**2 + 0.02**2) / (DEVIATION**2 + 20.0**2))
    counts = [65, 129, 257]
    error = errors(method, gaussian_denoiser, start, exact, counts)
    assert orders(error, counts) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method, order", [("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence_on_a_mixture(x64, method, order):
    start = np.linspace(-30.0, 30.0, 6)

    def slope(sigma, x):
        return (x - np.asarray(mixture_denoiser(jnp.asarray(x), sigma))) / sigma

    exact = solve_ivp(slope, (20.0, 0.02), start, rtol=1e-9, atol=1e-11).y[:, -1]
    counts = [161, 321]
    error = errors(method, mixture_denoiser, jnp.asarray(start)[None], exact, counts)
    assert orders(error, counts) == pytest.approx(order, abs=0.3)


def test_second_order_is_nearer_at_equal_cost(x64):
    start = jnp.linspace(-30.0, 30.0, 7, dtype=jnp.float64)[None]
    exact = start * math.sqrt((DEVIATION**2 + 0.02**2) / (DEVIATION**2 + 20.0**2))
    euler = errors("euler", gaussian_denoiser, start, exact, [20])
    second = errors("dpmpp_2m", gaussian_denoiser, start, exact, [20])
    assert second < euler / 5


@pytest.mark.parametrize("method", samplers.METHODS)
def test_last_step_to_zero_returns_the_last_estimate(method):
    seen = jax.random.normal(jax.random.key(0), (1, 3, 4, 5, 2))
    x = edm.initial_latents(jnp.ones_like(seen), 9.0)
    result = samplers.sample(
        lambda x, sigma: seen, x, edm.karras_sigmas(4, 0.1, 9.0), method=method
    )
    np.testing.assert_allclose(result, seen, rtol=1e-6)


@pytest.mark.parametrize("method", samplers.METHODS)
def test_float32_agrees_with_float64(method):
    start = np.random.default_rng(0).standard_normal((2, 3, 4)) * 700
    sigmas = edm.karras_sigmas(25, 0.002, 700.0)
    single = samplers.sample(
        mixture_denoiser, jnp.asarray(start, jnp.float32), sigmas, method=method
    )
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        double = samplers.sample(mixture_denoiser, jnp.asarray(start), sigmas, method=method)
        assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", samplers.METHODS)
@pytest.mark.parametrize("steps", [1, 7])
def test_one_scan_with_one_call_of_the_denoiser(method, steps):
    """The compiled program does not grow with the steps, and each step costs one call."""

    @jax.jit
    def denoise(x, sigma):
        return x * jnp.tanh(sigma)

    def run(x):
        sigmas = edm.karras_sigmas(steps, 0.01, 10.0)
        return samplers.sample(denoise, x, sigmas, method=method)

    jaxpr = jax.make_jaxpr(run)(jnp.ones((1, 2, 3))).jaxpr
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    assert len(scans) == 1 and scans[0].params["length"] == steps
    assert not [e for e in equations(jaxpr) if e.primitive.name == "while"]
    tanhs = [e for e in equations(jaxpr) if e.primitive.name == "tanh"]
    inside = [e for e in equations(scans[0].params["jaxpr"].jaxpr) if e.primitive.name == "tanh"]
    assert len(tanhs) == len(inside) == 1


def test_replays_the_references_own_sampling_run():
    """Guidance and Euler steps of DragNUWA 1.5's demo, its network replaced by what it said."""
    golden = np.load(GOLDEN)
    said = jnp.asarray(golden["replay_model_out"])  # [step, (branch t), c, h, w]
    sigmas = jnp.asarray(golden["sigmas_5"])
    steps, _, *inner = said.shape

    def network(x, sigma, condition):
        step = jnp.argmin(jnp.abs(jnp.log(sigmas[:-1]) - jnp.log(sigma[0])))
        return said[step].reshape(2, 5, *inner)

    no_condition = {"unused": jnp.zeros((1,))}
    denoise = guided_denoiser(network, [no_condition] * 2, [(0.0, -1.5), (1.0, 2.5)])
    x = jnp.asarray(golden["replay_x"])[:, None]  # [step, b=1, t, c, h, w]
    for step in range(steps):
        guided = denoise(x[step], sigmas[step])[0]
        np.testing.assert_allclose(guided, golden["replay_guided"][step], rtol=1e-5, atol=1e-6)
    for step in range(1, steps + 1):
        reached = samplers.sample(denoise, x[0], sigmas[: step + 1], method="euler")
        np.testing.assert_allclose(reached, x[step], rtol=2e-5, atol=2e-5)


def test_edits_start_from_any_level():
    """The tail of the levels, begun at the exact solution there, ends where the whole run ends."""
    sigmas = edm.karras_sigmas(400, 0.01, 20.0)
    start = jnp.linspace(-25.0, 25.0, 5)[None]
    middle = samplers.sample(gaussian_denoiser, start, sigmas[:201])
    whole = samplers.sample(gaussian_denoiser, start, sigmas)
    tail = samplers.sample(gaussian_denoiser, middle, sigmas[200:])
    np.testing.assert_allclose(tail, whole, atol=1e-4)


def test_faults_are_named():
    with pytest.raises(ValueError, match="euler"):
        samplers.sample(gaussian_denoiser, jnp.zeros((1, 2)), np.array([1.0, 0.0]), method="ddim")
    with pytest.raises(ValueError, match="at least one step"):
        samplers.sample(gaussian_denoiser, jnp.zeros((1, 2)), np.array([1.0]))


def equations(jaxpr):
    """All equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
