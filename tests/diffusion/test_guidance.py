"""The algebra of guidance: which branches are computed, and what their sum is."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuwa_jax.diffusion.guidance import GuidanceScales, Keep, guided_denoiser

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dragnuwa_sampler.npz"
FULL = Keep(text=True, image=True, drag=True)
SHAPE = (2, 5, 3, 4, 2)  # b t h w c


class Network:
    """A denoiser with an effect of each condition of its own; counts what it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, condition):
        self.calls.append(x.shape[0])
        assert sigma.shape == (x.shape[0],)
        effect = condition["effect"].reshape(-1, *[1] * (x.ndim - 1))
        return x / (1 + sigma.reshape(effect.shape)) + effect


def condition(keep, b=SHAPE[0]):
    """Text adds 1, image 10, drag 100, and image with drag 1000 more (an interaction)."""
    effect = keep.text + 10 * keep.image + 100 * keep.drag + 1000 * (keep.image and keep.drag)
    return {"effect": jnp.full((b,), float(effect)), "absent": None}


def guide(scales, network=None):
    coefficients, keeps = zip(*scales.branches(), strict=True)
    network = network or Network()
    return guided_denoiser(network, [condition(keep) for keep in keeps], coefficients)


def estimate(x, sigma, keep):
    return Network()(x, jnp.full((x.shape[0],), sigma), condition(keep))


def test_scales_of_one_are_the_conditional_model_alone():
    network, x = Network(), jax.random.normal(jax.random.key(0), SHAPE)
    assert GuidanceScales().branches() == [(1.0, FULL)]
    guided = guide(GuidanceScales(), network)(x, jnp.float32(0.5))
    np.testing.assert_array_equal(guided, estimate(x, 0.5, FULL))
    assert network.calls == [SHAPE[0]]


def test_equal_scales_take_two_branches():
    branches = GuidanceScales(text=3.0, image=3.0, drag=3.0).branches()
    assert branches == [(-2.0, Keep(False, False, False)), (3.0, FULL)]


def test_scales_of_zero_are_the_unconditional_model_alone():
    assert GuidanceScales(0.0, 0.0, 0.0).branches() == [(1.0, Keep(False, False, False))]


@pytest.mark.parametrize(
    "scales, count",
    [
        (GuidanceScales(text=1.0, image=1.0, drag=2.0), 2),
        (GuidanceScales(text=4.0, image=1.0, drag=1.0), 3),
        (GuidanceScales(text=4.0, image=1.5, drag=2.0), 4),
        (GuidanceScales(text=None, image=1.5, drag=2.0), 3),
    ],
)
def test_guided_estimate_is_the_cascade_and_one_network_call(scales, count):
    network, x = Network(), jax.random.normal(jax.random.key(1), SHAPE)
    guided = guide(scales, network)(x, jnp.float32(2.0))
    assert network.calls == [count * SHAPE[0]]

    always_text = scales.text is None
    base = estimate(x, 2.0, Keep(always_text, False, False))
    image = estimate(x, 2.0, Keep(always_text, True, False))
    text = estimate(x, 2.0, Keep(True, True, False))
    full = estimate(x, 2.0, FULL)
    expected = (
        base
        + scales.image * (image - base)
        + (1.0 if always_text else scales.text) * (text - image)
        + scales.drag * (full - text)
    )
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("text", [0.0, 1.0, None, 2.5])
@pytest.mark.parametrize("image", [1.0, (1.0, 2.5), (2.0, 2.0)])
@pytest.mark.parametrize("drag", [1.0, None, 3.0, (0.5, 2.0)])
def test_coefficients_sum_to_one_and_none_is_zero(text, image, drag):
    branches = GuidanceScales(text, image, drag).branches()
    ends = np.array([c if isinstance(c, tuple) else (c, c) for c, _ in branches])
    np.testing.assert_allclose(ends.sum(axis=0), 1, atol=1e-12)
    assert (np.abs(ends).max(axis=1) > 0).all()
    assert len({keep for _, keep in branches}) == len(branches)


def test_svd_scale_rises_per_frame_and_keeps_the_drags_in_both_branches():
    scales = GuidanceScales(text=None, image=(1.0, 2.5), drag=None)
    assert scales.branches() == [
        ((0.0, -1.5), Keep(text=True, image=False, drag=True)),
        ((1.0, 2.5), FULL),
    ]
    x = jax.random.normal(jax.random.key(2), SHAPE)
    guided = guide(scales)(x, jnp.float32(1.0))
    golden = np.load(GOLDEN)["guider_scale"].reshape(1, 5, 1, 1, 1)
    without = estimate(x, 1.0, Keep(True, False, True))
    expected = without + golden * (estimate(x, 1.0, FULL) - without)
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(guided[:, 0], estimate(x, 1.0, FULL)[:, 0], rtol=1e-6)


def test_branches_follow_each_sample_of_the_batch():
    """Stacked batches of branches come apart as they were put together."""
    own = [{"effect": jnp.array([1.0, 2.0])}, {"effect": jnp.array([10.0, 30.0])}]
    x = jnp.zeros(SHAPE)
    guided = guided_denoiser(Network(), own, [-1.0, 2.0])(x, jnp.float32(0.0))
    np.testing.assert_allclose(guided[:, 0, 0, 0, 0], [19.0, 58.0])


def test_scales_from_a_config_list_are_hashable():
    assert hash(GuidanceScales(image=[1, 2.5])) == hash(GuidanceScales(image=(1.0, 2.5)))


def test_faults_are_named():
    with pytest.raises(ValueError, match="image guidance scale"):
        GuidanceScales(image=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="one coefficient per branch"):
        guided_denoiser(Network(), [condition(FULL)], [1.0, 2.0])
