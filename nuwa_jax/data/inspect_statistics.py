"""What is counted of clips, to see what a model will learn from."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Float, Int

from nuwa_jax.motion.camera_motion import CameraConfig, fit_camera
from nuwa_jax.motion.drag_synthesis import Drags
from nuwa_jax.motion.tracks import Tracks, TrackState, net_displacement


@dataclasses.dataclass
class Statistics:
    """Distributions over clips and over their tracks.

    Lengths are shares of the picture's shorter side, in per cent, so that sizes can be mixed.

    Attributes:
      clips: how many were counted.
      tracks: per clip.
      survival: per clip, the share of tracks seen in the first frame that are seen in the last.
      displacement: per track: how far it gets from where it begins, while it is seen.
      speed: per track: path per second, while it is seen.
      directions: radians, of the tracks that move by at least a pixel.
      states: [t 4] how many tracks are in each `TrackState`, in each frame.
      captions: lengths in characters.
      frames_per_second, sizes, frames: how often each occurs.
      camera: what the camera does: "still", "moves", "unknown".
      drags: per clip, as they are synthesised.
      drags_on: what they lie on.
    """

    clips: int = 0
    tracks: list[int] = dataclasses.field(default_factory=list)
    survival: list[float] = dataclasses.field(default_factory=list)
    displacement: list[float] = dataclasses.field(default_factory=list)
    speed: list[float] = dataclasses.field(default_factory=list)
    directions: list[float] = dataclasses.field(default_factory=list)
    states: Int[np.ndarray, "t 4"] = dataclasses.field(
        default_factory=lambda: np.zeros((0, len(TrackState)), np.int64)
    )
    captions: list[int] = dataclasses.field(default_factory=list)
    frames_per_second: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    sizes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    frames: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    camera: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    drags: list[int] = dataclasses.field(default_factory=list)
    drags_on: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(
        self,
        tracks: Tracks,
        drags: Drags,
        *,
        caption: str,
        fps: float,
        height: int,
        width: int,
        camera: CameraConfig,
    ) -> None:
        """Counts a clip."""
        self.clips += 1
        self.tracks.append(tracks.num_tracks)
        started = tracks.visible[:, 0]
        if started.any():
            self.survival.append(100 * float(tracks.visible[started, -1].mean()))
        share = 100 / min(height, width)
        moved = net_displacement(tracks)
        self.displacement += (share * moved).tolist()
        self.speed += (share * fps * mean_step(tracks)).tolist()
        self.directions += directions(tracks)[moved >= 1].tolist()
        self._count_states(tracks)
        self.captions.append(len(caption))
        self.frames_per_second[f"{fps:.4g} fps"] += 1
        self.sizes[f"{width}x{height}"] += 1
        self.frames[f"{tracks.num_frames} frames"] += 1
        motion = fit_camera(tracks, height, width, camera)
        known = "unknown" if motion is None else "moves" if motion.moves else "still"
        self.camera[known] += 1
        self.drags.append(drags.tracks.num_tracks)
        self.drags_on[drags.on] += 1

    def _count_states(self, tracks: Tracks) -> None:
        missing = tracks.num_frames - len(self.states)
        if missing > 0:
            self.states = np.pad(self.states, ((0, missing), (0, 0)))
        for state in TrackState:
            self.states[: tracks.num_frames, state] += (tracks.state == state).sum(axis=0)


def mean_step(tracks: Tracks) -> Float[np.ndarray, " n"]:
    """Pixels per frame of those tracks that are seen in two frames in a row, over all such."""
    step = np.linalg.norm(np.diff(tracks.points.astype(np.float64), axis=1), axis=-1)
    both = tracks.visible[:, 1:] & tracks.visible[:, :-1]
    count = both.sum(axis=1)
    return np.where(both, step, 0).sum(axis=1)[count > 0] / count[count > 0]


def directions(tracks: Tracks) -> Float[np.ndarray, " k"]:
    """Radians from the x axis, clockwise in the picture: to the place furthest from the first."""
    offset = tracks.points.astype(np.float64) - tracks.points[:, :1]
    distance = np.where(tracks.visible, np.linalg.norm(offset, axis=-1), -1)
    if not tracks.num_frames:
        return np.zeros(tracks.num_tracks)
    furthest = offset[np.arange(len(offset)), distance.argmax(axis=1)]
    return np.arctan2(furthest[:, 1], furthest[:, 0])
