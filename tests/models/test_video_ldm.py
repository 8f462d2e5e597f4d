"""The assembled model through its public methods: shapes, drops, and what drags mean to it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro_model import denoiser, drops, inputs, make, random_params

from nuwa_jax.models.drag_attention import correspondence_maps, fourier_features, grid_positions

COMBINATIONS = list(itertools.product([False, True], repeat=3))  # text, image, drag dropped
B = len(COMBINATIONS)


@pytest.fixture(scope="module")
def model():
    return make(
        flow_encoder={"injection": "film"}, drag={"forms": ("query_key", "tokens")}, text={}
    )


@pytest.fixture(scope="module")
def params(model):
    return random_params(model, seed=1)


@pytest.fixture(scope="module")
def run(model, params):
    """`run(changes, drop=...)`: the denoised estimates of `given`, by default with nothing dropped.

    The batch is one sample repeated, so that differences within it come from what is tested.
    """
    apply = denoiser(model)

    def call(changes, drop=None):
        given = {name: np.repeat(a[:1], B, axis=0) for name, a in inputs().items()} | changes
        drop = drop or drops([False] * B, [False] * B, [False] * B)
        return np.asarray(apply(params, given, drop))

    return call


@pytest.fixture(scope="module")
def drags():
    """Points and states of the repeated sample, to be changed in single samples of the batch."""
    given = inputs()
    return tuple(np.repeat(given[name][:1], B, axis=0) for name in ("points", "state"))


def test_text_image_and_drag_drop_independently(run):
    drop = drops(*zip(*COMBINATIONS, strict=True))
    out = run({}, drop)
    for a, b in itertools.combinations(range(B), 2):
        assert np.abs(out[a] - out[b]).max() > 1e-3, (COMBINATIONS[a], COMBINATIONS[b])
    other = {name: np.repeat(a[1:], B, axis=0) for name, a in inputs().items()}
    changes = (("text",), ("image",), ("flow", "points"))
    for i, names in enumerate(changes):
        changed = run({name: other[name] for name in names}, drop)
        for sample, dropped in enumerate(COMBINATIONS):
            difference = np.abs(changed[sample] - out[sample]).max()
            assert (difference == 0) if dropped[i] else (difference > 1e-3), (names, dropped)


def test_unspecified_drags_and_tails_do_not_reach_the_frames(run, drags):
    points, state = (a.copy() for a in drags)
    state[0:4, 2] = 0  # one drag unspecified throughout
    points[1, 2] += 5.0
    points[2, 2] = 0.0
    state[4:6, :, 2] = 0  # the tails of all
    points[5, :, 2] -= 3.0
    out = run({"points": points, "state": state})
    np.testing.assert_allclose(out[1:3], out[[0, 0]], atol=1e-6)
    np.testing.assert_allclose(out[5], out[4], atol=1e-6)
    assert np.abs(out[0] - out[4]).max() > 1e-3


def test_occluded_is_not_unspecified(run, drags):
    state = drags[1].copy()
    for sample in range(4):
        state[sample, 0, 1:] = sample
    out = run({"state": state})
    for a, b in itertools.combinations(range(4), 2):
        assert np.abs(out[a] - out[b]).max() > 1e-4, (a, b)


def test_order_of_drags_does_not_matter(run, drags):
    points, state = (a.copy() for a in drags)
    state[:, 1, 2:] = 2
    for sample, order in enumerate(itertools.permutations(range(3))):
        points[sample], state[sample] = points[sample, order], state[sample, order]
    out = run({"points": points, "state": state})
    np.testing.assert_allclose(out[:6], out[[0] * 6], atol=2e-5)


def test_a_drag_changes_the_frames_where_it_goes(run, drags):
    points = drags[0].copy()
    points[1, 0, 1:] += 4.0
    out = run({"points": points})
    assert np.abs(out[1] - out[0]).max() > 1e-3
    np.testing.assert_array_equal(out[2], out[0])


GRID = (4, 6)


def maps(position, visible):
    grid = grid_positions(*GRID)
    position = jnp.asarray(position, jnp.float32)[None, :, None]  # b t k 2
    visible = jnp.asarray(visible, bool)[None, :, None]
    target, handle = correspondence_maps(grid, position, visible, jnp.float32(50.0), 3)
    return (np.asarray(a).reshape(-1, *GRID, a.shape[-1]) for a in (target, handle))


def test_still_anchor_maps_to_itself():
    target, handle = maps([[0.4, 0.6]] * 3, [True] * 3)
    np.testing.assert_allclose(target, handle[[0, 0, 0]], atol=1e-6)
    assert np.abs(handle).max() > 0.5


def test_moved_drags_target_finds_the_handle():
    """One cell to the right and one down: frame 1 looks up what frame 0 had one cell before."""
    start = np.array([1.5 / 6, 1.5 / 4])
    target, handle = maps([start, start + [1 / 6, 1 / 4], start], [True, True, False])
    np.testing.assert_allclose(target[0], handle[0], atol=1e-6)
    np.testing.assert_allclose(target[1, 1:, 1:], handle[0, :-1, :-1], atol=1e-5)
    assert np.abs(target[1] - handle[0]).max() > 0.5
    np.testing.assert_array_equal(target[2], 0)  # not visible: no correspondence


def test_fourier_features_tell_cells_apart():
    features = fourier_features(grid_positions(*GRID), 3)
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
    assert distance[~np.eye(len(distance), dtype=bool)].min() > 0.1


@pytest.mark.parametrize(("b", "frames", "height", "width"), [(1, 3, 16, 24), (2, 1, 24, 16)])
def test_encode_and_decode(model, params, b, frames, height, width):
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (b, frames, height, width, 3)).astype(np.float32)
    latents, mean = jax.jit(lambda v: (model.encode(params, v), model.posterior(params, v)[0]))(
        video
    )
    assert latents.shape == (b, *model.latent_shape(height, width, frames))
    stored = params["latents"]
    np.testing.assert_allclose(latents, (mean - stored["mean"]) * stored["scale"], rtol=1e-5)
    decoded, raw = jax.jit(lambda z, m: (model.decode(params, z), model.decode_raw(params, m)))(
        latents, mean
    )
    assert decoded.shape == video.shape
    np.testing.assert_allclose(decoded, raw, atol=2e-3)  # normalising and back


@pytest.mark.parametrize("size", [(18, 24), (16, 26), (15, 23)])
def test_sizes_that_do_not_divide_are_refused(model, size):
    with pytest.raises(ValueError, match=r"multiples of 4.*got \d+x\d+.*change data"):
        model.latent_shape(*size, 3)


def test_unknown_injection_and_form_are_refused():
    with pytest.raises(ValueError, match="drag forms"):
        make(drag={"forms": ("teleport",)})
    with pytest.raises(ValueError, match="has no"):
        make(drag={"colour": 3})


def test_nothing_to_condition_on_is_refused(model, params):
    with pytest.raises(ValueError, match="at least one of"):
        model.condition(params, frames=3, size=(16, 24))


@pytest.mark.parametrize("frames_per_call", [0, 1, 2, 3, 4])
def test_decoding_in_calls_of_some_frames_equals_decoding_those_frames_alone(
    model, params, frames_per_call
):
    """3 frames: also in calls that do not divide them, and of more than there are."""
    z = jax.random.normal(jax.random.key(3), (2, 3, 4, 6, 4))
    decode = jax.jit(model.decode, static_argnums=2)
    whole = decode(params, z, frames_per_call)
    size = frames_per_call or 3
    parts = [decode(params, z[:, i : i + size], 0) for i in range(0, 3, size)]
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), atol=1e-5)
    apart = np.abs(whole - decode(params, z, 0)).max()
    assert (apart > 1e-3) == (frames_per_call in (1, 2))
