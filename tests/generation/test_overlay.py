"""Drawings: what is drawn is where the drag is, and nothing else changes."""

import numpy as np
import pytest
from drawn_drags import FRAMES, GREY, HEIGHT, WIDTH, changed, drag

from nuwa_jax.generation import overlay


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
