"""Drags as imprecise as hand-drawn ones, from tracks that are exact."""

from __future__ import annotations

import dataclasses

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float

from nuwa_jax.motion.schedules import Schedule, check_ends, schedules_of
from nuwa_jax.motion.tracks import Tracks, TrackState, pchip


@dataclasses.dataclass(frozen=True)
class PerturbConfig:
    """How imprecise synthesised drags are. All zeros: the tracks themselves.

    Any number may be a `Schedule`. No paper of the field perturbs keypoints; of tail dropout ATI
    (arXiv 2505.22944), which has it at 0.2, reports that without it the end of a drag makes the
    object vanish behind something.

    Attributes:
      jitter: standard deviation in pixels of the displacement of a drag's keypoints. It varies
        smoothly over time, as a hand does; an exactly still drag is moved as a whole.
      jitter_knots: in how many moments of the clip the jitter is drawn; PCHIP between them.
      tail_dropout: chance of a drag to end early: from a random frame on it is unspecified.
      subsample: numbers of keyframes to which a drag is thinned, each as likely as the other; PCHIP
        brings it back to every frame. What is lost between keyframes is what people do not draw.
      subsample_probability: chance of a drag to be thinned.
    """

    jitter: float | Schedule = 0.5
    jitter_knots: int | Schedule = 3
    tail_dropout: float | Schedule = 0.1
    subsample: tuple[int, ...] = (2, 3, 5)
    subsample_probability: float | Schedule = 0.25

    def __post_init__(self) -> None:
        if check_ends(self):
            return
        if self.jitter < 0 or self.jitter_knots < 1:
            raise ValueError(
                "jitter is at least 0 and jitter_knots at least 1, "
                f"got {self.jitter} and {self.jitter_knots}"
            )
        for name in ("tail_dropout", "subsample_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is in [0, 1], got {getattr(self, name)}")
        if any(count < 2 for count in self.subsample):
            raise ValueError(f"a drag needs 2 keyframes or more, got subsample {self.subsample}")
        if self.subsample_probability > 0 and not self.subsample:
            raise ValueError("subsample_probability > 0 needs keyframe counts in subsample")


def perturb_tracks(
    tracks: Tracks, rng: np.random.Generator, config: PerturbConfig, height: int, width: int
) -> Tracks:
    """Drags as a person might have drawn them, from tracks that are exact.

    Thins the keypoints in time, displaces them and cuts tails, in this order. States are kept,
    except where a tail is cut: there they become unspecified. So that they stay true, no point
    that is seen is displaced beyond the border of the picture.

    Args:
      tracks: in pixels of the clip.
      rng: the one source of randomness.
      config: without schedules (`nuwa_jax.motion.schedules.at_step`).
      height: of the clip in pixels.
      width: of the clip in pixels.
    """
    if schedules_of(config):
        raise ValueError("resolve the schedules of perturb first: at_step(config, step)")
    points = tracks.points.astype(np.float64)
    state = tracks.state.copy()
    frames = tracks.num_frames
    if frames < 2:
        return tracks
    still = (points == points[:, :1]).all(axis=(1, 2))
    offsets = np.zeros((tracks.num_tracks, config.jitter_knots, 2))
    for k in range(tracks.num_tracks):
        if rng.random() < config.subsample_probability:
            count = int(rng.choice(config.subsample))
            points[k] = _thin(points[k], tracks.visible[k], count, rng)
        offsets[k] = rng.standard_normal((1 if still[k] else config.jitter_knots, 2))
        if rng.random() < config.tail_dropout:
            # At least one step of motion is left.
            state[k, int(rng.integers(2, frames + 1)) :] = TrackState.UNSPECIFIED
    points += config.jitter * _over_time(offsets, frames)
    in_picture = (tracks.state == TrackState.VISIBLE) | (tracks.state == TrackState.OCCLUDED)
    within = np.clip(points, -0.5, np.array([width, height]) - 0.5)
    points = np.where((in_picture | still[:, None])[..., None], within, points)
    return Tracks(points, state)


def _thin(
    points: Float[np.ndarray, "t 2"],
    visible: Bool[np.ndarray, " t"],
    count: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "t 2"]:
    """Keeps `count` visible keyframes, first and last among them; interpolates between the two."""
    seen = np.flatnonzero(visible)
    if seen.size <= count:
        return points
    middle = rng.choice(seen[1:-1], size=count - 2, replace=False)
    keys = np.sort(np.concatenate([seen[[0, -1]], middle]))
    between = np.arange(keys[0], keys[-1] + 1)
    thinned = points.copy()
    thinned[between] = pchip(points[keys], keys.astype(np.float64), between.astype(np.float64))
    return thinned


def _over_time(values: Float[np.ndarray, "k n 2"], frames: int) -> Float[np.ndarray, "k t 2"]:
    """A smooth path of each track through its `n` values, which are spread evenly over the clip."""
    count, knots, _ = values.shape
    values = rearrange(values, "k n xy -> n (k xy)")
    path = pchip(values, np.linspace(0.0, frames - 1.0, knots), np.arange(frames, dtype=float))
    return rearrange(path, "t (k xy) -> k t xy", k=count, xy=2)
