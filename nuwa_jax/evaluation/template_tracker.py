"""A point tracker for scoring: it finds the first frame's patch again, in every frame.

Trackers that go from frame to frame lose a point behind an occluder, drift, and lock onto the
background when an object blurs, all of which would be charged to the model under evaluation. This
one compares every frame with the picture that was given, over the whole frame and over a few turns
and sizes, and takes the path of least total cost through all frames at once (Viterbi). It never
gives a point up: where nothing fits, the path takes the shortest way.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from nuwa_jax.motion.tracks import Tracks, TrackState, inside, resize_points


@dataclasses.dataclass(frozen=True)
class TemplateTracker:
    """Global template search with a shortest path over time.

    Attributes:
      side: pictures with a greater short side are tracked on a copy of this short side.
      radius: of the square patch, as a share of the short side; Gaussian weights within it.
      blur: standard deviation in pixels by which all frames are smoothed first, so that the
        sharpness of a video hardly matters.
      angles: turns of the patch that are tried, in degrees.
      scales: sizes of the patch that are tried.
      tolerance: difference of intensities in [0, 1], root mean square over the patch, from which
        on a place counts as not showing the point at all.
      slowness: cost, in units of that largest difference, of one pixel of motion per frame,
        squared.
      reach: largest motion per frame along each axis, as a share of the short side.
    """

    side: int = 96
    radius: float = 0.08
    blur: float = 0.7
    angles: tuple[float, ...] = (-30.0, 0.0, 30.0)
    scales: tuple[float, ...] = (0.85, 1.0, 1.18)
    tolerance: float = 0.25
    slowness: float = 2e-3
    reach: float = 0.2

    @property
    def name(self) -> str:
        return "template-1"  # the number changes with whatever changes its results

    def track(
        self, video: UInt8[np.ndarray, "t h w 3"], points: Float[np.ndarray, "k 2"]
    ) -> Tracks:
        """Follows points of the first frame through the video.

        Every point has a position in every frame. Its state says only what the search found:
        visible, or occluded where no place is within `tolerance`.
        """
        points = np.asarray(points, np.float64).reshape(-1, 2)
        frames, height, width = video.shape[:3]
        shrink = min(1.0, self.side / min(height, width))
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        pictures = [self._prepare(frame, size) for frame in video]
        start = resize_points(points, (height, width), size)

        short = min(size)
        radius = max(2, round(self.radius * short))
        reach = max(2, math.ceil(self.reach * short))
        # The patch is cut about the nearest pixel and the rest is added again at the end: a patch
        # between pixels is interpolated, thus blurred, and is found again beside where it was.
        pixel = np.clip(np.rint(start).astype(int), 0, (size[1] - 1, size[0] - 1))
        costs = self._costs(pictures, pixel, radius)  # [t k h w]
        path = _shortest_path(costs, pixel, self.slowness, reach)
        refined = _refine(costs, path) + (start - pixel)
        refined[0] = start
        least = _at(costs, path)
        result = resize_points(np.moveaxis(refined, 0, 1), size, (height, width))
        state = np.where(least.T < 1, TrackState.VISIBLE, TrackState.OCCLUDED)
        state = np.where(inside(result, height, width), state, TrackState.OUTSIDE)
        return Tracks(result, state)

    def _prepare(
        self, frame: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
    ) -> Float[np.ndarray, "h w 3"]:
        picture = frame.astype(np.float32) / 255
        if picture.shape[:2] != size:
            picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
        return cv2.GaussianBlur(picture, (0, 0), self.blur) if self.blur else picture

    def _costs(
        self,
        pictures: list[Float[np.ndarray, "h w 3"]],
        start: Int[np.ndarray, "k 2"],
        radius: int,
    ) -> Float[np.ndarray, "t k h w"]:
        """Squared difference to the patch, in units of `tolerance`² and at most 1, everywhere."""
        axis = np.arange(-radius, radius + 1)
        weights = np.exp(-(axis**2) / (2 * (radius / 1.5) ** 2))
        weights = np.outer(weights, weights)
        weights = np.repeat((weights / weights.sum() / 3)[..., None], 3, axis=-1).ravel()
        weights = weights.astype(np.float32)

        templates = self._templates(pictures[0], start, axis)  # [k p n], n pixels of a patch
        own = (templates**2) @ weights
        weighted = (templates * weights)[:, None]  # [k 1 p n]
        height, width = pictures[0].shape[:2]
        costs = np.empty((len(pictures), len(start), height, width), np.float32)
        for frame, picture in enumerate(pictures):
            padded = cv2.copyMakeBorder(picture, *[radius] * 4, cv2.BORDER_REPLICATE)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (len(axis),) * 2, (0, 1))
            patches = windows.transpose(0, 1, 3, 4, 2).reshape(height, width, -1)
            # One small product per point and row of the picture: a single large one is spread over
            # threads by BLAS, which wait for each other busily and crawl on a machine in use.
            product = np.matmul(weighted, patches.swapaxes(1, 2)[None])  # [k h p w]
            product *= -2
            product += own[:, None, :, None]
            costs[frame] = product.min(axis=2) + (patches**2) @ weights
        return np.clip(costs / self.tolerance**2, 0, 1)

    def _templates(
        self, picture: Float[np.ndarray, "h w 3"], start: Int[np.ndarray, "k 2"], axis: np.ndarray
    ) -> Float[np.ndarray, "k p n"]:
        u, v = np.meshgrid(axis, axis)
        maps = []
        for angle in np.radians(self.angles):
            for scale in self.scales:
                # What a later frame shows at (u, v) about the point was here in the first one.
                cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
                maps.append(np.stack([cos * u + sin * v, cos * v - sin * u], axis=-1))
        offsets = np.concatenate(maps)  # [p*s s 2]
        patches = [
            cv2.remap(
                picture,
                (point + offsets).astype(np.float32),
                None,
                interpolation=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            for point in start
        ]
        poses = len(self.angles) * len(self.scales)
        return np.array(patches, np.float32).reshape(len(start), poses, axis.size**2 * 3)


def _shortest_path(
    costs: Float[np.ndarray, "t k h w"],
    start: Int[np.ndarray, "k 2"],
    slowness: float,
    reach: int,
) -> Int[np.ndarray, "t k 2"]:
    """The integer pixels [t k 2] of least cost plus slowness times squared motion, from `start`."""
    frames, k, height, width = costs.shape
    total = np.full(costs.shape, np.inf, np.float32)
    total[0, np.arange(k), start[:, 1], start[:, 0]] = 0
    for frame in range(1, frames):
        spread = _spread(_spread(total[frame - 1], slowness, reach, 2), slowness, reach, 1)
        total[frame] = spread + costs[frame]

    path = np.empty((frames, k, 2), int)
    if frames > 1:
        best = total[-1].reshape(k, height * width).argmin(axis=1)
        path[-1] = np.stack([best % width, best // width], axis=-1)
    path[0] = start
    rows, columns = np.arange(height)[:, None], np.arange(width)
    for frame in range(frames - 2, 0, -1):
        for point in range(k):
            x, y = path[frame + 1, point]
            motion = slowness * ((rows - y) ** 2 + (columns - x) ** 2)
            far = (np.abs(rows - y) > reach) | (np.abs(columns - x) > reach)
            best = np.where(far, np.inf, total[frame, point] + motion).argmin()
            path[frame, point] = best % width, best // width
    return path


def _spread(
    total: Float[np.ndarray, "k h w"], slowness: float, reach: int, axis: int
) -> Float[np.ndarray, "k h w"]:
    """min over shifts along an axis of `total` and the cost of the shift."""
    result = total.copy()
    target, source = np.moveaxis(result, axis, 0), np.moveaxis(total, axis, 0)
    for shift in range(1, min(reach + 1, len(source))):
        cost = np.float32(slowness * shift**2)
        np.minimum(target[shift:], source[:-shift] + cost, out=target[shift:])
        np.minimum(target[:-shift], source[shift:] + cost, out=target[:-shift])
    return result


def _refine(
    costs: Float[np.ndarray, "t k h w"], path: Int[np.ndarray, "t k 2"]
) -> Float[np.ndarray, "t k 2"]:
    """Sub-pixel positions: the vertex of a parabola along each axis."""
    height, width = costs.shape[2:]
    refined = path.astype(np.float64)
    middle = _at(costs, path)
    for axis, limit in ((0, width), (1, height)):
        step = np.eye(2, dtype=int)[axis]
        before = _at(costs, np.clip(path - step, 0, (width - 1, height - 1)))
        after = _at(costs, np.clip(path + step, 0, (width - 1, height - 1)))
        curvature = before - 2 * middle + after
        interior = (path[..., axis] > 0) & (path[..., axis] < limit - 1) & (curvature > 1e-9)
        shift = (before - after) / (2 * np.where(interior, curvature, 1))
        refined[..., axis] += np.where(interior, np.clip(shift, -0.5, 0.5), 0)
    return refined


def _at(
    costs: Float[np.ndarray, "t k h w"], path: Int[np.ndarray, "t k 2"]
) -> Float[np.ndarray, "t k"]:
    t, k = np.ogrid[: costs.shape[0], : costs.shape[1]]
    return costs[t, k, path[..., 1], path[..., 0]]
