"""Which tracks of a clip become its drags: the trajectory samplers."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from nuwa_jax.motion.tracks import Tracks, inside, net_displacement


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
