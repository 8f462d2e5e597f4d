"""Tracks: where points of a clip are in every frame, and what was seen of them.

A drag that a person draws and a track that a tracker saw are the same data: a position and a state
per frame. Training therefore makes its drags from tracks, in two steps: trajectory_samplers.py
chooses which tracks become drags, perturbation.py makes them as imprecise as hand-drawn ones.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.interpolate import PchipInterpolator


class TrackState(enum.IntEnum):
    """What is known of a point in a frame. Unspecified and occluded are different things."""

    UNSPECIFIED = 0  # nothing is said about the point: it may be anywhere
    VISIBLE = 1
    OCCLUDED = 2  # inside the picture, behind something
    OUTSIDE = 3  # beyond the border of the picture


@dataclasses.dataclass(frozen=True)
class Tracks:
    """`k` points followed through `t` frames.

    Attributes:
      points: float32 [k t 2], (x, y) in pixels of the clip, pixel centres at integers. Occluded and
        outside points carry the best known position. Unspecified ones are stored as (0, 0), so that
        what is unspecified cannot leak to anyone who reads the points alone.
      state: uint8 [k t], values of `TrackState`.

    Raises:
      ValueError: the shapes disagree, a state is unknown or a point is not finite.
    """

    points: Float[np.ndarray, "k t 2"]
    state: UInt8[np.ndarray, "k t"]

    def __post_init__(self) -> None:
        points = np.asarray(self.points, np.float32)
        state = np.asarray(self.state)
        if points.ndim != 3 or points.shape[-1] != 2 or state.shape != points.shape[:2]:
            raise ValueError(
                f"Tracks take points [k t 2] and state [k t], got {points.shape} and {state.shape}"
            )
        if state.size and not np.isin(state, list(TrackState)).all():
            raise ValueError(f"track states are 0..3, got {sorted(set(state.ravel().tolist()))}")
        state = state.astype(np.uint8)
        points = np.where((state == TrackState.UNSPECIFIED)[..., None], np.float32(0), points)
        if not np.isfinite(points).all():
            track, frame, _ = np.argwhere(~np.isfinite(points))[0]
            raise ValueError(f"track {track} is not finite in frame {frame}")
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "state", state)

    @property
    def num_tracks(self) -> int:
        return self.points.shape[0]

    @property
    def num_frames(self) -> int:
        return self.points.shape[1]

    @property
    def visible(self) -> Bool[np.ndarray, "k t"]:
        return self.state == TrackState.VISIBLE

    def select(self, index: slice | Sequence[int] | np.ndarray) -> Tracks:
        """The tracks at `index` (anything that indexes the axis k), in that order."""
        if not isinstance(index, slice):
            index = np.asarray(index)
            index = index if index.dtype == bool else index.astype(np.int64)
        return Tracks(self.points[index], self.state[index])

    def resize(self, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Tracks:
        """The same tracks in a clip resized from `old_hw` to `new_hw`, both (height, width)."""
        return Tracks(resize_points(self.points, old_hw, new_hw), self.state)

    def pad(self, k: int) -> Tracks:
        """Appends unspecified tracks until there are `k`.

        Raises:
          ValueError: there are more than `k` tracks already.
        """
        missing = k - self.num_tracks
        if missing < 0:
            raise ValueError(f"cannot pad {self.num_tracks} tracks to {k}: select some first")
        frames = self.num_frames
        empty = Tracks(np.zeros((missing, frames, 2)), np.zeros((missing, frames), np.uint8))
        return Tracks.concatenate([self, empty])

    @staticmethod
    def concatenate(tracks: Sequence[Tracks]) -> Tracks:
        """All tracks of several sets with the same number of frames, in order."""
        if not tracks:
            raise ValueError("cannot concatenate no tracks: the number of frames is unknown")
        return Tracks(
            np.concatenate([each.points for each in tracks]),
            np.concatenate([each.state for each in tracks]),
        )


def resize_points(
    points: Float[np.ndarray, "*n 2"], old_hw: tuple[int, int], new_hw: tuple[int, int]
) -> Float[np.ndarray, "*n 2"]:
    """Points (x, y) of a picture of size `old_hw`, in the same picture resized to `new_hw`."""
    scale = np.array([new_hw[1] / old_hw[1], new_hw[0] / old_hw[0]])
    # Pixel centres are at integers, so that a picture of width w spans -0.5 .. w - 0.5.
    return (np.asarray(points) + 0.5) * scale - 0.5


def inside(points: Float[np.ndarray, "*n 2"], height: int, width: int) -> Bool[np.ndarray, "*n"]:
    """Whether each point (x, y) lies in a picture of this size, borders of its pixels included."""
    x, y = np.moveaxis(np.asarray(points), -1, 0)
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def net_displacement(tracks: Tracks) -> Float[np.ndarray, " k"]:
    """How far, in pixels, each track gets from its first point while it is visible.

    Not the length of its path: there the jitter of a tracker on a still point adds up.
    """
    distance = np.linalg.norm(tracks.points - tracks.points[:, :1], axis=-1)
    return np.where(tracks.visible, distance, 0).max(axis=1, initial=0)


def pchip(
    values: Float[np.ndarray, "n c"],
    positions: Float[np.ndarray, " n"],
    queries: Float[np.ndarray, " m"],
) -> Float[np.ndarray, "m c"]:
    """Monotone cubic Hermite interpolation (Fritsch & Butland 1984), constant beyond the ends.

    It passes through every value and, unlike other cubic splines, never overshoots between two.
    `positions` must increase strictly; a single one gives a constant.
    """
    if len(positions) == 1:
        return np.repeat(np.asarray(values, np.float64), len(queries), axis=0)
    queries = np.clip(queries, positions[0], positions[-1])
    return PchipInterpolator(positions, values, axis=0)(queries)
