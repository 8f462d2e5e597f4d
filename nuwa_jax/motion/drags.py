"""Drags as a person draws them: the JSON file, its checks, and the tracks it stands for.

    {"version": 1, "width": 576, "height": 320, "frames": 14, "fps": 8,
     "drags": [{"id": "d1", "kind": "drag", "points": [[100, 80], [300, 120]]},
               {"id": "rock", "kind": "anchor", "points": [[500, 280]]}]}

All pixels are those of a picture of the stated size, pixel centres at integers, so that one file
serves any other size. Optional per drag: `times` (0..1, one per point), `start` and `end` (first
and last moving frame), `ease` (linear, in, out, inout), `hidden` ([[first, last], ...] frames in
which the point is behind something), `depth` (larger is further away), `region` (a polygon, drawn
at the handle, that moves with the point: a large object that moves as a whole).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from nuwa_jax.errors import UserError
from nuwa_jax.motion.drag_checks import VERSION, find_faults, polygon_area
from nuwa_jax.motion.tracks import Tracks, TrackState, inside, pchip, resize_points

# Progress along a drag for its share of time, both 0..1: constant speed, constant acceleration
# from or to rest, and smoothstep, which starts and ends at rest.
EASINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda u: u,
    "in": lambda u: u**2,
    "out": lambda u: 1 - (1 - u) ** 2,
    "inout": lambda u: u**2 * (3 - 2 * u),
}

MAX_SHOWN_FAULTS = 20  # one line that can still be read

Point = tuple[float, float]


class DragError(UserError):
    """A drags file cannot be used; the message names every fault, with its drag and point."""


@dataclasses.dataclass(frozen=True)
class Drag:
    """One drawn path. Frames are those of the `DragSet` it is in.

    Attributes:
      id: unique in its set.
      kind: "drag" moves what is under its first point (the handle) along its points; "anchor"
        keeps what is under its one point exactly still; "camera" is a drag of the background.
      points: (x, y) in pixels; at least 2, exactly 1 for an anchor.
      times: when each point is reached, as a share 0..1 of the way from `start` to `end`; None: by
        the length of the path.
      start: the frame after which it moves; before it, it stays at the handle.
      end: the frame from which it has arrived; None: the last one.
      ease: key of `EASINGS`.
      hidden: (first, last) frames, both included, in which the point is behind something.
      depth: larger is further away.
      region: polygon of at least 3 (x, y) about the handle, moving with it; None: the point alone.
    """

    id: str
    kind: str
    points: tuple[Point, ...]
    times: tuple[float, ...] | None = None
    start: int = 0
    end: int | None = None
    ease: str = "linear"
    hidden: tuple[tuple[int, int], ...] = ()
    depth: float = 0.0
    region: tuple[Point, ...] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("points", tuple((float(x), float(y)) for x, y in self.points))
        put("hidden", tuple((int(first), int(last)) for first, last in self.hidden))
        put("depth", float(self.depth))
        if self.times is not None:
            put("times", tuple(float(time) for time in self.times))
        if self.region is not None:
            put("region", tuple((float(x), float(y)) for x, y in self.region))


@dataclasses.dataclass(frozen=True)
class DragSet:
    """The drags of one clip, in pixels of a picture of `width` x `height`.

    Raises:
      DragError: from everything that reads, makes or writes a file, so that whatever was loaded or
        saved is sound. A later point outside the picture is no fault; `outside` tells of it.
    """

    width: int
    height: int
    frames: int
    fps: float
    drags: tuple[Drag, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "drags", tuple(self.drags))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> DragSet:
        """Reads and checks a drags file."""
        path = pathlib.Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DragError(f"{path}: cannot read the drags file: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DragError(f"{path}: a drags file is UTF-8 text, byte {error.start} is not") from (
                error
            )
        try:
            obj = json.loads(text)
        except json.JSONDecodeError as error:
            raise DragError(
                f"{path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}"
            ) from error
        except RecursionError as error:
            raise DragError(f"{path}: the JSON is nested too deeply for a drags file") from error
        try:
            return DragSet.from_json(obj)
        except DragError as error:
            raise DragError(f"{path}: {error}") from error

    @staticmethod
    def from_json(obj: Any) -> DragSet:
        """Builds the set from the parsed JSON, or raises one error that lists every fault."""
        faults = find_faults(obj)
        if faults:
            count = f"{len(faults)} faults: " if len(faults) > 1 else ""
            shown = "; ".join(faults[:MAX_SHOWN_FAULTS])
            more = len(faults) - MAX_SHOWN_FAULTS
            raise DragError(count + shown + (f"; and {more} more" if more > 0 else ""))
        drags = tuple(
            Drag(**{key: value for key, value in drag.items() if value is not None})
            for drag in obj["drags"]
        )
        return DragSet(obj["width"], obj["height"], obj["frames"], float(obj["fps"]), drags)

    def to_json(self) -> dict[str, Any]:
        """The set as JSON objects, version 1; what is None is left out."""
        drags = []
        for drag in self.drags:
            entry = dataclasses.asdict(drag)
            for key in ("points", "times", "hidden", "region"):
                if entry[key] is not None:
                    entry[key] = [list(v) if isinstance(v, tuple) else v for v in entry[key]]
            drags.append({key: value for key, value in entry.items() if value is not None})
        return {
            "version": VERSION,
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "fps": self.fps,
            "drags": drags,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Checks the set and writes it, replacing the file in one step."""
        obj = DragSet.from_json(self.to_json()).to_json()
        path = pathlib.Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(obj, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise DragError(f"{path}: cannot write the drags file: {error.strerror}") from error

    def to_tracks(
        self,
        frames: int,
        *,
        timing: Literal["arc", "index"] = "arc",
        region_points: int = 4,
    ) -> Tracks:
        """The position and state of every drag in each of `frames` frames.

        A number of frames other than the file's stretches or squeezes the drags in time.

        Args:
          frames: length of the clip.
          timing: how a drag without `times` is timed. "arc": at constant speed along its path
            (before `ease`), however unevenly it was clicked. "index": PCHIP over the index of its
            points, as the DragNUWA 1.5 demo does, where far clicks mean fast motion.
          region_points: how many tracks at most stand for each region besides its drag's own. They
            lie on a grid within the polygon and move rigidly with the drag. A thin or hollow
            polygon may hold fewer, or none.

        Returns:
          Track i is drag i; the tracks of regions follow after all drags. A point is visible,
          occluded while it is `hidden`, outside where it lies beyond the picture (also if hidden).
          Before `start` and after `end` it stays where it is.
        """
        if timing not in ("arc", "index"):
            raise ValueError(f'timing is "arc" or "index", got {timing!r}')
        if frames < 1:
            raise ValueError(f"tracks need at least 1 frame, got {frames}")
        if not self.drags:
            return Tracks(np.zeros((0, frames, 2)), np.zeros((0, frames), np.uint8))
        clock = np.arange(frames) * ((self.frames - 1) / max(frames - 1, 1))
        paths: list[np.ndarray] = []
        hidden: list[np.ndarray] = []
        region_paths: list[np.ndarray] = []
        region_hidden: list[np.ndarray] = []
        for drag in self.drags:
            path = _path(drag, clock, self.frames - 1, timing)
            behind = np.zeros(frames, bool)
            for first, last in drag.hidden:
                behind |= (clock >= first - 0.5) & (clock < last + 0.5)
            paths.append(path)
            hidden.append(behind)
            if drag.region is not None:
                for point in _grid_in_polygon(np.array(drag.region), region_points):
                    region_paths.append(path - path[0] + point)
                    region_hidden.append(behind)
        points = np.stack(paths + region_paths)
        state = np.where(np.stack(hidden + region_hidden), TrackState.OCCLUDED, TrackState.VISIBLE)
        state = np.where(inside(points, self.height, self.width), state, TrackState.OUTSIDE)
        return Tracks(points, state)

    @staticmethod
    def from_tracks(
        tracks: Tracks,
        width: int,
        height: int,
        fps: float,
        camera: Bool[np.ndarray, " k"] | None = None,
    ) -> DragSet:
        """Writes tracks as drags with one point per frame, exactly still ones as anchors.

        Tracks that are nowhere specified (padding) are left out. A file cannot say "unspecified":
        a track that begins late or ends early is held where it was first or last specified. Those
        that move and are marked in `camera` become drags of kind "camera".
        """
        drags = []
        for k in range(tracks.num_tracks):
            known = np.flatnonzero(tracks.state[k] != TrackState.UNSPECIFIED)
            if known.size == 0:
                continue
            start, end = int(known[0]), int(known[-1])
            path = tracks.points[k, known].astype(np.float64)
            shared = {"id": f"d{k + 1}", "hidden": _runs(tracks.state[k] == TrackState.OCCLUDED)}
            if start == end or (path == path[0]).all():
                drags.append(Drag(kind="anchor", points=(tuple(path[0]),), **shared))
                continue
            times = tuple((known - start) / (end - start))
            points = tuple(map(tuple, path))
            kind = "drag" if camera is None or not camera[k] else "camera"
            drags.append(
                Drag(kind=kind, points=points, times=times, start=start, end=end, **shared)
            )
        made = DragSet(width, height, tracks.num_frames, fps, tuple(drags))
        return DragSet.from_json(made.to_json())

    def resize(self, width: int, height: int) -> DragSet:
        """The same drags on the picture resized to `width` x `height`."""

        def moved(points: Sequence[Point]) -> np.ndarray:
            return resize_points(np.array(points), (self.height, self.width), (height, width))

        return dataclasses.replace(self, width=width, height=height, drags=self._map_points(moved))

    def crop(self, x0: float, y0: float, width: int, height: int) -> DragSet:
        """The same drags on the picture cropped to `width` x `height` with pixel (x0, y0) first.

        Raises:
          DragError: a handle is cut away. Such a drag would hold nothing of the picture.
        """

        def moved(points: Sequence[Point]) -> np.ndarray:
            return np.array(points) - (x0, y0)

        cropped = dataclasses.replace(
            self, width=width, height=height, drags=self._map_points(moved)
        )
        for drag in cropped.drags:
            if not inside(np.array(drag.points[0]), height, width):
                raise DragError(
                    f"drag {drag.id!r} point 0 is cut away by the crop to {width}x{height} at "
                    f"({x0:g}, {y0:g}); move the drag or give a picture of that shape"
                )
        return cropped

    def outside(self) -> list[str]:
        """One message for each point that lies outside the picture."""
        messages = []
        for drag in self.drags:
            for i, (x, y) in enumerate(drag.points):
                if not inside(np.array((x, y)), self.height, self.width):
                    messages.append(
                        f"drag {drag.id!r} point {i} ({x:g}, {y:g}) lies outside the "
                        f"{self.width}x{self.height} picture"
                    )
        return messages

    def _map_points(self, moved: Callable[[Sequence[Point]], np.ndarray]) -> tuple[Drag, ...]:
        return tuple(
            dataclasses.replace(
                drag,
                points=moved(drag.points),
                region=None if drag.region is None else moved(drag.region),
            )
            for drag in self.drags
        )


# From a drag to its path.


def _path(
    drag: Drag, clock: Float[np.ndarray, " t"], last: int, timing: str
) -> Float[np.ndarray, "t 2"]:
    """Positions at `clock`, in frames of the file, whose last frame is `last`."""
    points = np.array(drag.points)
    if len(points) == 1:
        return np.repeat(points, len(clock), axis=0)
    end = last if drag.end is None else drag.end
    progress = EASINGS[drag.ease](np.clip((clock - drag.start) / (end - drag.start), 0.0, 1.0))
    if drag.times is not None:
        return pchip(points, np.array(drag.times), progress)
    if timing == "index":
        return pchip(points, np.linspace(0.0, 1.0, len(points)), progress)
    return _at_arc_length(points, progress)


def _at_arc_length(
    points: Float[np.ndarray, "n 2"], progress: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "t 2"]:
    """Where the smooth curve through the points is after a share `progress` of its length."""
    chord = _cumulative_length(points)
    distinct = np.concatenate([[True], np.diff(chord) > 0])
    points, chord = points[distinct], chord[distinct]
    if len(points) == 1:
        return np.repeat(points, len(progress), axis=0)
    # The curve is longer than its chords, unevenly so: measure it, then walk it evenly.
    steps_per_segment = 64
    knots = np.arange(len(points), dtype=np.float64)
    fine = np.linspace(0, len(points) - 1, steps_per_segment * (len(points) - 1) + 1)
    fine = np.interp(fine, knots, chord)
    length = _cumulative_length(pchip(points, chord, fine))
    return pchip(points, chord, np.interp(progress * length[-1], length, fine))


def _cumulative_length(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    return np.concatenate([[0.0], np.linalg.norm(np.diff(points, axis=0), axis=-1).cumsum()])


def _grid_in_polygon(polygon: Float[np.ndarray, "n 2"], limit: int) -> Float[np.ndarray, "m 2"]:
    """At most `limit` points of a regular grid within a polygon: of the finest grid that fits."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    best = np.zeros((0, 2))
    # Cells somewhat larger to somewhat smaller than an equal share of the area.
    for spacing in math.sqrt(polygon_area(polygon) / max(limit, 1)) * np.linspace(1.5, 0.5, 41):
        cells = np.maximum(np.round((high - low) / spacing), 1).astype(int)
        x, y = (
            low[axis] + (np.arange(cells[axis]) + 0.5) * (high - low)[axis] / cells[axis]
            for axis in (0, 1)
        )
        grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        grid = grid[_in_polygon(grid, polygon)]
        if len(best) < len(grid) <= limit:
            best = grid
    return best


def _in_polygon(
    points: Float[np.ndarray, "m 2"], polygon: Float[np.ndarray, "n 2"]
) -> Bool[np.ndarray, " m"]:
    """Even-odd rule: a ray to the right crosses the outline an odd number of times."""
    x, y = points[:, :1], points[:, 1:]
    (ax, ay), (bx, by) = polygon.T, np.roll(polygon, -1, axis=0).T
    spans = (ay > y) != (by > y)
    crossing = ax + (y - ay) * (bx - ax) / np.where(by == ay, 1.0, by - ay)
    return (spans & (x < crossing)).sum(axis=1) % 2 == 1


def _runs(mask: Bool[np.ndarray, " t"]) -> tuple[tuple[int, int], ...]:
    """(first, last) of every run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return tuple((int(a), int(b) - 1) for a, b in edges.reshape(-1, 2))
