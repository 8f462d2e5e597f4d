"""Videos with their drags drawn on them, and sheets of pictures to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from nuwa_jax.motion.drawing import draw_drags
from nuwa_jax.motion.tracks import Tracks

_INK = (25, 25, 25)
_PAPER = (255, 255, 255)


def overlay_video(
    video: UInt8[np.ndarray, "t h w 3"], drags: Tracks, *, scale: int = 1
) -> UInt8[np.ndarray, "t H W 3"]:
    """The video with drags growing on it, frame by frame.

    Raises:
      ValueError: video and drags have different numbers of frames.
    """
    if len(video) != drags.num_frames:
        raise ValueError(f"the video has {len(video)} frames, its drags {drags.num_frames}")
    return np.stack(
        [draw_drags(frame, drags, frame=i, scale=scale) for i, frame in enumerate(video)]
    )


def side_by_side(
    videos: Sequence[UInt8[np.ndarray, "t h w 3"]], *, gap: int = 4
) -> UInt8[np.ndarray, "t h W 3"]:
    """Videos of one size and length next to each other, with a white gap between them."""
    t, height = videos[0].shape[:2]
    strip = np.full((t, height, gap, 3), 255, np.uint8)
    parts = [part for video in videos for part in (strip, video)]
    return np.concatenate(parts[1:], axis=2)


def contact_sheet(
    rows: Sequence[Sequence[UInt8[np.ndarray, "h w 3"] | None]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    gap: int = 4,
) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures in a table on white.

    Args:
      rows: pictures of one size, rows of equal length; None leaves a cell empty.
      columns: a title above each column; titles that are too wide for a picture are cut.
      labels: a line of text above each row, over its whole width.
      gap: pixels between pictures.

    Raises:
      ValueError: there is no picture, their sizes differ, or titles do not fit their number.
    """
    cells = [cell for row in rows for cell in row if cell is not None]
    if not cells or len({cell.shape for cell in cells}) != 1 or len({len(r) for r in rows}) != 1:
        raise ValueError("a contact sheet takes pictures of one size in rows of equal length")
    if (columns and len(columns) != len(rows[0])) or (labels and len(labels) != len(rows)):
        raise ValueError(
            f"expected {len(rows[0])} column titles and {len(rows)} row labels or none, "
            f"got {len(columns)} and {len(labels)}"
        )
    height, width = cells[0].shape[:2]
    text = max(10, min(16, width // 9))
    line = text + 6
    head = line if columns else 0
    step = height + gap + (line if labels else 0)
    sheet = Image.new(
        "RGB", (gap + len(rows[0]) * (width + gap), head + gap + len(rows) * step), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=text)
    for column, title in enumerate(columns):
        left = gap + column * (width + gap)
        draw.text((left, gap), _fit(title, font, width), fill=_INK, font=font)
    for row, pictures in enumerate(rows):
        top = head + gap + row * step
        if labels:
            draw.text((gap, top), _fit(labels[row], font, sheet.width), fill=_INK, font=font)
            top += line
        for column, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (gap + column * (width + gap), top))
    return np.asarray(sheet)


def _fit(text: str, font: ImageFont.ImageFont, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
