import cv2
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from nuwa_jax.motion.estimators import (
    DISFlow,
    LucasKanadeTracker,
    detect_keypoints,
    even_exposure,
    sample_patches,
)
from nuwa_jax.motion.persistent_tracker import PersistentTracker
from nuwa_jax.motion.tracks import TrackState

TRACKERS = [LucasKanadeTracker(), PersistentTracker()]


def texture(seed, height, width, grain=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // grain + 2, width // grain + 2, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def shifted(image, x, y, height, width):
    """The part of the image whose first pixel is (-x, -y) after it moved by (x, y)."""
    matrix = np.array([[1, 0, x], [0, 1, y]], np.float32)
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)


def moving_square(frames=7, height=60, width=76, speed=(4.5, 2.25), side=20, start=(10, 12)):
    """A textured square over a still ground: video, the square's corner in every frame."""
    ground, square = texture(0, height, width, grain=5), texture(1, side + 2, side + 2)
    square = 255 - square  # unlike the ground
    video = np.repeat(ground[None], frames, axis=0)
    corners = np.array(start) + np.arange(frames)[:, None] * np.array(speed)
    for frame, (x, y) in zip(video, corners, strict=True):
        matrix = np.array([[1, 0, x], [0, 1, y]], np.float32)
        layer = cv2.warpAffine(square[:side, :side], matrix, (width, height))
        alpha = cv2.warpAffine(np.ones((side, side), np.float32), matrix, (width, height))
        frame[:] = np.where(alpha[..., None] > 0.99, layer, frame)
    return video, corners


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.name)
def test_tracker_follows_a_moving_object_below_a_pixel(tracker):
    video, corners = moving_square()
    offsets = np.array([[6, 6], [10, 10], [14, 8]])
    tracks = tracker.track(video, corners[0] + offsets)
    error = np.linalg.norm(tracks.points - (corners + offsets[:, None]), axis=-1)
    assert error.max() < 0.5
    assert tracks.visible.all()
    np.testing.assert_allclose(tracks.points[:, 0], corners[0] + offsets, atol=1e-5)


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.name)
def test_tracker_says_when_a_point_is_covered(tracker):
    video, _ = moving_square()
    ground = np.array([[38.0, 31.0], [66.0, 12.0]])  # the square covers the first
    tracks = tracker.track(video, ground)
    assert (tracks.state[0, 4:] != TrackState.VISIBLE).any()
    assert tracks.state[1].tolist() == [TrackState.VISIBLE] * 7


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.name)
def test_point_that_leaves_the_picture_is_outside(tracker):
    image = texture(2, 80, 120)
    video = np.stack([shifted(image, -6 * i, 0, 48, 64) for i in range(7)])
    tracks = tracker.track(video, np.array([[14.0, 24.0], [50.0, 24.0]]))
    assert tracks.visible[1].all()
    assert not tracks.visible[0, 4:].any()
    if isinstance(tracker, LucasKanadeTracker):  # the other may take it for hidden at the border
        assert (tracks.state[0, 4:] == TrackState.OUTSIDE).all()


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (5, 9), (33, 130)])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.name)
def test_tracker_takes_any_size_any_point_and_no_texture(tracker, frames, size):
    height, width = size
    points = np.array([[0, 0], [width - 1, height - 1], [width / 2, height / 2], [-30, 500]])
    for video in (
        np.full((frames, height, width, 3), 90, np.uint8),
        np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8),
    ):
        tracks = tracker.track(video, points)
        assert tracks.points.shape == (4, frames, 2)
        assert (tracks.state[3] == TrackState.OUTSIDE).any()
        assert tracker.track(video, points[:0]).num_tracks == 0


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.name)
def test_tracker_is_deterministic_and_leaves_its_inputs_alone(tracker):
    video, corners = moving_square(frames=3)
    points = (corners[0] + np.array([[7, 7]])).astype(np.float32)
    copies = video.copy(), points.copy()
    first, second = tracker.track(video, points), tracker.track(video, points)
    np.testing.assert_array_equal(first.points, second.points)
    np.testing.assert_array_equal(video, copies[0])
    np.testing.assert_array_equal(points, copies[1])


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.name)
def test_tracker_refuses_what_is_no_video_or_no_point(tracker):
    with pytest.raises(ValueError, match="uint8"):
        tracker.track(np.zeros((2, 8, 8, 3), np.float32), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="finite"):
        tracker.track(np.zeros((2, 8, 8, 3), np.uint8), np.full((1, 2), np.nan))


def test_enlarging_lowers_the_error_on_small_pictures():
    video, corners = moving_square(height=48, width=60, side=11, speed=(3.3, 1.7), start=(8, 9))
    offsets = np.array([[4, 4], [5, 6], [6, 5]])
    truth = corners + offsets[:, None]
    errors = [
        np.linalg.norm(LucasKanadeTracker(upsample=n).track(video, truth[:, 0]).points - truth)
        for n in (1, 3)
    ]
    assert errors[1] < errors[0]


def test_persistent_tracker_finds_a_point_again_behind_an_occluder():
    video, corners = moving_square(speed=(6.0, 0.0), frames=8)
    video[3:5, :, 24:52] = 127  # a pillar hides the square for two frames
    points = corners[0] + np.array([[10, 10]])
    truth = corners + np.array([10, 10])
    tracks = PersistentTracker().track(video, points)
    error = np.linalg.norm(tracks.points[0] - truth, axis=-1)
    assert error[[1, 2, 6, 7]].max() < 1
    assert (tracks.state[0, 3:5] == TrackState.OCCLUDED).all()
    assert (tracks.state[0, 6:] == TrackState.VISIBLE).all()
    given_up = LucasKanadeTracker().track(video, points)
    assert (given_up.state[0, 4:] != TrackState.VISIBLE).all()


def test_persistent_tracker_follows_through_blur():
    video, corners = moving_square()
    blurred = np.stack([video[0]] + [cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in video[1:]])
    tracks = PersistentTracker().track(blurred, corners[0] + np.array([[10, 10]]))
    assert np.linalg.norm(tracks.points[0] - corners - 10, axis=-1).max() < 1


def test_dense_flow_has_the_documented_convention():
    image = texture(3, 70, 90)
    video = np.stack([shifted(image, 2 * i, -i, 50, 67) for i in range(3)])
    flow = DISFlow().estimate(video)
    assert flow.shape == (3, 50, 67, 2) and flow.dtype == np.float32
    assert not flow[0].any()
    inner = flow[1:, 10:-10, 10:-10]
    np.testing.assert_allclose(np.median(inner, axis=(1, 2)), [(2, -1)] * 2, atol=0.2)


@pytest.mark.parametrize("size", [(16, 16), (5, 9)])
def test_dense_flow_takes_tiny_pictures(size):
    video = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    assert np.isfinite(DISFlow("fast").estimate(video)).all()


def test_keypoints_are_few_apart_and_on_texture():
    frame = np.full((60, 90, 3), 120, np.uint8)
    frame[10:50, 40:80] = texture(4, 40, 40)
    points = detect_keypoints(frame, 25, min_distance=4.0)
    assert 10 <= len(points) <= 25
    assert (points[:, 0] > 35).all()
    gaps = np.linalg.norm(points[:, None] - points, axis=-1) + 1e3 * np.eye(len(points))
    assert gaps.min() >= 4
    assert detect_keypoints(np.zeros((20, 30, 3), np.uint8), 5).shape == (0, 2)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("radius", [0, 2])
def test_patches_are_sampled_bilinearly_with_borders_continued(channels, radius):
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (11, 16, channels)).astype(np.float32)
    centres = rng.uniform([-4, -4], [19, 14], (5, 3, 2))
    side = np.arange(-radius, radius + 1)
    y, x = np.meshgrid(side, side, indexing="ij")
    places = centres[..., None, :] + np.stack([x.ravel(), y.ravel()], axis=-1)
    coordinates = places[..., ::-1].reshape(-1, 2).T
    expected = np.stack(
        [
            map_coordinates(image[..., c], coordinates, order=1, mode="nearest")
            for c in range(channels)
        ],
        axis=-1,
    )
    sampled = sample_patches(image, centres, radius)
    assert sampled.shape == (5, 3, side.size**2, channels)
    np.testing.assert_allclose(sampled.reshape(-1, channels), expected, atol=2e-3)
    assert sample_patches(image, centres[:0], radius).shape == (0, 3, side.size**2, channels)


def test_a_clip_that_darkens_is_tracked_as_one_that_does_not():
    video, corners = moving_square()
    truth = corners + np.array([[6, 6], [10, 10], [14, 8]])[:, None]
    fading = (video * np.linspace(1, 0.7, 7)[:, None, None, None]).round().astype(np.uint8)
    tracks = LucasKanadeTracker().track(fading, truth[:, 0])
    assert tracks.visible.all()
    assert np.linalg.norm(tracks.points - truth, axis=-1).max() < 0.5


def test_exposure_is_that_of_the_first_frame_and_motion_is_not_taken_for_light():
    video, _ = moving_square()
    np.testing.assert_array_equal(even_exposure(video), video)
    gain = np.array([1, 0.9, 1.1, 0.6, 0.9, 1, 0.8])[:, None, None, None]
    dim = np.clip(video // 2 + 20, 0, 255)  # leaves room to become brighter
    lit = (dim * gain).round().astype(np.uint8)
    assert np.abs(even_exposure(lit).astype(int) - dim).max() <= 4
    assert even_exposure(video[:1]).shape == video[:1].shape
    black = np.zeros_like(video)
    np.testing.assert_array_equal(even_exposure(black), black)
