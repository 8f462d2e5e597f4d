"""Camera or object: which tracks move as the whole picture does, and which on their own.

The camera's motion is a similarity (pan, zoom, roll) from frame 0 to each frame, found by RANSAC
over whole tracks: two tracks determine it in every frame, and those that agree with it throughout
are counted. Tracks that keep to it are the background, whether the camera moves or is still. The
others are grouped into objects: neighbours that move alike belong together, as in the segmentation
of trajectories by Brox & Malik (ECCV 2010).

What is the background is a matter of how much of the picture it covers, not of how many tracks it
has. A scene at very different depths has no single such motion; near things then pass for objects.
A large object that fills the picture passes for the background.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Complex, Float, Int
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from nuwa_jax.motion.schedules import Schedule, check_ends
from nuwa_jax.motion.tracks import Tracks
from nuwa_jax.motion.trajectory_samplers import BACKGROUND

UNCLEAR = -1  # of `group_tracks`: a track that moves like nothing near it; often a tracker's error

# Pairs of tracks that are tried. Of a background with 40 % of the tracks, one pair in six is right;
# some of those are far enough apart to be exact as well.
_PAIRS = 192
_FRAMES = 4  # in which they are compared with the other tracks
_CELLS = 8  # along each side: the picture's parts that a motion covers are counted

_NEIGHBOURS = 6  # of a track, that may belong to the same object


@dataclasses.dataclass(frozen=True)
class CameraConfig:
    """How tracks are told apart. Any number may be a `Schedule`.

    Attributes:
      tolerance: how far a track may be from the camera's motion, as a share of the picture's
        shorter side; at least a pixel, as trackers err that much.
      min_tracks: least number of tracks that must agree, in a frame, for its motion to be known.
      min_share: least share of the parts of the picture with tracks in them, in an 8x8 grid, in
        which tracks agree; fewer are no background.
      min_spread: least area over which these tracks are spread, as a share of what they would have
        if they filled the picture. A disc as wide as half of a square picture has 0.19.
      min_object_tracks: least number of tracks of an object. Smaller groups are `UNCLEAR`.

    Raises:
      ValueError: an entry makes no sense.
    """

    tolerance: float | Schedule = 0.006
    min_tracks: int | Schedule = 6
    min_share: float | Schedule = 0.25
    min_spread: float | Schedule = 0.25
    min_object_tracks: int | Schedule = 3

    def __post_init__(self) -> None:
        if check_ends(self):
            return
        if not self.tolerance > 0:
            raise ValueError(f"camera tolerance is above 0, got {self.tolerance}")
        for name in ("min_share", "min_spread"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"camera {name} is in [0, 1], got {getattr(self, name)}")
        if self.min_tracks < 3:
            raise ValueError(
                f"camera min_tracks is at least 3, as any 2 agree, got {self.min_tracks}"
            )
        if self.min_object_tracks < 1:
            raise ValueError(f"min_object_tracks is at least 1, got {self.min_object_tracks}")


@dataclasses.dataclass(frozen=True)
class CameraMotion:
    """The motion that most of the picture shares.

    Attributes:
      transforms: float64 [t 2 3], from pixels of frame 0 to those of each frame: a point p goes to
        M p + v, with M, v = [..., :2], [..., 2]. NaN in frames in which too few tracks are seen.
      own_motion: float64 [k t 2], how far each track is, in pixels, from where the camera's motion
        takes it from the first frame in which it is seen; NaN in frames that say nothing.
      background: bool [k], the tracks that keep to it wherever they are seen.
      moves: whether it takes any corner of the picture further than the tolerance.
    """

    transforms: Float[np.ndarray, "t 2 3"]
    own_motion: Float[np.ndarray, "k t 2"]
    background: Bool[np.ndarray, " k"]
    moves: bool


def fit_camera(
    tracks: Tracks, height: int, width: int, config: CameraConfig | None = None
) -> CameraMotion | None:
    """The camera's motion, or None if no motion is shared by enough of the picture.

    The same tracks give the same result: the pairs that are tried are drawn with a fixed seed.

    Args:
      tracks: in pixels of the clip.
      height: of the clip in pixels.
      width: of the clip in pixels.
      config: by default `CameraConfig()`.
    """
    config = config or CameraConfig()
    tolerance = _in_pixels(config.tolerance, height, width)
    places = _as_complex(tracks)
    agree = _largest_motion(places, height, width, tolerance, config)
    if agree is None:
        return None
    # Least squares over those that agree, then again over those that agree with that.
    for _ in range(2):
        turn, shift = _least_squares(places, agree, config.min_tracks)
        own = _deviation(places, turn, shift)
        distance = np.abs(own)
        judged = np.isfinite(distance).sum(axis=1) >= 2
        agree = judged & (np.nan_to_num(distance).max(axis=1, initial=0) <= tolerance)
    if agree.sum() < config.min_tracks:
        return None
    corners = np.array([0, width - 1, 1j * (height - 1), width - 1 + 1j * (height - 1)])
    moved = np.abs(turn[:, None] * corners + shift[:, None] - corners)
    return CameraMotion(
        transforms=np.stack(
            [
                np.stack([turn.real, -turn.imag, shift.real], axis=-1),
                np.stack([turn.imag, turn.real, shift.imag], axis=-1),
            ],
            axis=1,
        ),
        own_motion=np.stack([own.real, own.imag], axis=-1),
        background=agree,
        moves=bool(np.nanmax(moved) > tolerance),
    )


def group_tracks(
    tracks: Tracks, height: int, width: int, config: CameraConfig | None = None
) -> Int[np.ndarray, " k"]:
    """The object that each track belongs to, by how it moves.

    Args:
      tracks: in pixels of the clip.
      height: of the clip in pixels.
      width: of the clip in pixels.
      config: by default `CameraConfig()`.

    Returns:
      `BACKGROUND` (0) for what keeps to the camera's motion, 1, 2, ... for objects, those with
      more tracks first, `UNCLEAR` for tracks that move like nothing near them. Where no camera's
      motion was found, nothing is background.
    """
    config = config or CameraConfig()
    tolerance = _in_pixels(config.tolerance, height, width)
    groups = np.full(tracks.num_tracks, UNCLEAR)
    camera = fit_camera(tracks, height, width, config)
    if camera is None:
        # What moves alike must then be told by the motion in the picture itself.
        still = np.ones(tracks.num_frames, complex)
        deviation = _deviation(_as_complex(tracks), still, 0 * still)
        own = np.stack([deviation.real, deviation.imag], axis=-1)
        free = np.flatnonzero(tracks.visible.sum(axis=1) >= 2)
    else:
        own = camera.own_motion
        groups[camera.background] = BACKGROUND
        judged = np.isfinite(own[..., 0]).sum(axis=1) >= 2
        free = np.flatnonzero(judged & ~camera.background)
    if free.size == 0:
        return groups
    first = tracks.visible[free].argmax(axis=1)
    handles = tracks.points[free, first].astype(np.float64)
    label = _moving_alike(handles, own[free], tolerance)
    sizes = np.bincount(label)
    by_size = np.argsort(-sizes, kind="stable")
    number = np.empty(len(sizes), int)
    number[by_size] = np.arange(1, len(sizes) + 1)
    number[sizes < config.min_object_tracks] = UNCLEAR
    groups[free] = number[label]
    return groups


def _in_pixels(tolerance: float, height: int, width: int) -> float:
    return max(tolerance * min(height, width), 1.0)


# A point is a complex number x + iy, so that a similarity is z -> turn z + shift.


def _as_complex(tracks: Tracks) -> Complex[np.ndarray, "k t"]:
    """The positions; NaN where a point is not seen."""
    points = tracks.points.astype(np.float64)
    return np.where(tracks.visible, points[..., 0] + 1j * points[..., 1], complex(np.nan, np.nan))


def _largest_motion(
    places: Complex[np.ndarray, "k t"],
    height: int,
    width: int,
    tolerance: float,
    config: CameraConfig,
) -> Bool[np.ndarray, " k"] | None:
    """The tracks that follow the similarity which covers most of the picture."""
    count, frames = places.shape
    known = np.isfinite(places)
    # Such as are seen in frame 0, and long enough to tell of the motion of most frames.
    lasting = np.flatnonzero(known[:, :1].any(axis=1) & (2 * known.sum(axis=1) > frames))
    if frames < 2 or lasting.size < config.min_tracks:
        return None
    rng = np.random.default_rng(0)
    first, second = rng.integers(lasting.size, size=(2, 4 * _PAIRS))
    gap = np.abs(places[lasting[first], 0] - places[lasting[second], 0])
    # Errors of a pair grow with the distance from it: near pairs are not tried.
    far = np.flatnonzero(gap >= 0.1 * min(height, width))[:_PAIRS]
    if far.size == 0:
        return None
    first, second = lasting[first[far]], lasting[second[far]]

    shown = np.unique(np.linspace(1, frames - 1, _FRAMES).round().astype(int))
    start = places[:, 0]
    turn = (places[second][:, shown] - places[first][:, shown]) / (start[second] - start[first])[
        :, None
    ]
    shift = places[first][:, shown] - turn * start[first][:, None]
    agree = np.ones((far.size, count), bool)
    told = np.empty((shown.size, far.size, count), bool)
    for index, frame in enumerate(shown):
        expected = turn[:, index, None] * start + shift[:, index, None]
        distance = np.abs(places[:, frame] - expected)
        told[index] = np.isfinite(distance)
        agree &= ~told[index] | (np.where(told[index], distance, 0) <= tolerance)
    # A track that is seldom compared is seldom contradicted: it must be in half of the frames.
    agree &= 2 * told.sum(axis=0) >= shown.size

    covered, spread, occupied = _coverage(agree, told, known[:, shown], start, height, width)
    good = (
        (agree.sum(axis=1) >= config.min_tracks)
        & (spread >= config.min_spread)
        & (covered >= config.min_share * occupied)
    )
    if not good.any():
        return None
    best = np.lexsort([agree.sum(axis=1), covered, good])[-1]
    return agree[best]


def _coverage(
    agree: Bool[np.ndarray, "n k"],
    told: Bool[np.ndarray, "f n k"],
    known: Bool[np.ndarray, "k f"],
    start: Complex[np.ndarray, " k"],
    height: int,
    width: int,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"], int]:
    """Of each set of tracks that agree: the cells it covers, summed over frames, and its area.

    A pair that is lost early is contradicted by few, but covers nothing from then on. Also returns
    the cells that all tracks cover, summed over frames.
    """
    x, y = (start.real + 0.5) / width - 0.5, (start.imag + 0.5) / height - 0.5
    placed = np.flatnonzero(np.isfinite(start))
    cells = [np.clip(np.floor((axis[placed] + 0.5) * _CELLS), 0, _CELLS - 1) for axis in (x, y)]
    cell = cells[0] + _CELLS * cells[1]
    placed = placed[np.argsort(cell, kind="stable")]
    _, first = np.unique(np.sort(cell), return_index=True)

    def cells_with_any(tracks: Bool[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
        return np.logical_or.reduceat(tracks[:, placed], first, axis=1).sum(axis=1)

    # No matrix products: for arrays this small, BLAS spends its time on starting threads.
    covered = sum(cells_with_any(agree & each) for each in told)
    occupied = int(cells_with_any(known.T).sum())
    # The area by second moments: for points that fill the picture, their determinant is 1 / 144.
    x, y = x[placed], y[placed]
    moments = np.stack([x, y, x * x, x * y, y * y])
    member = agree[:, placed].astype(np.float64)
    sums = np.einsum("nk,jk->jn", member, moments)
    x, y, xx, xy, yy = sums / np.maximum(member.sum(axis=1), 1)
    determinant = (xx - x * x) * (yy - y * y) - (xy - x * y) ** 2
    return covered, 12 * np.sqrt(np.maximum(determinant, 0)), occupied


def _least_squares(
    places: Complex[np.ndarray, "k t"], agree: Bool[np.ndarray, " k"], least: int
) -> tuple[Complex[np.ndarray, " t"], Complex[np.ndarray, " t"]]:
    """Turn and shift of each frame; NaN where fewer than `least` tracks tell."""
    start = places[:, :1]
    told = agree[:, None] & np.isfinite(places) & np.isfinite(start)
    count = told.sum(axis=0)
    share = told / np.maximum(count, 1)
    source = np.where(told, start, 0)
    target = np.where(told, places, 0)
    source_mean, target_mean = (share * source).sum(axis=0), (share * target).sum(axis=0)
    source, target = source - source_mean, target - target_mean
    size = (share * np.abs(source) ** 2).sum(axis=0)
    known = (count >= least) & (size > 0)
    turn = (share * source.conj() * target).sum(axis=0) / np.where(known, size, 1)
    turn = np.where(known, turn, complex(np.nan, np.nan))
    return turn, target_mean - turn * source_mean


def _deviation(
    places: Complex[np.ndarray, "k t"],
    turn: Complex[np.ndarray, " t"],
    shift: Complex[np.ndarray, " t"],
) -> Complex[np.ndarray, "k t"]:
    """How far each point is from where the motion takes it from the first frame that tells."""
    known = np.isfinite(places) & np.isfinite(turn)
    first = known.argmax(axis=1)
    with np.errstate(invalid="ignore"):  # of tracks that no frame tells anything of
        origin = (places[np.arange(len(places)), first] - shift[first]) / turn[first]
    return np.where(known, places - (turn * origin[:, None] + shift), complex(np.nan, np.nan))


def _moving_alike(
    handles: Float[np.ndarray, "n 2"], own: Float[np.ndarray, "n t 2"], tolerance: float
) -> Int[np.ndarray, " n"]:
    """A label for each track; neighbours whose motions differ little share theirs.

    What turns or grows differs in proportion to the distance: a quarter of it is allowed, a turn
    of 14 degrees or a growth by a quarter over the clip.
    """
    count = len(handles)
    apart = cdist(handles, handles)
    difference = np.zeros((count, count))
    together = np.zeros((count, count), bool)
    for frame in np.moveaxis(own, 1, 0):
        gap = cdist(frame, frame)
        both = np.isfinite(gap)
        together |= both
        difference = np.maximum(difference, np.where(both, gap, 0.0))
    nearest = np.argsort(apart, axis=1, kind="stable")[:, : _NEIGHBOURS + 1]
    linked = np.zeros((count, count), bool)
    np.put_along_axis(linked, nearest, True, axis=1)
    alike = together & (difference <= 2 * tolerance + 0.25 * apart)
    return connected_components(linked & alike, directed=False)[1]
