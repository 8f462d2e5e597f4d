import numpy as np
import pytest
from made_tracks import moving_tracks

from nuwa_jax.motion.tracks import Tracks, TrackState, pchip


def test_tracks_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match=r"\[k t 2\]"):
        Tracks(np.zeros((2, 3, 2)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="0..3"):
        Tracks(np.zeros((1, 1, 2)), np.full((1, 1), 4))
    with pytest.raises(ValueError, match="track 1 is not finite in frame 2"):
        points = np.zeros((2, 3, 2))
        points[1, 2, 0] = np.nan
        Tracks(points, np.ones((2, 3)))


def test_unspecified_points_tell_nothing():
    tracks = Tracks(np.full((1, 2, 2), 7.0), np.array([[TrackState.VISIBLE, 0]]))
    np.testing.assert_array_equal(tracks.points[0], [[7, 7], [0, 0]])


def test_padding_adds_unspecified_tracks_and_never_drops_any():
    tracks = moving_tracks([1, 2])
    padded = tracks.pad(5)
    assert (padded.num_tracks, padded.num_frames) == (5, 7)
    np.testing.assert_array_equal(padded.select([0, 1]).points, tracks.points)
    assert (padded.state[2:] == TrackState.UNSPECIFIED).all()
    with pytest.raises(ValueError, match="cannot pad 2 tracks to 1"):
        tracks.pad(1)


def test_resizing_keeps_the_corners_of_the_picture():
    corners = np.array([[[-0.5, -0.5]], [[55.5, 39.5]]])
    resized = Tracks(corners, np.ones((2, 1))).resize((40, 56), (20, 84))
    np.testing.assert_allclose(resized.points[:, 0], [[-0.5, -0.5], [83.5, 19.5]])


def test_pchip_keeps_the_ends_and_never_overshoots():
    values = np.array([[0.0], [0.0], [10.0], [10.0]])
    result = pchip(values, np.arange(4.0), np.linspace(-1, 5, 61))
    assert result.min() == 0 and result.max() == 10
    assert (np.diff(result[:, 0]) >= 0).all()
