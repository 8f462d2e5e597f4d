import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuwa_jax.motion.dragnuwa import reference_tracks
from nuwa_jax.motion.raster import gaussian_kernel_1d, rasterize
from nuwa_jax.motion.tracks import TrackState

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dragnuwa_drag.npz"
FULL_GOLDEN = pathlib.Path(__file__).parents[3] / "shared" / "golden" / "small" / "drag.npz"


def random_tracks(seed, k=3, frames=5, height=21, width=30):
    rng = np.random.default_rng(seed)
    points = rng.uniform(2, (width - 3, height - 3), (k, frames, 2)).astype(np.float32)
    return points, np.ones((k, frames), np.uint8)


def convolve_directly(points, state, height, width, sigma, kernel_size):
    """DragNUWA's way: displacements in single pixels of a sparse map, then a 2-D convolution."""
    radius = kernel_size // 2
    padded = np.zeros((points.shape[1], height + 2 * radius, width + 2 * radius, 2))
    axis = np.arange(-radius, radius + 1)
    kernel = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * sigma**2))
    for track, states in zip(points.astype(np.float64), state, strict=True):
        for i in range(1, len(track)):
            if states[i - 1] == states[i] == TrackState.VISIBLE:
                x, y = track[i - 1].astype(int)
                window = padded[i, y : y + kernel_size, x : x + kernel_size]
                window += kernel[..., None] * (track[i] - track[i - 1])
    return padded[:, radius : radius + height, radius : radius + width]


@pytest.mark.parametrize(("sigma", "kernel_size"), [(20.0, 199), (2.5, 9), (10.0, 7)])
@pytest.mark.parametrize(("height", "width"), [(21, 30), (33, 17)])
def test_map_equals_the_direct_convolution(sigma, kernel_size, height, width):
    points, state = random_tracks(0, height=height, width=width)
    state[1, 2] = TrackState.OCCLUDED
    expected = convolve_directly(points, state, height, width, sigma, kernel_size)
    options = {"sigma": sigma, "kernel_size": kernel_size}
    flow = rasterize(points, state, height, width, snap=True, **options)
    assert flow.shape == (5, height, width, 2)
    np.testing.assert_allclose(flow, expected, atol=2e-5)


def test_whole_positions_need_no_snapping():
    points, state = random_tracks(1)
    points = np.rint(points)
    snapped = rasterize(points, state, 21, 30, snap=True)
    np.testing.assert_array_equal(rasterize(points, state, 21, 30), snapped)


def test_map_holds_the_displacement_at_the_dragged_pixel():
    points = np.array([[[4, 7], [6, 8], [9, 6]]], np.float32)
    flow = rasterize(points, np.ones((1, 3)), 15, 18, sigma=3.0, kernel_size=13)
    assert not flow[0].any()
    np.testing.assert_allclose(flow[1, 7, 4], [2, 1], atol=1e-6)
    np.testing.assert_allclose(flow[2, 8, 6], [3, -2], atol=1e-6)


def test_positions_between_pixels_move_the_centre_of_the_bump():
    points = np.array([[[10.3, 6.6], [11.3, 6.6]]], np.float32)
    weight = rasterize(points, np.ones((1, 2)), 14, 22, sigma=1.5, kernel_size=11)[1, ..., 0]
    rows, columns = np.mgrid[:14, :22]
    centre = (weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()
    np.testing.assert_allclose(centre, (10.3, 6.6), atol=2e-3)


@pytest.mark.parametrize("batch", [(1,), (2,), (2, 3)])
def test_leading_axes_are_a_batch(batch):
    count = int(np.prod(batch))
    points, state = random_tracks(2, k=3 * count)
    points, state = points.reshape(*batch, 3, 5, 2), state.reshape(*batch, 3, 5)
    flow = jax.jit(lambda p, s: rasterize(p, s, 21, 30, sigma=3.0, kernel_size=13))(points, state)
    assert flow.shape == (*batch, 5, 21, 30, 2)
    last = rasterize(points.reshape(-1, 3, 5, 2)[-1], state[(0,) * len(batch)], 21, 30, sigma=3.0,
                     kernel_size=13)  # fmt: skip
    np.testing.assert_allclose(flow.reshape(-1, *last.shape)[-1], last, atol=1e-6)


@pytest.mark.parametrize(
    "hidden", [TrackState.UNSPECIFIED, TrackState.OCCLUDED, TrackState.OUTSIDE]
)
def test_only_steps_between_drawn_states_are_drawn(hidden):
    points, state = random_tracks(3, k=1)
    state[0, 2] = hidden
    flow = rasterize(points, state, 21, 30)
    assert [bool(frame.any()) for frame in flow] == [False, True, False, False, True]
    everything = rasterize(points, state, 21, 30, states=tuple(TrackState))
    assert all(frame.any() for frame in everything[1:])


def test_anchors_and_padding_draw_nothing():
    points, state = random_tracks(4)
    alone = rasterize(points, state, 21, 30)
    anchor = np.repeat(points[:1, :1], 5, axis=1)
    padding = np.zeros((1, 5, 2), np.float32)
    flow = rasterize(
        np.concatenate([points, anchor, padding]),
        np.concatenate([state, np.ones((1, 5), np.uint8), np.zeros((1, 5), np.uint8)]),
        21,
        30,
    )
    np.testing.assert_allclose(flow, alone, atol=1e-6)
    assert not rasterize(anchor, np.ones((1, 5)), 21, 30).any()


def test_normalised_kernel_integrates_to_the_displacement():
    points = np.array([[[30, 25], [33, 24]]], np.float32)
    flow = rasterize(points, np.ones((1, 2)), 51, 61, sigma=4.0, kernel_size=33, normalize=True)
    np.testing.assert_allclose(flow[1].sum(axis=(0, 1)), [3, -1], rtol=1e-5)


def test_gradient_moves_points_and_stays_finite():
    points, state = random_tracks(5)
    state[0] = TrackState.OUTSIDE
    points[0] = 1e30
    state[1, 3:] = TrackState.UNSPECIFIED
    target = rasterize(points + 0.5, state, 21, 30, sigma=3.0, kernel_size=13)

    @jax.jit
    @jax.value_and_grad
    def loss(p):
        return jnp.square(rasterize(p, state, 21, 30, sigma=3.0, kernel_size=13) - target).sum()

    before, gradient = loss(jnp.asarray(points))
    assert np.isfinite(gradient).all()
    assert not gradient[0].any()
    after, _ = loss(points - 1e-4 * gradient)
    assert after < before


def test_result_has_the_dtype_asked_for():
    points, state = random_tracks(6)
    assert rasterize(points, state, 21, 30, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("kernel_size", [0, 8, -3])
def test_kernel_size_must_be_odd_and_positive(kernel_size):
    with pytest.raises(ValueError, match="odd"):
        gaussian_kernel_1d(jnp.zeros(1), 5, sigma=1.0, kernel_size=kernel_size)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\[\.\. k t 2\]"):
        rasterize(np.zeros((2, 5, 2)), np.zeros((2, 4)), 21, 30)


def demo_flow(tracks_json, frames, height, width, **kernel):
    """The demo's map without its zero frame: its tracks and its defects, drawn in float64."""
    defects = dict(still_points_move=True, overwrite=True, wrap=True)
    tracks = reference_tracks(tracks_json, frames, height, width, **defects)
    with jax.enable_x64(True):
        flow = rasterize(*tracks, height, width, snap=True, dtype="float64", **kernel)
    assert not flow[0].any()
    return np.asarray(flow[1:])


@pytest.mark.parametrize("example", range(6))
def test_map_equals_that_of_dragnuwa(example):
    golden = np.load(GOLDEN)
    height, width, frames, kernel_size, sigma = map(int, golden["small_hwT_kernel_sigma"])
    kernel = {"sigma": float(sigma), "kernel_size": kernel_size}
    tracks = str(golden[f"full{example}|tracks_json"])
    flow = demo_flow(tracks, frames, height, width, **kernel)
    expected = golden[f"small{example}|filtered_stride4"]
    np.testing.assert_allclose(flow[:, 1::4, 2::4], expected, atol=2e-5, rtol=0)


@pytest.mark.skipif(not FULL_GOLDEN.exists(), reason="the full-size arrays are not at hand")
@pytest.mark.parametrize("example", range(6))
def test_map_equals_that_of_dragnuwa_at_full_size(example):
    golden = np.load(FULL_GOLDEN)
    flow = demo_flow(str(golden[f"full{example}|tracks_json"]), 14, 320, 576)
    expected = golden[f"full{example}|filtered_off3_5_stride8"]
    np.testing.assert_allclose(flow[:, 3::8, 5::8], expected, atol=2e-5, rtol=0)
    expected = golden[f"full{example}|filtered_frame6_rows_stride16"]
    np.testing.assert_allclose(flow[6, ::16], expected, atol=2e-5, rtol=0)


STILL, CROSSING, LEAVING = [[60, 40]], [[10, 40], [110, 40]], [[-30, 40], [60, 40]]


def demo_tracks(*tracks, **defects):
    """5 frames on a canvas of the picture's own size, 120x80."""
    return reference_tracks(tracks, 5, 80, 120, canvas=(120, 80), **defects)


def test_a_single_point_stays_unless_the_demos_defect_is_asked_for():
    assert not np.ptp(demo_tracks(STILL).points, axis=1).any()
    moved = demo_tracks(STILL, still_points_move=True).points[0]
    np.testing.assert_allclose(moved[-1] - moved[0], [1, 1])


def test_crossing_tracks_add_up_unless_the_later_one_overwrites():
    def flow_there(**defects):
        tracks = demo_tracks(CROSSING, STILL, **defects)  # both are at (60, 40) in frame 2
        return rasterize(*tracks, 80, 120, sigma=1.0, kernel_size=5, snap=True)[3, 40, 60]

    np.testing.assert_allclose(flow_there(), [25, 0], atol=1e-4)
    np.testing.assert_allclose(flow_there(overwrite=True), [0, 0], atol=1e-4)


def test_beyond_the_left_border_nothing_is_drawn_unless_it_wraps():
    state = demo_tracks(LEAVING).state
    np.testing.assert_array_equal(state == TrackState.VISIBLE, [[False, False, True, True, True]])
    wrapped = demo_tracks(LEAVING, wrap=True)
    assert wrapped.points[0, 0, 0] == 90
    with pytest.raises(ValueError, match="beyond the border"):
        demo_tracks(LEAVING, crash=True)
    demo_tracks(LEAVING, wrap=True, crash=True)
