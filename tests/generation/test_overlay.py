"""Drawings: what is drawn is where the drag is, and nothing else changes."""

import numpy as np
import pytest

from nuwa_jax.generation import overlay
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
    drawn = overlay.draw_drags(GREY, drag(), scale=scale, numbers=False)
    assert drawn.shape == (HEIGHT * scale, WIDTH * scale, 3) and drawn.dtype == np.uint8
    marks = changed(drawn, np.full_like(drawn, 100))
    rows, columns = np.nonzero(marks)
    # Pixel 30's middle is at 30.5 pixel widths from the top.
    assert abs(rows.mean() / scale - 30) < 1
    assert columns.min() / scale > 12 and columns.max() / scale < 70
    along = marks[round(30.5 * scale), round(28 * scale) : round(56 * scale)]
    assert along.all()


def test_nothing_else_changes():
    drawn = overlay.draw_drags(GREY, drag())
    assert not changed(drawn, GREY)[45:].any()
    untouched = overlay.draw_drags(GREY, Tracks(np.zeros((0, FRAMES, 2)), np.zeros((0, FRAMES))))
    np.testing.assert_array_equal(untouched, GREY)
    assert (GREY == 100).all()


def test_path_grows_with_the_frames():
    extents = []
    for frame in (0, 2, 4):
        drawn = overlay.draw_drags(GREY, drag(), frame=frame, numbers=False)
        extents.append(np.nonzero(changed(drawn, GREY))[1].max())
    assert extents[0] < 27 and 38 <= extents[1] < 47 and extents[2] >= 58


def test_an_anchor_is_a_cross_and_hidden_stretches_are_dashed():
    anchor = overlay.draw_drags(GREY, drag(step=(0.0, 0.0)), numbers=False)
    moving = overlay.draw_drags(GREY, drag(), numbers=False)
    assert 0 < changed(anchor, GREY).sum() < changed(moving, GREY).sum()
    hidden = [TrackState.VISIBLE, *[TrackState.OCCLUDED] * 3, TrackState.VISIBLE]
    dashed = overlay.draw_drags(GREY, drag(states=hidden), numbers=False)
    stretch = changed(dashed, GREY)[30, 28:48]
    assert stretch.any() and not stretch.all()


def test_unspecified_frames_are_not_drawn():
    cut = [TrackState.VISIBLE, TrackState.VISIBLE, 0, 0, 0]
    drawn = overlay.draw_drags(GREY, drag(states=cut), numbers=False)
    marks = np.nonzero(changed(drawn, GREY))
    assert marks[1].max() < 40 and marks[0].min() > 20  # nor are their stored zeros


def test_drags_have_colours_of_their_own_and_numbers():
    two = Tracks.concatenate([drag((20.0, 15.0)), drag((20.0, 45.0))])
    plain = overlay.draw_drags(GREY, two, scale=2, numbers=False)
    first, second = (plain[2 * y, 60:90].astype(int) for y in (15, 45))
    assert first[:, 0].max() > first[:, 2].max() and second[:, 2].max() > second[:, 0].max()
    numbered = overlay.draw_drags(GREY, two, scale=2)
    assert changed(numbered, plain).any()


def test_points_outside_the_picture_are_no_error():
    drawn = overlay.draw_drags(GREY, drag(start=(70.0, 30.0), step=(20.0, -15.0)))
    assert drawn.shape == GREY.shape


def test_video_gets_its_drags_frame_by_frame():
    video = np.repeat(GREY[None], FRAMES, axis=0)
    drawn = overlay.overlay_video(video, drag(), scale=2)
    assert drawn.shape == (FRAMES, 2 * HEIGHT, 2 * WIDTH, 3)
    ink = [changed(frame, np.full_like(frame, 100)).sum() for frame in drawn]
    assert all(later > earlier for earlier, later in zip(ink[1:], ink[2:], strict=False))
    with pytest.raises(ValueError, match="frames"):
        overlay.overlay_video(video[:-1], drag())


def test_videos_side_by_side_keep_their_pixels():
    left, right = (np.full((3, 4, 5, 3), value, np.uint8) for value in (10, 200))
    both = overlay.side_by_side([left, right], gap=2)
    assert both.shape == (3, 4, 12, 3)
    assert (both[:, :, :5] == 10).all() and (both[:, :, 7:] == 200).all()
    assert (both[:, :, 5:7] == 255).all()


def test_sheet_holds_every_picture_in_its_place():
    pictures = [[np.full((20, 30, 3), 40 * r + 20 * c, np.uint8) for c in range(3)] for r in (0, 1)]
    sheet = overlay.contact_sheet(pictures, gap=4)
    assert sheet.shape == (4 + 2 * 24, 4 + 3 * 34, 3)
    for r in range(2):
        for c in range(3):
            cell = sheet[4 + 24 * r : 24 + 24 * r, 4 + 34 * c : 34 + 34 * c]
            np.testing.assert_array_equal(cell, pictures[r][c])


def test_sheet_takes_titles_and_empty_cells():
    picture = np.zeros((20, 30, 3), np.uint8)
    bare = overlay.contact_sheet([[picture, None]])
    titled = overlay.contact_sheet(
        [[picture, None]], columns=["a title that is far too long", "b"], labels=["row"]
    )
    assert titled.shape[0] > bare.shape[0] and titled.shape[1] == bare.shape[1]
    with pytest.raises(ValueError, match="2 column titles"):
        overlay.contact_sheet([[picture, None]], columns=["one"])
    with pytest.raises(ValueError, match="one size"):
        overlay.contact_sheet([[picture, picture[:-1]]])
    with pytest.raises(ValueError, match="one size"):
        overlay.contact_sheet([])
