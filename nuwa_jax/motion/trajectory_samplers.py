"""Which tracks of a clip become its drags: the trajectory samplers of the field, as config.

Only tracks whose handle (the point in frame 0) is visible inside the picture can be chosen, as a
person can only grab what is seen. States come along with the tracks, whatever the sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nuwa_jax.motion.schedules import Schedule, build_config, check_ends, schedules_of
from nuwa_jax.motion.tracks import Tracks, inside, net_displacement

BACKGROUND = 0  # of `groups`: objects count from 1, and what is negative is neither


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Which tracks of a clip become its drags. Any number may be a `Schedule`.

    The kinds, with what they are taken from:

    - "motion": tracks in proportion to how far they move, spread over the picture; some drags are
      exactly still anchors. The count is log-uniform: people draw one or two drags, yet eight must
      be learnt too.
    - "grid": the trajectory sampler of DragNUWA (arXiv 2308.08089 §3.2): the tracks that start at
      a jittered grid. At most 8 of them with λ = 16 in the paper; the count is uniform.
    - "region": MotionPro's (arXiv 2505.20287): the picture is cut into blocks of 8x8 pixels, most
      of them are withheld at random, the others give the motion in them, as far as it is seen in
      every frame. Here a block gives one drag, the track in its midst, if its tracks agree.
    - "dense": a grid of 32x32 points, as Wan-Move (arXiv 2512.08765) tracks them, of which a
      log-uniform number is kept, as Motion Prompting (arXiv 2412.02700) draws it, up to 1,024.
    - "object": a few tracks per object that moves, the one in its midst first: one as in
      DragAnything (arXiv 2403.07420), or up to eight as in LeviTor (arXiv 2412.15214).
    - "mixture": one of several samplers, drawn for each element by their weights.

    Attributes:
      kind: one of the above.
      min_count, max_count: bounds on the number of drags, log-uniform but for "grid" (uniform) and
        "region" (as many as are not withheld, cut to the bounds).
      spacing: "grid": distance of the anchors in pixels, the paper's λ; each is displaced by
        up to half of it along both axes.
      min_motion: pixels of displacement below which a track counts as still.
      anchor_probability: "motion": the chance of each drag but the first to be a still anchor,
        where the clip has still tracks. An anchor's displacement is exactly zero.
      suppression_radius: "motion" and "object": least distance in pixels between two handles, so
        that drags spread over the picture rather than crowd on one texture. In "object" it holds
        within an object.
      region: "region": side of a block in pixels.
      mask_ratio: "region": bounds on the share of blocks that is withheld, uniform between them.
      coherence: "region": how far the tracks of a block may be from their median path, as a share
        of its displacement; `min_motion` is added, so that jitter is no disagreement.
      grid_side: "dense": points of the grid along each side.
      tracks_per_object: "object": most tracks of one object; each number is as likely.
      weight: within a mixture: how often this sampler is drawn, relative to the others.
      mixture: "mixture": the samplers by name, as a mapping or as (name, config) pairs. Entries
        that a part does not state have their defaults, not those of the mixture.

    Raises:
      ValueError: an entry makes no sense, at the ends of its schedule if it has one.
    """

    kind: str = "motion"
    min_count: int | Schedule = 1
    max_count: int | Schedule = 8
    spacing: float | Schedule = 16.0
    min_motion: float | Schedule = 1.0
    anchor_probability: float | Schedule = 0.15
    suppression_radius: float | Schedule = 6.0
    region: int | Schedule = 8
    mask_ratio: tuple[float, float] = (0.95, 1.0)
    coherence: float | Schedule = 0.25
    grid_side: int | Schedule = 32
    tracks_per_object: int | Schedule = 1
    weight: float | Schedule = 1.0
    mixture: Mapping[str, SamplerConfig] | tuple[tuple[str, SamplerConfig], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.mixture, Mapping):
            parts = tuple(
                (name, _part(name, part)) for name, part in sorted(dict(self.mixture).items())
            )
            object.__setattr__(self, "mixture", parts)
        if self.kind not in KINDS:
            kinds = ", ".join(f'"{kind}"' for kind in KINDS)
            raise ValueError(f"sampler kind is one of {kinds}, got {self.kind!r}")
        if (self.kind == "mixture") != bool(self.mixture):
            raise ValueError('sampler kind "mixture", and no other kind, needs parts in mixture')
        if any(part.kind == "mixture" for _, part in self.mixture):
            raise ValueError("a mixture of samplers has no mixtures in it: give one flat mixture")
        if check_ends(self):
            return
        if not 1 <= self.min_count <= self.max_count:
            raise ValueError(
                "sampler needs 1 <= min_count <= max_count, "
                f"got {self.min_count} and {self.max_count}"
            )
        if self.spacing <= 0:
            raise ValueError(f"sampler spacing is a positive number of pixels, got {self.spacing}")
        if not 0 <= self.anchor_probability <= 1:
            raise ValueError(f"anchor_probability is in [0, 1], got {self.anchor_probability}")
        for name in ("region", "grid_side", "tracks_per_object"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler {name} is at least 1, got {getattr(self, name)}")
        for name in ("min_motion", "suppression_radius", "coherence", "weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"sampler {name} is at least 0, got {getattr(self, name)}")
        if len(self.mask_ratio) != 2 or not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] <= 1:
            raise ValueError(
                f"mask_ratio is two shares (low, high) in [0, 1], got {self.mask_ratio}"
            )
        if self.mixture and not sum(part.weight for _, part in self.mixture) > 0:
            raise ValueError("the weights of a mixture of samplers are all 0: set one")

    @property
    def most_drags(self) -> int:
        """The most drags that it can give, at any step of its schedules."""
        if self.mixture:
            return max(part.most_drags for _, part in self.mixture)
        if isinstance(self.max_count, Schedule):
            return round(max(self.max_count.start, self.max_count.end))
        return self.max_count


class Choice(NamedTuple):
    """Which tracks become drags.

    Attributes:
      tracks: int [n], their indices, in random order.
      held: bool [n], whether the drag is an anchor: held still where the track begins.
    """

    tracks: Int[np.ndarray, " n"]
    held: Bool[np.ndarray, " n"]

    def drags(self, tracks: Tracks) -> Tracks:
        """The drags themselves."""
        chosen = tracks.select(self.tracks)
        points = np.where(self.held[:, None, None], chosen.points[:, :1], chosen.points)
        return Tracks(points, chosen.state)


def sample_trajectories(
    tracks: Tracks,
    rng: np.random.Generator,
    config: SamplerConfig,
    height: int,
    width: int,
    groups: Int[np.ndarray, " k"] | None = None,
) -> Tracks:
    """The drags of `choose_tracks`, whose arguments these are."""
    return choose_tracks(tracks, rng, config, height, width, groups).drags(tracks)


def choose_tracks(
    tracks: Tracks,
    rng: np.random.Generator,
    config: SamplerConfig,
    height: int,
    width: int,
    groups: Int[np.ndarray, " k"] | None = None,
) -> Choice:
    """Chooses the tracks of a clip that become its drags.

    There may be fewer than `min_count` that can be chosen, or none.

    Args:
      tracks: everything that was tracked, in pixels of the clip.
      rng: the one source of randomness.
      config: what to choose; without schedules (`nuwa_jax.motion.schedules.at_step`).
      height: of the clip in pixels.
      width: of the clip in pixels.
      groups: int [k], the object each track belongs to: `BACKGROUND`, objects from 1 on, negative
        for neither. If given, "motion" weighs an object by the mean motion of its tracks, so that
        a large object is not chosen more often for its size. "object" needs them.

    Returns:
      At most `config.max_count` tracks.
    """
    if schedules_of(config):
        raise ValueError("resolve the sampler's schedules first: at_step(config, step)")
    if groups is not None and np.shape(groups) != (tracks.num_tracks,):
        raise ValueError(
            f"groups name the object of each of {tracks.num_tracks} tracks, got shape "
            f"{np.shape(groups)}"
        )
    if config.kind == "mixture":
        weights = np.array([part.weight for _, part in config.mixture])
        config = config.mixture[int(rng.choice(len(weights), p=weights / weights.sum()))][1]
    graspable = np.flatnonzero(
        tracks.visible[:, 0]
        & (tracks.visible.sum(axis=1) >= min(2, tracks.num_frames))
        & inside(tracks.points[:, 0], height, width)
    )
    if graspable.size == 0:
        return _choice([])
    groups = None if groups is None else np.asarray(groups)[graspable]
    clip = _Clip(tracks.select(graspable), groups, height, width)
    choice = _SAMPLERS[config.kind](clip, rng, config)
    return Choice(graspable[choice.tracks], choice.held)


class _Clip(NamedTuple):
    """The tracks that can be grasped, and what is known of them."""

    tracks: Tracks
    groups: Int[np.ndarray, " n"] | None
    height: int
    width: int

    @property
    def handles(self) -> Float[np.ndarray, "n 2"]:
        return self.tracks.points[:, 0]


def _by_motion(clip: _Clip, rng: np.random.Generator, config: SamplerConfig) -> Choice:
    motion = net_displacement(clip.tracks)
    moving = motion >= config.min_motion
    weight = np.where(moving, motion, 0.0)
    if clip.groups is not None:
        _, member, size = np.unique(clip.groups, return_inverse=True, return_counts=True)
        weight = weight / size[member]
    movers = _in_random_order(weight, rng)[: int(moving.sum())]
    still = rng.permutation(np.flatnonzero(~moving))

    count = _log_uniform(config.min_count, config.max_count, rng)
    wants_anchor = rng.random(count) < config.anchor_probability
    wants_anchor[0] = False  # a clip whose only drag is an anchor says nothing of what moves

    movers, still = list(movers), list(still)
    chosen: list[int] = []
    for wants in wants_anchor:
        # Without still tracks an anchor's place goes to a mover, never the other way round.
        for queue in (still, movers) if wants else (movers,):
            candidate = _pop_distant(queue, clip.handles, chosen, config.suppression_radius)
            if candidate is not None:
                chosen.append(candidate)
                break
    order = rng.permutation(len(chosen))
    return _choice(np.array(chosen, int)[order], ~moving[chosen][order])


def _on_grid(clip: _Clip, rng: np.random.Generator, config: SamplerConfig) -> Choice:
    half = config.spacing / 2
    x, y = np.meshgrid(
        np.arange(min(half, clip.width / 2), clip.width, config.spacing),
        np.arange(min(half, clip.height / 2), clip.height, config.spacing),
    )
    anchors = np.stack([x.ravel(), y.ravel()], axis=-1)
    anchors = anchors + rng.uniform(-half, half, anchors.shape)
    count = int(rng.integers(config.min_count, config.max_count + 1))
    chosen: list[int] = []
    for anchor in rng.permutation(anchors):
        gap = np.linalg.norm(clip.handles - anchor, axis=-1)
        nearest = int(gap.argmin())
        # An anchor with no track near it is dropped: taking a far one would undo the grid.
        if gap[nearest] <= config.spacing and nearest not in chosen:
            chosen.append(nearest)
        if len(chosen) == count:
            break
    return _choice(chosen)


def _by_region(clip: _Clip, rng: np.random.Generator, config: SamplerConfig) -> Choice:
    lasting = np.flatnonzero(clip.tracks.visible.all(axis=1))
    block = np.floor((clip.handles[lasting] + 0.5) / config.region).astype(int)
    columns = -(-clip.width // config.region)
    # Upper borders count as inside the picture: they belong to its last blocks.
    rows = -(-clip.height // config.region)
    block = np.minimum(block, [columns - 1, rows - 1])
    of_block = block[:, 1] * columns + block[:, 0]
    paths = clip.tracks.points[lasting].astype(np.float64)
    paths = paths - paths[:, :1]
    blocks, counts = np.unique(of_block, return_counts=True)
    # A track alone in its block has none to disagree with.
    representatives = list(lasting[np.isin(of_block, blocks[counts == 1])])
    for each in blocks[counts > 1]:
        members = np.flatnonzero(of_block == each)
        median = np.median(paths[members], axis=0)
        apart = np.linalg.norm(paths[members] - median, axis=-1).max(axis=1)
        reach = np.linalg.norm(median, axis=-1).max()
        if apart.max() <= config.coherence * reach + config.min_motion:
            representatives.append(lasting[members[apart.argmin()]])
    # The share is one of blocks of the picture, not of those that happen to have a track.
    share = 1 - rng.uniform(*config.mask_ratio)
    kept = int(rng.binomial(rows * columns, share))
    kept = min(max(kept, config.min_count), config.max_count)
    return _choice(rng.permutation(np.array(representatives, int))[:kept])


def _dense(clip: _Clip, rng: np.random.Generator, config: SamplerConfig) -> Choice:
    cell_size = np.array([clip.width, clip.height]) / config.grid_side
    place = (clip.handles + 0.5) / cell_size
    cell = np.clip(np.floor(place).astype(int), 0, config.grid_side - 1)
    off_centre = np.linalg.norm((place - cell - 0.5) * cell_size, axis=-1)
    # Nearest first within each cell, so that `unique` finds the nearest of each.
    order = np.lexsort([off_centre, cell[:, 0], cell[:, 1]])
    _, first = np.unique(cell[order] @ [1, config.grid_side], return_index=True)
    count = _log_uniform(config.min_count, config.max_count, rng)
    return _choice(rng.permutation(order[first])[:count])


def _by_object(clip: _Clip, rng: np.random.Generator, config: SamplerConfig) -> Choice:
    if clip.groups is None:
        raise ValueError('the sampler "object" needs groups: nuwa_jax.motion.camera_motion')
    motion = net_displacement(clip.tracks)
    objects = [each for each in np.unique(clip.groups) if each >= BACKGROUND]
    members = [np.flatnonzero(clip.groups == each) for each in objects]
    moved = np.array([motion[each].mean() for each in members])
    moving = np.where(moved >= config.min_motion, moved, 0.0)
    count = _log_uniform(config.min_count, config.max_count, rng)
    chosen: list[int] = []
    for index in _in_random_order(moving, rng)[: int((moving > 0).sum())]:
        own = members[index]
        middle = np.median(clip.handles[own], axis=0)
        gap = np.linalg.norm(clip.handles[own] - middle, axis=-1)
        queue = [own[gap.argmin()], *rng.permutation(own)]
        wanted = int(rng.integers(1, config.tracks_per_object + 1))
        taken: list[int] = []
        while len(taken) < min(wanted, count - len(chosen)):
            # No track twice, even if handles need no distance.
            radius = max(config.suppression_radius, 1e-6)
            candidate = _pop_distant(queue, clip.handles, taken, radius)
            if candidate is None:
                break
            taken.append(candidate)
        chosen += taken
    return _choice(rng.permutation(np.array(chosen, int)))


_SAMPLERS: dict[str, Callable[[_Clip, np.random.Generator, SamplerConfig], Choice]] = {
    "motion": _by_motion,
    "grid": _on_grid,
    "region": _by_region,
    "dense": _dense,
    "object": _by_object,
}
KINDS = (*_SAMPLERS, "mixture")


def _choice(tracks: list[int] | np.ndarray, held: np.ndarray | None = None) -> Choice:
    tracks = np.asarray(tracks, np.int64)
    return Choice(tracks, np.zeros(len(tracks), bool) if held is None else held)


def _log_uniform(low: int, high: int, rng: np.random.Generator) -> int:
    """n in low .. high with a probability in proportion to log((n + 1) / n)."""
    return min(int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))), high)


def _in_random_order(
    weight: Float[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """A draw of all without replacement by weight; those of weight 0 come last."""
    # Gumbel top-k: the order of log w + Gumbel noise is such a draw.
    noise = rng.gumbel(size=len(weight))
    with np.errstate(divide="ignore"):
        return np.argsort(-(np.log(weight) + noise))


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


def _part(name: str, part: SamplerConfig | Mapping[str, object]) -> SamplerConfig:
    if isinstance(part, SamplerConfig):
        return part
    if not hasattr(part, "items"):
        raise ValueError(f"mixture.{name} is a sampler with its entries, got {part!r}")
    return build_config(SamplerConfig, part, f"mixture.{name}")
