"""What is measured on a video that was made to follow drags. NumPy only; all lengths in pixels.

Every function scores one clip; `bootstrap_interval` and `bootstrap_ratio` say how sure a mean over
clips is. A clip in which there is nothing to score gives NaN and is left out of means, for all
videos alike, since what is scored is decided by the truth and never by the video.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from nuwa_jax.motion.tracks import Tracks


def trajectory_error(tracked: Float[np.ndarray, "k t 2"], truth: Tracks) -> float:
    """Mean distance to the true position, over frames 1.. in which the truth is visible.

    The mean of every point over its frames, then over points: a point that is seen rarely counts
    as much as any other. Known as EPE (Motion Prompting, arXiv 2412.02700), and as ObjMC in pixels
    of the clip's own size.
    """
    distance, scored = _distances(tracked, truth)
    return _mean_over_points(distance, scored)


def end_point_error(tracked: Float[np.ndarray, "k t 2"], truth: Tracks) -> float:
    """Mean over points of the distance in the last frame in which the truth is visible."""
    distance, scored = _distances(tracked, truth)
    frames = np.arange(scored.shape[1])
    last = scored & (frames == np.where(scored, frames, -1).max(axis=1, initial=-1)[:, None])
    return _mean_over_points(distance, last)


class AppearanceDrift(NamedTuple):
    """How little of what was dragged arrives; both are 0 where the patch is unchanged."""

    difference: float  # mean absolute difference of intensities in [0, 1]
    decorrelation: float  # 1 - normalised cross-correlation, 0..2


def appearance_drift(
    video: UInt8[np.ndarray, "t h w 3"],
    picture: UInt8[np.ndarray, "h w 3"],
    truth: Tracks,
    radius: int | None = None,
) -> AppearanceDrift:
    """Compares the patch at each handle with what the video shows where that patch should be.

    Both a video that leaves the object behind and one that moves it but lets it dissolve drift.
    Objects that turn or grow drift in the true clip too: read it beside the floor.

    Args:
      video: the video that is scored.
      picture: the picture whose points were dragged.
      truth: where the points truly go; frames 1.. in which they are visible are scored.
      radius: of the square patch in pixels; by default 1/16 of the picture's short side.
    """
    height, width = picture.shape[:2]
    radius = max(1, round(min(height, width) / 16)) if radius is None else radius
    axis = np.arange(-radius, radius + 1)
    offsets = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    shape = truth.state.shape
    difference, decorrelation = np.zeros(shape), np.zeros(shape)
    scored = truth.visible.copy()
    scored[:, 0] = False
    for point, frame in np.argwhere(scored):
        before = _patch(picture, truth.points[point, 0], offsets)
        after = _patch(video[frame], truth.points[point, frame], offsets)
        difference[point, frame] = np.abs(before - after).mean()
        before, after = before - before.mean(), after - after.mean()
        # A deviation of 1/255 keeps the noise of two plain patches from deciding.
        power = np.sqrt(((before**2).mean() + 255**-2) * ((after**2).mean() + 255**-2))
        decorrelation[point, frame] = 1 - ((before * after).mean() + 255**-2) / power
    return AppearanceDrift(
        _mean_over_points(difference, scored), _mean_over_points(decorrelation, scored)
    )


def background_motion(tracked: Float[np.ndarray, "k t 2"], truth: Tracks) -> float:
    """Mean displacement from the first frame of points that should be as still as the truth says.

    The true displacement is taken off, so that a camera that truly moves is not held against
    anyone.
    """
    moved = tracked - tracked[:, :1] - (truth.points - truth.points[:, :1])
    scored = truth.visible.copy()
    scored[:, 0] = False
    return _mean_over_points(np.linalg.norm(moved, axis=-1), scored)


def undisturbed_points(
    picture: UInt8[np.ndarray, "h w 3"],
    objects: UInt8[np.ndarray, "t h w"],
    count: int,
    margin: int | None = None,
) -> Float[np.ndarray, "k 2"]:
    """At most `count` textured points that no object comes near, in any frame.

    Args:
      picture: the first frame.
      objects: the object at every pixel, 0 being the background.
      count: how many points at most; there are fewer where the background is plain or small.
      margin: least distance in pixels to objects; by default 1/10 of the short side, so that the
        patch of a tracker holds nothing of them.
    """
    margin = max(2, round(min(picture.shape[:2]) / 10)) if margin is None else margin
    covered = (objects > 0).any(axis=0).astype(np.uint8)
    near = cv2.dilate(covered, np.ones((2 * margin + 1,) * 2, np.uint8))
    edge = max(1, margin // 2)
    clear = np.zeros_like(near)
    inner = (slice(edge, -edge), slice(edge, -edge))
    clear[inner] = 255 * (near[inner] == 0)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    corners = cv2.goodFeaturesToTrack(
        grey, maxCorners=count, qualityLevel=0.02, minDistance=margin, mask=clear
    )
    if corners is None:
        return np.zeros((0, 2), np.float32)
    return corners.reshape(-1, 2).astype(np.float32)


class Estimate(NamedTuple):
    """A mean over clips (or a ratio of two) and its bootstrap interval; NaN without clips."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    values: Float[np.ndarray, " n"], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Estimate:
    """The mean over clips with its percentile bootstrap interval; NaNs are left out."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return Estimate(np.nan, np.nan, np.nan)
    means = _resample(values[:, None], draws, seed)[:, 0]
    return Estimate(float(values.mean()), *_percentiles(means, level))


def bootstrap_ratio(
    numerator: Float[np.ndarray, " n"],
    denominator: Float[np.ndarray, " n"],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """The ratio of two means over the same clips; every draw takes both from the same clips.

    Pairing matters: clips with long motion are hard for every video, and that does not blur the
    ratio.
    """
    pairs = np.stack([numerator, denominator], axis=-1).astype(np.float64)
    pairs = pairs[np.isfinite(pairs).all(axis=-1)]
    if pairs.size == 0 or pairs[:, 1].mean() == 0:
        return Estimate(np.nan, np.nan, np.nan)
    means = _resample(pairs, draws, seed)
    means = means[means[:, 1] > 0]
    value = pairs[:, 0].mean() / pairs[:, 1].mean()
    return Estimate(float(value), *_percentiles(means[:, 0] / means[:, 1], level))


def _distances(
    tracked: Float[np.ndarray, "k t 2"], truth: Tracks
) -> tuple[Float[np.ndarray, "k t"], Bool[np.ndarray, "k t"]]:
    if tracked.shape != truth.points.shape:
        raise ValueError(f"tracked {tracked.shape} and true points {truth.points.shape} disagree")
    scored = truth.visible.copy()
    scored[:, 0] = False  # the handle itself is given
    return np.linalg.norm(tracked - truth.points, axis=-1), scored


def _mean_over_points(values: Float[np.ndarray, "k t"], scored: Bool[np.ndarray, "k t"]) -> float:
    seen = scored.any(axis=1)
    if not seen.any():
        return float("nan")
    values, scored = values[seen], scored[seen]
    return float((np.where(scored, values, 0).sum(axis=1) / scored.sum(axis=1)).mean())


def _patch(
    picture: UInt8[np.ndarray, "h w 3"], point: Float[np.ndarray, "2"], offsets: np.ndarray
) -> Float[np.ndarray, "n 1 3"]:
    where = (point + offsets).astype(np.float32)[:, None]
    patch = cv2.remap(
        picture.astype(np.float32), where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return patch / 255


def _resample(
    values: Float[np.ndarray, "n m"], draws: int, seed: int
) -> Float[np.ndarray, "draws m"]:
    rng = np.random.default_rng(seed)
    n = len(values)
    # Counts of how often each clip is drawn: the same as drawing indices, with less memory moved.
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return counts @ values / n


def _percentiles(samples: Float[np.ndarray, " n"], level: float) -> tuple[float, float]:
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)
