"""Drags, tracks and flow drawn on pictures.

Of a drag, the handle is a hollow ring, the path a line in the drag's colour on a white halo, dashed
where the point is hidden, with an arrow head at its end; an anchor, which stays where it is, is a
cross. Each drag has a colour and a number.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from nuwa_jax.motion.tracks import Tracks, TrackState, resize_points

# Tableau's ten, brightened: told apart on any picture, also by most colour-blind people.
COLOURS = (
    (255, 64, 48),
    (40, 128, 255),
    (255, 190, 0),
    (0, 190, 90),
    (190, 80, 255),
    (0, 200, 220),
    (255, 120, 0),
    (255, 90, 180),
    (130, 200, 40),
    (150, 100, 70),
)
# What is known of a tracked point in a frame; unspecified ones are not drawn.
STATE_COLOURS = {
    TrackState.VISIBLE: (0, 230, 110),
    TrackState.OCCLUDED: (255, 150, 0),
    TrackState.OUTSIDE: (255, 40, 90),
}
STILL = 0.5  # pixels: a drag that never gets further than this from its handle is an anchor

_SUPERSAMPLE = 2
_PAPER = (255, 255, 255)
_INK = (25, 25, 25)


def enlarge(picture: UInt8[np.ndarray, "h w 3"], scale: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture, `scale` times larger (Lanczos)."""
    if scale == 1:
        return picture
    height, width = picture.shape[:2]
    size = (width * scale, height * scale)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def draw_drags(
    picture: UInt8[np.ndarray, "h w 3"],
    drags: Tracks,
    *,
    frame: int | None = None,
    scale: int = 1,
    numbers: bool = True,
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture, `scale` times larger, with drags drawn on it.

    Args:
      picture: a frame of the clip whose pixels the drags are in.
      drags: [k t 2]; unspecified frames are not drawn.
      frame: draws only what is travelled until this frame, and a filled dot where each point is by
        then. None: the whole path, with its arrow head.
      scale: how many times larger the result is.
      numbers: whether to write each drag's number, from 1, beside its handle.
    """
    height, width = picture.shape[:2]
    canvas = Image.fromarray(enlarge(picture, scale * _SUPERSAMPLE))
    # The halo of one drag never hides another drag: all halos first, then all strokes.
    pen = _Pen(ImageDraw.Draw(canvas), (height * scale, width * scale))
    size = (canvas.height, canvas.width)
    paths = [
        (resize_points(points[specified], (height, width), size), state[specified])
        for points, state in zip(drags.points, drags.state, strict=True)
        for specified in [_drawn_frames(state, frame)]
    ]
    still = STILL * scale * _SUPERSAMPLE
    for halo in (True, False):
        for index, (path, state) in enumerate(paths):
            if len(path):
                colour = _PAPER if halo else COLOURS[index % len(COLOURS)]
                pen.drag(path, state, colour, halo, arrow=frame is None, still=still)
    if numbers:
        for index, (path, _) in enumerate(paths):
            if len(path):
                pen.number(path[0], index + 1, COLOURS[index % len(COLOURS)])
    target = (width * scale, height * scale)
    return np.asarray(canvas.resize(target, Image.Resampling.BOX))


def draw_tracks(
    picture: UInt8[np.ndarray, "h w 3"],
    tracks: Tracks,
    frame: int,
    *,
    scale: int = 1,
    tail: int = 5,
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture, `scale` times larger, with tracked points as they are in a frame.

    A dot in the colour of its state (`STATE_COLOURS`), on a line where the point was in the frames
    before. Points beyond the border are drawn at the border, where they would be seen.

    Args:
      picture: frame `frame` of the clip.
      tracks: in pixels of the picture.
      frame: which frame the picture is.
      scale: how many times larger the result is.
      tail: how many frames back the line goes.
    """
    height, width = picture.shape[:2]
    canvas = Image.fromarray(enlarge(picture, scale * _SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    size = (canvas.height, canvas.width)
    radius = _SUPERSAMPLE * max(1.0, min(height, width) * scale / 130)
    for points, state in zip(tracks.points, tracks.state, strict=True):
        colour = STATE_COLOURS.get(int(state[frame]))
        if colour is None:
            continue
        shown = np.arange(max(0, frame - tail), frame + 1)
        path = resize_points(points[shown[state[shown] > 0]], (height, width), size)
        path = np.clip(path, 0, [size[1] - 1, size[0] - 1])
        if len(path) > 1:
            draw.line([tuple(point) for point in path], fill=colour, width=_SUPERSAMPLE)
        draw.ellipse([*(path[-1] - radius), *(path[-1] + radius)], fill=colour, outline=_INK)
    target = (width * scale, height * scale)
    return np.asarray(canvas.resize(target, Image.Resampling.BOX))


def colour_flow(
    flow: Float[np.ndarray, "h w 2"], largest: float | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Flow as colours: the hue is its direction, white is none.

    To the right is red, down is yellow-green, to the left cyan, up violet, in even steps of hue.

    Args:
      flow: pixels per frame.
      largest: length that has the full colour; by default the 99th percentile of what is there.
        Longer ones are darker, the longer the darker.
    """
    flow = np.nan_to_num(np.asarray(flow, np.float64))
    length = np.hypot(flow[..., 0], flow[..., 1])
    if largest is None:
        largest = float(np.percentile(length, 99)) if length.size else 0.0
    length = length / max(largest, 1e-6)
    hue = np.mod(np.arctan2(flow[..., 1], flow[..., 0]), 2 * np.pi) / (2 * np.pi)
    # From HSV: each of red, green and blue is a trapezium over the hue.
    offset = np.array([5.0, 3.0, 1.0])
    position = np.mod(offset + 6 * hue[..., None], 6)
    ramp = np.clip(np.minimum(position, 4 - position), 0, 1)
    value = 1 / np.maximum(length, 1)
    colour = value[..., None] * (1 - np.minimum(length, 1)[..., None] * ramp)
    return np.rint(255 * colour).astype(np.uint8)


def flow_wheel(side: int) -> UInt8[np.ndarray, "side side 3"]:
    """What the colours of `colour_flow` mean: the colour at a place is that of the flow there."""
    axis = np.linspace(-1, 1, side)
    flow = np.stack(np.meshgrid(axis, axis), axis=-1)
    wheel = colour_flow(flow, 1.0)
    wheel[np.hypot(flow[..., 0], flow[..., 1]) > 1] = 255
    return wheel


def _drawn_frames(state: UInt8[np.ndarray, " t"], frame: int | None) -> np.ndarray:
    until = len(state) if frame is None else frame + 1
    return (state != TrackState.UNSPECIFIED) & (np.arange(len(state)) < until)


class _Pen:
    """Strokes in sizes that fit the picture. All coordinates are those of the large canvas."""

    def __init__(self, draw: ImageDraw.ImageDraw, final_hw: tuple[int, int]) -> None:
        self._draw = draw
        short = min(final_hw)
        self._stroke = _SUPERSAMPLE * max(1.0, short / 200)
        self._halo = _SUPERSAMPLE * max(1.0, short / 250)
        self._ring = _SUPERSAMPLE * max(2.5, short / 55)
        self._font = ImageFont.load_default(size=_SUPERSAMPLE * max(9, round(short / 22)))

    def drag(
        self,
        path: Float[np.ndarray, "n 2"],
        state: UInt8[np.ndarray, " n"],
        colour: tuple[int, int, int],
        halo: bool,
        arrow: bool,
        still: float,
    ) -> None:
        width = round(self._stroke + (2 * self._halo if halo else 0))
        if np.linalg.norm(path - path[0], axis=-1).max() <= still:
            self._cross(path[0], colour, width, halo)
            return
        for start, end, hidden in zip(
            path[:-1], path[1:], (state != TrackState.VISIBLE)[1:], strict=True
        ):
            # Three dashes per frame, so that hidden frames can still be counted.
            for part in range(3 if hidden else 1):
                share = np.array([part, part + 0.55]) / 3 if hidden else np.array([0.0, 1.0])
                ends = start + share[:, None] * (end - start)
                self._draw.line([tuple(p) for p in ends], fill=colour, width=width, joint="curve")
        self._circle(path[0], self._ring, colour, width)
        if arrow:
            self._arrow_head(path, colour, halo)
        else:
            radius = self._ring * 0.7 + (self._halo if halo else 0)
            self._dot(path[-1], radius, colour)

    def number(self, point: Float[np.ndarray, "2"], number: int, colour: tuple[int, ...]) -> None:
        x, y = point + 1.2 * self._ring * np.array([1, -1])
        self._draw.text(
            (x, y),
            str(number),
            fill=colour,
            font=self._font,
            anchor="ls",
            stroke_width=round(self._halo),
            stroke_fill=_PAPER,
        )

    def _cross(
        self, point: Float[np.ndarray, "2"], colour: tuple[int, ...], width: int, halo: bool
    ) -> None:
        arm = self._ring + (self._halo if halo else 0)
        for direction in ((1, 1), (1, -1)):
            ends = point + arm * np.array([[-1], [1]]) * np.array(direction)
            self._draw.line([tuple(p) for p in ends], fill=colour, width=width)

    def _circle(
        self, point: Float[np.ndarray, "2"], radius: float, colour: tuple[int, ...], width: int
    ) -> None:
        outer = radius + width / 2
        box = [*(point - outer), *(point + outer)]
        self._draw.ellipse(box, outline=colour, width=width)

    def _dot(self, point: Float[np.ndarray, "2"], radius: float, colour: tuple[int, ...]) -> None:
        self._draw.ellipse([*(point - radius), *(point + radius)], fill=colour)

    def _arrow_head(
        self, path: Float[np.ndarray, "n 2"], colour: tuple[int, ...], halo: bool
    ) -> None:
        length = 1.8 * self._ring
        # The direction is that of the last stretch as long as the head: single steps jitter.
        gap = np.linalg.norm(path - path[-1], axis=-1)
        behind = np.flatnonzero(gap >= length)
        tail = path[behind[-1]] if behind.size else path[int(gap.argmax())]
        angle = math.atan2(*(path[-1] - tail)[::-1])
        grow = self._halo if halo else 0.0
        corners = [
            path[-1] + (length + 2 * grow) * np.array([math.cos(angle), math.sin(angle)]) * 0.5
        ]
        for side in (-1, 1):
            turn = angle + math.pi + side * 0.55
            reach = length + 2 * grow
            corners.append(corners[0] + reach * np.array([math.cos(turn), math.sin(turn)]))
        self._draw.polygon([tuple(p) for p in corners], fill=colour)
