"""Drawings: what is drawn is where the drag is, and nothing else changes."""

import numpy as np
import pytest

from nuwa_jax.motion import drawing
from nuwa_jax.motion.tracks import Tracks, TrackState

HEIGHT, WIDTH, FRAMES = 60, 90, 5
GREY = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)


def drag(start=(20.0, 30.0), step=(10.0, 0.0), states=None):
    points = np.array(start) + np.arange(FRAMES)[:, None] * np.array(step)
    states = np.full(FRAMES, TrackState.VISIBLE) if states is None else np.asarray(states)
    return Tracks(points[None], states[None])


def changed(picture, ground):
    return (np.abs(picture.astype(int) - ground.astype(int)) > 8).any(axis=-1)


@pytest.mark.parametrize("scale", [1, 3])
def test_path_is_drawn_where_the_drag_goes(scale):
    drawn = drawing.draw_drags(GREY, drag(), scale=scale, numbers=False)
    assert drawn.shape == (HEIGHT * scale, WIDTH * scale, 3) and drawn.dtype == np.uint8
    marks = changed(drawn, np.full_like(drawn, 100))
    rows, columns = np.nonzero(marks)
    # Pixel 30's middle is at 30.5 pixel widths from the top.
    assert abs(rows.mean() / scale - 30) < 1
    assert columns.min() / scale > 12 and columns.max() / scale < 70
    along = marks[round(30.5 * scale), round(28 * scale) : round(56 * scale)]
    assert along.all()


def test_nothing_else_changes():
    drawn = drawing.draw_drags(GREY, drag())
    assert not changed(drawn, GREY)[45:].any()
    untouched = drawing.draw_drags(GREY, Tracks(np.zeros((0, FRAMES, 2)), np.zeros((0, FRAMES))))
    np.testing.assert_array_equal(untouched, GREY)
    assert (GREY == 100).all()


def test_path_grows_with_the_frames():
    extents = []
    for frame in (0, 2, 4):
        drawn = drawing.draw_drags(GREY, drag(), frame=frame, numbers=False)
        extents.append(np.nonzero(changed(drawn, GREY))[1].max())
    assert extents[0] < 27 and 38 <= extents[1] < 47 and extents[2] >= 58


def test_an_anchor_is_a_cross_and_hidden_stretches_are_dashed():
    anchor = drawing.draw_drags(GREY, drag(step=(0.0, 0.0)), numbers=False)
    moving = drawing.draw_drags(GREY, drag(), numbers=False)
    assert 0 < changed(anchor, GREY).sum() < changed(moving, GREY).sum()
    hidden = [TrackState.VISIBLE, *[TrackState.OCCLUDED] * 3, TrackState.VISIBLE]
    dashed = drawing.draw_drags(GREY, drag(states=hidden), numbers=False)
    stretch = changed(dashed, GREY)[30, 28:48]
    assert stretch.any() and not stretch.all()


def test_unspecified_frames_are_not_drawn():
    cut = [TrackState.VISIBLE, TrackState.VISIBLE, 0, 0, 0]
    drawn = drawing.draw_drags(GREY, drag(states=cut), numbers=False)
    marks = np.nonzero(changed(drawn, GREY))
    assert marks[1].max() < 40 and marks[0].min() > 20  # nor are their stored zeros


def test_drags_have_colours_of_their_own_and_numbers():
    two = Tracks.concatenate([drag((20.0, 15.0)), drag((20.0, 45.0))])
    plain = drawing.draw_drags(GREY, two, scale=2, numbers=False)
    first, second = (plain[2 * y, 60:90].astype(int) for y in (15, 45))
    assert first[:, 0].max() > first[:, 2].max() and second[:, 2].max() > second[:, 0].max()
    numbered = drawing.draw_drags(GREY, two, scale=2)
    assert changed(numbered, plain).any()


def test_points_outside_the_picture_are_no_error():
    drawn = drawing.draw_drags(GREY, drag(start=(70.0, 30.0), step=(20.0, -15.0)))
    assert drawn.shape == GREY.shape
