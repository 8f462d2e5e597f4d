"""Drags as the DragNUWA 1.5 demo reads and rasterises them, its defects being options.

The demo's drags are a JSON list of tracks, each a list of control points (x, y) on a canvas of
576x320 pixels. Its map of displacements has at most one pixel per track and step, before a Gaussian
of 199 pixels and deviation 20 spreads it.

Everything here is float64, as in the demo: `rasterize(..., snap=True)` draws the tracks exactly
where `jax.enable_x64` is on, and up to 3e-5 pixels off in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from nuwa_jax.motion.tracks import TrackState, pchip

CANVAS = (576, 320)  # width and height of the picture that the demo's tracks are drawn on
DEFECTS = ("still_points_move", "overwrite", "wrap", "crash")  # options of `reference_tracks`


class ReferenceTracks(NamedTuple):
    """What `rasterize` takes; a track of the demo may be several here, each visible for a while."""

    points: Float[np.ndarray, "k t 2"]
    state: UInt8[np.ndarray, "k t"]


def reference_tracks(
    tracks_json: str | Sequence[Sequence[Sequence[float]]],
    frames: int,
    height: int,
    width: int,
    *,
    canvas: tuple[int, int] = CANVAS,
    still_points_move: bool = False,
    overwrite: bool = False,
    wrap: bool = False,
    crash: bool = False,
) -> ReferenceTracks:
    """The demo's tracks in each of `frames` frames of a clip of `height` x `width` pixels.

    Control points are scaled from the canvas and cut to whole pixels; PCHIP over their index (two:
    a straight line) gives the positions, whatever their distances. A step is drawn if the pixel it
    starts from is in the picture.

    Args:
      tracks_json: the demo's tracks, as JSON or parsed.
      frames: of the clip.
      height: of the clip in pixels.
      width: of the clip in pixels.
      canvas: width and height of the picture that the tracks are drawn on.
      still_points_move: a track of one point, which should hold what is there, moves by (1, 1)
        over the clip instead (the demo's `run`: it becomes [(x, y), (x + 1, y + 1)]).
      overwrite: of several tracks on the same pixel of the same step only the last is drawn, even
        if it stands still (the demo assigns displacements to the map, it does not add them).
      wrap: a step that starts up to a picture's size beyond the left or the upper border is drawn
        at the opposite one (the demo's indices are Python's, which count from the end).
      crash: a step that starts beyond the right or the lower border is an error (in the demo, an
        IndexError); so is, unless `wrap`, one beyond the left or the upper.

    Raises:
      ValueError: with `crash`, for the first such step.
    """
    tracks = json.loads(tracks_json) if isinstance(tracks_json, str) else tracks_json
    if not tracks:
        return ReferenceTracks(np.zeros((0, frames, 2)), np.zeros((0, frames), np.uint8))
    paths = np.stack(
        [_path(track, frames, height, width, canvas, still_points_move) for track in tracks]
    )
    starts = np.trunc(paths[:, :-1]).astype(int)
    size = np.array([width, height])
    wrapped = ((starts < 0) & wrap).any(-1)
    starts = np.where(wrap & (starts < 0), starts + size, starts)
    drawn = ((starts >= 0) & (starts < size)).all(-1)
    if crash and not drawn.all():
        track, step = np.argwhere(~drawn)[0]
        x, y = paths[track, step]
        raise ValueError(f"track {track} is at ({x:g}, {y:g}) in frame {step}, beyond the border")
    if overwrite:
        drawn &= ~_overwritten(starts, drawn)

    points, state = [], []
    for k, (first, last) in _runs(drawn, wrapped):
        path, visible = paths[k].copy(), np.full(frames, TrackState.UNSPECIFIED, np.uint8)
        if wrapped[k, first]:
            path[last] = starts[k, first] + (path[last] - path[first])
            path[first] = starts[k, first]
        visible[first : last + 1] = TrackState.VISIBLE
        points.append(np.where(visible[:, None] == TrackState.VISIBLE, path, 0.0))
        state.append(visible)
    return ReferenceTracks(
        np.array(points).reshape(-1, frames, 2), np.array(state, np.uint8).reshape(-1, frames)
    )


def sparse_displacements(
    tracks: ReferenceTracks, height: int, width: int
) -> Float[np.ndarray, "t-1 h w 2"]:
    """The demo's map before the Gaussian: each step's displacement in the pixel it starts from."""
    points, state = tracks
    drawn = (state[:, 1:] == TrackState.VISIBLE) & (state[:, :-1] == TrackState.VISIBLE)
    track, step = np.nonzero(drawn)
    x, y = points[track, step].astype(int).T
    out = np.zeros((points.shape[1] - 1, height, width, 2), np.float32)
    np.add.at(out, (step, y, x), (points[track, step + 1] - points[track, step]).astype(np.float32))
    return out


def _path(
    track: Sequence[Sequence[float]],
    frames: int,
    height: int,
    width: int,
    canvas: tuple[int, int],
    still_points_move: bool,
) -> Float[np.ndarray, "t 2"]:
    points = [(int(x * width / canvas[0]), int(y * height / canvas[1])) for x, y in track]
    if len(points) == 1 and still_points_move:
        points.append((points[0][0] + 1, points[0][1] + 1))
    points = np.array(points, np.float64)
    return pchip(points, np.linspace(0.0, 1.0, len(points)), np.linspace(0.0, 1.0, frames))


def _overwritten(starts: np.ndarray, drawn: Bool[np.ndarray, "k s"]) -> Bool[np.ndarray, "k s"]:
    """Steps on a pixel on which a later track is drawn in the same step."""
    same = (starts[:, None] == starts[None]).all(-1) & drawn[None]
    later = np.arange(len(starts))[:, None] < np.arange(len(starts))
    return (same & later[..., None]).any(1)


def _runs(
    drawn: Bool[np.ndarray, "k s"], alone: Bool[np.ndarray, "k s"]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """(track, (first frame, last frame)) of steps drawn in a row, and of each that stands alone."""
    for k, steps in enumerate(drawn):
        first = None
        for i, step in enumerate(steps):
            if not step:
                first = None
                continue
            ends = i + 1 == len(steps) or not steps[i + 1] or alone[k, i] or alone[k, i + 1]
            first = i if first is None else first
            if ends:
                yield k, (first, i + 1)
                first = None
