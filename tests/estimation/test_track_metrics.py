"""What the quality report measures, on cases worked out by hand."""

import numpy as np
import pytest

from nuwa_jax.estimation.metrics import (
    count_tracks,
    end_point_errors,
    forward_backward_errors,
    track_scores,
)
from nuwa_jax.motion.tracks import Tracks, TrackState

SEEN, HIDDEN, OUT = TrackState.VISIBLE, TrackState.OCCLUDED, TrackState.OUTSIDE
SIZE = (128, 256)  # a pixel is 1 reference pixel along x and 2 along y


def straight(states, step=(0.0, 0.0), start=(20.0, 20.0)):
    """One track that moves by `step` per frame."""
    path = np.array(start) + np.arange(len(states))[:, None] * np.array(step)
    return path, states


def tracks(*each):
    return Tracks(np.stack([path for path, _ in each]), np.array([state for _, state in each]))


def test_every_share_of_a_worked_case():
    truth = tracks(
        straight([SEEN, SEEN, SEEN], (5, 0)),  # moves, found
        straight([SEEN, SEEN, SEEN]),  # found, 3 pixels of y too low: 6 reference pixels
        straight([SEEN, HIDDEN, HIDDEN]),  # called visible throughout
        straight([SEEN, SEEN, OUT]),  # given up a frame too early
        straight([HIDDEN, SEEN, SEEN]),  # no query
    )
    estimate = tracks(
        straight([SEEN, SEEN, SEEN], (5.5, 0)),
        (truth.points[1] + np.array([[0, 0], [0, 3], [0, 3]]), [SEEN] * 3),
        straight([SEEN, SEEN, SEEN]),
        straight([SEEN, HIDDEN, HIDDEN]),
        straight([SEEN, HIDDEN, HIDDEN]),
    )
    scores = track_scores([count_tracks(estimate, truth, SIZE)])
    assert scores["queries"] == 4
    # Frames visible in both: errors of 0.5 and 1 of the first, 6 and 6 of the second.
    assert scores["median_error"] == pytest.approx(3.5)
    assert scores["survival"] == 3 / 4  # all but the fourth
    assert scores["visible_throughout"] == 2 / 4
    assert scores["ok4"] == pytest.approx(1 / 3)
    assert scores["ok4_moving"] == 1.0  # only the first moves
    assert scores["occlusion_recall"] == pytest.approx(1 / 3)  # of two hidden, one outside
    assert scores["occlusion_precision"] == 1 / 2
    assert scores["round_trip"] is None
    told = {name: count for name, count in scores["states"].items() if count}
    assert told == {
        "visible as visible": 4,
        "visible as occluded": 1,
        "occluded as visible": 2,
        "outside as occluded": 1,
    }


def test_round_trips_count_where_a_point_is_alive_both_ways():
    truth = tracks(*[straight([SEEN, SEEN])] * 3)
    estimate = tracks(straight([SEEN, SEEN]), straight([SEEN, HIDDEN]), straight([SEEN, SEEN]))
    back = tracks(
        straight([SEEN, SEEN], (2.0, 0.0)),
        straight([SEEN, SEEN], (9.0, 0.0)),
        straight([SEEN, HIDDEN], (9.0, 0.0)),
    )
    scores = track_scores([count_tracks(estimate, truth, SIZE, back)])
    assert scores["round_trip"] == pytest.approx(2.0)


def test_clips_are_added_up_and_no_points_are_no_scores():
    truth = tracks(straight([SEEN, SEEN]), straight([SEEN, HIDDEN]))
    lost = tracks(*[straight([SEEN, HIDDEN])] * 2)
    one, other = count_tracks(truth, truth, SIZE), count_tracks(lost, truth, SIZE)
    scores = track_scores([one, other])
    assert scores["queries"] == 4 and scores["survival"] == 1 / 4 and scores["ok4"] == 1
    assert scores["occlusion_recall"] == 1 and scores["occlusion_precision"] == 2 / 3
    nothing = track_scores([count_tracks(truth.select([]), truth.select([]), SIZE)])
    assert nothing["queries"] == 0
    assert nothing["ok4"] is None and nothing["median_error"] is None


def test_unknown_flow_is_left_out():
    truth = np.zeros((2, 3, 2), np.float32)
    truth[0, 0], truth[0, 1, 1] = 1.7e9, np.nan
    truth[1, 2] = 3, 4
    errors = end_point_errors(np.zeros_like(truth), truth)
    assert sorted(errors.tolist()) == [0, 0, 0, 5]


def test_flow_that_is_undone_has_no_forward_backward_error():
    forward = np.broadcast_to(np.float32([2, -1]), (6, 8, 2))
    np.testing.assert_allclose(forward_backward_errors(forward, -forward), 0, atol=1e-6)
    errors = forward_backward_errors(forward, np.zeros_like(forward))
    np.testing.assert_allclose(errors, 5**0.5, rtol=1e-6)
    assert len(errors) == 5 * 6  # the others leave the picture
