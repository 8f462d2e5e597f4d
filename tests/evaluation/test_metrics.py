"""Metrics on clips whose score is known."""

import math

import numpy as np
import pytest

from nuwa_jax.evaluation import metrics
from nuwa_jax.motion.tracks import Tracks, TrackState

VISIBLE, OCCLUDED, OUTSIDE = TrackState.VISIBLE, TrackState.OCCLUDED, TrackState.OUTSIDE


def truth(points, state=None):
    points = np.asarray(points, np.float32)
    state = np.full(points.shape[:2], VISIBLE) if state is None else np.asarray(state)
    return Tracks(points, state)


def line(k, t, step=2.0):
    """k points that move `step` pixels right per frame."""
    start = 10.0 + 5 * np.arange(k)[:, None]
    return np.stack(np.broadcast_arrays(start + step * np.arange(t), start), axis=-1)


def test_trajectory_error_is_the_mean_distance_after_the_first_frame():
    true = truth(line(2, 5))
    assert metrics.trajectory_error(true.points, true) == 0
    # A still video: distances 2, 4, 6, 8 for either point.
    still = np.repeat(true.points[:, :1], 5, axis=1)
    assert metrics.trajectory_error(still, true) == pytest.approx(5.0)
    # An error in the first frame, where the point is given, is no error of the video.
    moved = true.points.copy()
    moved[:, 0] += 100
    assert metrics.trajectory_error(moved, true) == 0


def test_only_points_visible_in_the_truth_are_scored():
    state = [[VISIBLE, VISIBLE, OCCLUDED, OUTSIDE, VISIBLE]]
    true = truth(line(1, 5), state)
    wrong_where_unseen = true.points.copy()
    wrong_where_unseen[0, 2:4] += 50
    assert metrics.trajectory_error(wrong_where_unseen, true) == 0
    wrong_where_unseen[0, 4, 0] += 3
    assert metrics.trajectory_error(wrong_where_unseen, true) == pytest.approx(1.5)


def test_points_count_alike_however_often_they_are_seen():
    state = np.full((2, 5), VISIBLE)
    state[0, 2:] = OCCLUDED  # the first point is scored in one frame, the second in four
    true = truth(line(2, 5), state)
    tracked = true.points.copy()
    tracked[0, :, 1] += 6
    tracked[1, :, 1] += 2
    assert metrics.trajectory_error(tracked, true) == pytest.approx(4.0)


def test_nothing_to_score_is_nan():
    true = truth(line(1, 4), [[VISIBLE, OCCLUDED, OUTSIDE, OUTSIDE]])
    assert math.isnan(metrics.trajectory_error(true.points, true))
    empty = Tracks(np.zeros((0, 4, 2)), np.zeros((0, 4)))
    assert math.isnan(metrics.trajectory_error(empty.points, empty))
    assert math.isnan(metrics.end_point_error(empty.points, empty))
    assert math.isnan(metrics.background_motion(empty.points, empty))


def test_end_point_is_the_last_visible_frame_of_each_point():
    state = np.full((2, 4), VISIBLE)
    state[1, 3] = OUTSIDE
    true = truth(line(2, 4), state)
    tracked = true.points.copy()
    tracked[0, 3, 0] += 4  # counts: the last frame
    tracked[0, 2, 0] += 99  # does not: earlier
    tracked[1, 2, 0] += 2  # counts: the last visible one
    tracked[1, 3, 0] += 99  # does not: outside
    assert metrics.end_point_error(tracked, true) == pytest.approx(3.0)


def test_shapes_that_disagree_are_refused():
    true = truth(line(2, 4))
    with pytest.raises(ValueError, match="disagree"):
        metrics.trajectory_error(true.points[:, :3], true)


def test_background_motion_leaves_out_the_true_motion():
    true = truth(line(3, 5, step=1.5))
    assert metrics.background_motion(true.points, true) == pytest.approx(0, abs=1e-6)
    # A tracker that starts a pixel off is no motion.
    assert metrics.background_motion(true.points + 1, true) == pytest.approx(0, abs=1e-5)
    swept = true.points + np.arange(5)[None, :, None] * np.array([0, 2.0])
    assert metrics.background_motion(swept, true) == pytest.approx(5.0)


def moving_square(height=40, width=60, frames=5):
    """A textured square that moves 4 pixels right per frame on a plain ground."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (15, 15, 3))
    video = np.full((frames, height, width, 3), 90, np.uint8)
    for i in range(frames):
        video[i, 12:27, 5 + 4 * i : 20 + 4 * i] = texture
    points = np.stack([12.0 + 4 * np.arange(frames), np.full(frames, 19.0)], axis=-1)[None]
    return video, truth(points)


def test_appearance_does_not_drift_where_the_object_arrives_unchanged():
    video, true = moving_square()
    drift = metrics.appearance_drift(video, video[0], true)
    assert drift == pytest.approx((0, 0), abs=1e-6)


def test_appearance_drifts_where_the_object_stays_behind_or_dissolves():
    video, true = moving_square()
    frozen = np.repeat(video[:1], len(video), axis=0)
    left = metrics.appearance_drift(frozen, video[0], true)
    assert left.difference > 0.1 and left.decorrelation > 0.4
    faded = (video * 0.2 + 70).astype(np.uint8)
    dissolved = metrics.appearance_drift(faded, video[0], true)
    assert dissolved.difference > 0.1
    # A change of contrast alone is no loss of structure.
    assert dissolved.decorrelation < 0.05


def test_appearance_is_not_scored_where_the_truth_is_hidden():
    video, true = moving_square()
    state = true.state.copy()
    state[:, 3:] = OCCLUDED
    spoilt = video.copy()
    spoilt[3:] = 0
    assert metrics.appearance_drift(spoilt, video[0], Tracks(true.points, state)).difference == 0


def test_undisturbed_points_keep_away_from_objects_and_borders():
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    objects = np.zeros((3, 48, 64), np.uint8)
    objects[0, 10:20, 10:20] = 1
    objects[2, 10:20, 30:40] = 2  # comes there only later
    points = metrics.undisturbed_points(picture, objects, 12, margin=4)
    assert 4 <= len(points) <= 12
    covered = objects.any(axis=0)
    for x, y in np.rint(points).astype(int):
        assert not covered[y - 4 : y + 5, x - 4 : x + 5].any()
        assert 2 <= x <= 61 and 2 <= y <= 45


def test_undisturbed_points_may_be_none():
    plain = np.full((32, 32, 3), 7, np.uint8)
    assert metrics.undisturbed_points(plain, np.zeros((2, 32, 32), np.uint8), 5).shape == (0, 2)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert metrics.undisturbed_points(noise, np.ones((2, 32, 32), np.uint8), 5).shape == (0, 2)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        estimate = metrics.bootstrap_interval(rng.normal(5, 2, 40), draws=400, seed=seed)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= 5 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_leaves_out_clips_without_a_score():
    values = np.array([1.0, np.nan, 3.0])
    assert metrics.bootstrap_interval(values).value == 2.0
    assert math.isnan(metrics.bootstrap_interval(np.array([np.nan])).value)


def test_ratio_is_paired():
    """Clips differ a hundredfold in motion, their ratio hardly: pairing makes it certain."""
    rng = np.random.default_rng(4)
    ceiling = np.exp(rng.normal(0, 1.5, 64))
    ratio = metrics.bootstrap_ratio(0.3 * ceiling, ceiling)
    assert ratio == pytest.approx((0.3, 0.3, 0.3))
    noisy = metrics.bootstrap_ratio(0.3 * ceiling * rng.uniform(0.9, 1.1, 64), ceiling)
    assert noisy.low < noisy.value < noisy.high
    assert noisy.high - noisy.low < 0.05


def test_ratio_without_clips_or_to_zero_is_nan():
    assert math.isnan(metrics.bootstrap_ratio(np.array([np.nan]), np.array([1.0])).value)
    assert math.isnan(metrics.bootstrap_ratio(np.array([1.0]), np.array([0.0])).value)
