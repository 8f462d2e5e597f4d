"""Tracks: where points of a clip are in every frame, what was seen of them, and drags from them.

A drag that a person draws and a track that a tracker saw are the same data: a position and a state
per frame. Training therefore makes its drags from tracks, in two steps: `sample_trajectories`
chooses which tracks become drags, `perturb_tracks` makes them as imprecise as hand-drawn ones.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
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


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Which tracks of a clip become its drags.

    Attributes:
      kind: "motion" draws tracks in proportion to how far they move; "grid" is the sampler of the
        DragNUWA paper (arXiv 2308.08089 §3.2): the tracks that start at a jittered grid.
      min_count, max_count: bounds on the number of drags. The count is log-uniform for "motion"
        (people draw one or two drags, yet eight must be learnt too), uniform for "grid".
      spacing: "grid": distance of the anchors in pixels, the paper's λ; each is displaced by
        up to half of it along both axes.
      min_motion: "motion": pixels of displacement below which a track counts as still.
      anchor_probability: "motion": the chance of each drag but the first to be a still anchor,
        where the clip has still tracks. An anchor's displacement is exactly zero.
      suppression_radius: "motion": least distance in pixels between two handles, so that drags
        spread over the picture rather than crowd on one texture.
    """

    kind: str = "motion"
    min_count: int = 1
    max_count: int = 8
    spacing: float = 16.0
    min_motion: float = 1.0
    anchor_probability: float = 0.15
    suppression_radius: float = 6.0

    def __post_init__(self) -> None:
        if self.kind not in ("motion", "grid"):
            raise ValueError(f'sampler kind is "motion" or "grid", got {self.kind!r}')
        if not 1 <= self.min_count <= self.max_count:
            raise ValueError(
                "sampler needs 1 <= min_count <= max_count, "
                f"got {self.min_count} and {self.max_count}"
            )
        if self.spacing <= 0:
            raise ValueError(f"sampler spacing is a positive number of pixels, got {self.spacing}")
        if not 0 <= self.anchor_probability <= 1:
            raise ValueError(f"anchor_probability is in [0, 1], got {self.anchor_probability}")


def sample_trajectories(
    tracks: Tracks,
    rng: np.random.Generator,
    config: SamplerConfig,
    height: int,
    width: int,
    groups: Int[np.ndarray, " k"] | None = None,
) -> Tracks:
    """Chooses the tracks of a clip that become its drags.

    Only tracks whose handle (the point in frame 0) is visible inside the picture can be chosen, as
    a person can only grab what is seen. There may be fewer than `min_count` of them, or none.

    Args:
      tracks: everything that was tracked, in pixels of the clip.
      rng: the one source of randomness.
      config: what to choose.
      height: of the clip in pixels.
      width: of the clip in pixels.
      groups: int [k], the object each track belongs to. If given, "motion" weighs an object by the
        mean motion of its tracks, so that a large object is not chosen more often for its size.

    Returns:
      At most `config.max_count` tracks, in random order.
    """
    if groups is not None and np.shape(groups) != (tracks.num_tracks,):
        raise ValueError(
            f"groups name the object of each of {tracks.num_tracks} tracks, got shape "
            f"{np.shape(groups)}"
        )
    graspable = np.flatnonzero(
        tracks.visible[:, 0]
        & (tracks.visible.sum(axis=1) >= min(2, tracks.num_frames))
        & inside(tracks.points[:, 0], height, width)
    )
    if graspable.size == 0:
        return tracks.select([])
    if config.kind == "grid":
        return _sample_on_grid(tracks, graspable, rng, config, height, width)
    return _sample_by_motion(tracks, graspable, rng, config, groups)


def net_displacement(tracks: Tracks) -> Float[np.ndarray, " k"]:
    """How far, in pixels, each track gets from its first point while it is visible.

    Not the length of its path: there the jitter of a tracker on a still point adds up.
    """
    distance = np.linalg.norm(tracks.points - tracks.points[:, :1], axis=-1)
    return np.where(tracks.visible, distance, 0).max(axis=1, initial=0)


def _sample_by_motion(
    tracks: Tracks,
    graspable: Int[np.ndarray, " n"],
    rng: np.random.Generator,
    config: SamplerConfig,
    groups: Int[np.ndarray, " k"] | None,
) -> Tracks:
    motion = net_displacement(tracks)[graspable]
    moving = motion >= config.min_motion
    weight = np.where(moving, motion, 0.0)
    if groups is not None:
        _, member, size = np.unique(
            np.asarray(groups)[graspable], return_inverse=True, return_counts=True
        )
        weight = weight / size[member]
    # Gumbel top-k: the order of log w + Gumbel noise is a draw without replacement by weight.
    noise = rng.gumbel(size=graspable.size)
    with np.errstate(divide="ignore"):
        movers = np.argsort(-(np.log(weight) + noise))[: int(moving.sum())]
    still = rng.permutation(np.flatnonzero(~moving))

    low, high = np.log(config.min_count), np.log(config.max_count + 1)
    count = min(int(np.exp(rng.uniform(low, high))), config.max_count)
    wants_anchor = rng.random(count) < config.anchor_probability
    wants_anchor[0] = False  # a clip whose only drag is an anchor says nothing of what moves

    handles = tracks.points[graspable, 0]
    movers, still = list(movers), list(still)
    chosen: list[int] = []
    for wants in wants_anchor:
        # Without still tracks an anchor's place goes to a mover, never the other way round.
        for queue in (still, movers) if wants else (movers,):
            candidate = _pop_distant(queue, handles, chosen, config.suppression_radius)
            if candidate is not None:
                chosen.append(candidate)
                break
    drags = tracks.select(graspable[chosen])
    points = np.where(moving[chosen][:, None, None], drags.points, drags.points[:, :1])
    drags = Tracks(points, drags.state)
    return drags.select(rng.permutation(drags.num_tracks))


def _pop_distant(
    queue: list[int], handles: Float[np.ndarray, "n 2"], chosen: list[int], radius: float
) -> int | None:
    """Takes candidates from the queue until one is `radius` away from all that are chosen."""
    while queue:
        candidate = int(queue.pop(0))
        gap = np.linalg.norm(handles[chosen] - handles[candidate], axis=-1)
        if gap.min(initial=np.inf) >= radius:
            return candidate
    return None


def _sample_on_grid(
    tracks: Tracks,
    graspable: Int[np.ndarray, " n"],
    rng: np.random.Generator,
    config: SamplerConfig,
    height: int,
    width: int,
) -> Tracks:
    half = config.spacing / 2
    x, y = np.meshgrid(
        np.arange(min(half, width / 2), width, config.spacing),
        np.arange(min(half, height / 2), height, config.spacing),
    )
    anchors = np.stack([x.ravel(), y.ravel()], axis=-1)
    anchors = anchors + rng.uniform(-half, half, anchors.shape)
    count = int(rng.integers(config.min_count, config.max_count + 1))
    handles = tracks.points[graspable, 0]
    chosen: list[int] = []
    for anchor in rng.permutation(anchors):
        gap = np.linalg.norm(handles - anchor, axis=-1)
        nearest = int(gap.argmin())
        # An anchor with no track near it is dropped: taking a far one would undo the grid.
        if gap[nearest] <= config.spacing and nearest not in chosen:
            chosen.append(nearest)
        if len(chosen) == count:
            break
    return tracks.select(graspable[chosen])


@dataclasses.dataclass(frozen=True)
class PerturbConfig:
    """How imprecise synthesised drags are. All zeros: the tracks themselves.

    Attributes:
      jitter: standard deviation in pixels of the displacement of a drag's keypoints. It varies
        smoothly over time, as a hand does; an exactly still drag is moved as a whole.
      jitter_knots: in how many moments of the clip the jitter is drawn; PCHIP between them.
      tail_dropout: chance of a drag to end early: from a random frame on it is unspecified.
      subsample: numbers of keyframes to which a drag is thinned, each as likely as the other; PCHIP
        brings it back to every frame. What is lost between keyframes is what people do not draw.
      subsample_probability: chance of a drag to be thinned.
    """

    jitter: float = 0.5
    jitter_knots: int = 3
    tail_dropout: float = 0.1
    subsample: tuple[int, ...] = (2, 3, 5)
    subsample_probability: float = 0.25

    def __post_init__(self) -> None:
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


def perturb_tracks(tracks: Tracks, rng: np.random.Generator, config: PerturbConfig) -> Tracks:
    """Drags as a person might have drawn them, from tracks that are exact.

    Thins the keypoints in time, displaces them and cuts tails, in this order. States are kept,
    except where a tail is cut: there they become unspecified.
    """
    points = tracks.points.astype(np.float64)
    state = tracks.state.copy()
    frames = tracks.num_frames
    if frames < 2:
        return tracks
    for k in range(tracks.num_tracks):
        still = bool((points[k] == points[k, :1]).all())
        if rng.random() < config.subsample_probability:
            count = int(rng.choice(config.subsample))
            points[k] = _thin(points[k], tracks.visible[k], count, rng)
        knots = 1 if still else config.jitter_knots
        points[k] += config.jitter * _smooth_noise(knots, frames, rng)
        if rng.random() < config.tail_dropout:
            # At least one step of motion is left.
            state[k, int(rng.integers(2, frames + 1)) :] = TrackState.UNSPECIFIED
    return Tracks(points, state)


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


def _smooth_noise(knots: int, frames: int, rng: np.random.Generator) -> Float[np.ndarray, "t 2"]:
    values = rng.standard_normal((knots, 2))
    return pchip(values, np.linspace(0.0, frames - 1.0, knots), np.arange(frames, dtype=float))
