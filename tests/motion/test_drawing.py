"""Drawings: what is drawn is where the drag is, and nothing else changes."""

import numpy as np
import pytest
from drawn_drags import FRAMES, GREY, HEIGHT, WIDTH, changed, drag

from nuwa_jax.motion import drawing
from nuwa_jax.motion.tracks import Tracks, TrackState


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


def test_tracked_points_have_the_colours_of_their_states():
    states = [TrackState.VISIBLE, TrackState.OCCLUDED, TrackState.OUTSIDE, 0]
    start = np.array([[20.0, 15.0], [50.0, 15.0], [200.0, 45.0], [60.0, 50.0]])
    tracks = Tracks(np.repeat(start[:, None], 3, axis=1), np.repeat(np.c_[states], 3, axis=1))
    drawn = drawing.draw_tracks(GREY, tracks, 1, scale=2)
    assert drawn.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    for (x, y), state in zip(start[:2], states[:2], strict=True):
        colour = np.array(drawing.STATE_COLOURS[state])
        assert np.abs(drawn[int(2 * y), int(2 * x)].astype(int) - colour).max() < 12
    assert changed(drawn, np.full_like(drawn, 100))[80:100, -6:].any()  # at the border
    assert not changed(drawn, np.full_like(drawn, 100))[94:108, 100:140].any()  # unspecified


def test_tails_show_where_points_were():
    long = drawing.draw_tracks(GREY, drag(), 4, tail=4)
    short = drawing.draw_tracks(GREY, drag(), 4, tail=1)
    columns = [np.nonzero(changed(each, GREY))[1].min() for each in (long, short)]
    assert columns[0] < 23 and 46 < columns[1] < 52


def test_flow_colours_tell_direction_and_length():
    directions = np.array([[[1, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [0.5, 0], [4, 0]]], float)
    colours = drawing.colour_flow(directions, largest=1.0)[0].astype(int)
    red, green, cyan, violet, none, pale, dark = colours
    assert red.tolist() == [255, 0, 0] and cyan.tolist() == [0, 255, 255]
    assert green.argmax() == 1 and violet.argmax() == 2
    assert none.tolist() == [255] * 3 and pale[0] == 255 and 100 < pale[1] < 150
    assert 0 < dark[0] < 128 and not dark[1:].any()
    assert (drawing.colour_flow(np.zeros((3, 5, 2))) == 255).all()
    assert drawing.colour_flow(np.full((3, 5, 2), np.nan)).shape == (3, 5, 3)


def test_the_wheel_is_the_key_to_the_colours():
    wheel = drawing.flow_wheel(41)
    assert wheel[20, 40].tolist() == [255, 0, 0] and wheel[20, 0].tolist() == [0, 255, 255]
    assert wheel[20, 20].min() > 245 and (wheel[0, 0] == 255).all()
