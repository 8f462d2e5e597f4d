"""A point tracker that never gives up: the best path through all frames at once.

Lucas-Kanade alone loses a point for good behind an occluder, in fast motion or in blur, and one
that goes on regardless follows whatever it slid onto. Here every frame offers a few places: where
Lucas-Kanade leads, and where the patch of the first frame is found again, anywhere. The path
through these places that looks most like the first frame and moves least wins (Viterbi).
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from nuwa_jax.motion.estimators import check_track_inputs, lucas_kanade, sample_patches
from nuwa_jax.motion.tracks import Tracks, TrackState, inside, resize_points


@dataclasses.dataclass(frozen=True)
class PersistentTracker:
    """Follows every point through every frame, for scoring videos that may be blurred.

    Places are compared on a copy of `matching_side`, where all pixels below are counted, and made
    precise on one of `tracking_side`. The state says how sure it is: visible where the patch
    resembles that of the first frame, occluded where the path only bridges a gap, outside beyond
    the picture.

    Attributes:
      matching_side: short side in pixels of the copy on which patches are compared.
      tracking_side: short side in pixels of the copy on which Lucas-Kanade runs.
      window: of Lucas-Kanade in pixels of its copy.
      levels: halvings of that copy, for motion larger than the window.
      places: how many best matches of the patch are considered in each frame.
      patch_radius: the patch is a square of 2 * patch_radius + 1 pixels.
      patch_sigma: of its Gaussian weights.
      tolerance: root mean square difference in grey levels at which a place is half bad. The
        badness d^2 / (d^2 + tolerance^2) is at most 1, so that an occluder costs no more than that.
      slowness: badness per pixel of motion and per squared pixel, from frame to frame.
    """

    matching_side: int = 64
    tracking_side: int = 192
    window: int = 15
    levels: int = 2
    places: int = 5
    patch_radius: int = 3
    patch_sigma: float = 1.5
    tolerance: float = 24.0
    slowness: tuple[float, float] = (0.02, 0.003)

    @property
    def name(self) -> str:
        return "opencv-lk-viterbi"

    def track(
        self, video: UInt8[np.ndarray, "t h w 3"], points: Float[np.ndarray, "k 2"]
    ) -> Tracks:
        """See `nuwa_jax.motion.estimators.PointTracker`.

        Raises:
          ValueError: the video is not uint8 [t h w 3] or the points are not finite [k 2].
        """
        points = check_track_inputs(video, points)
        size = video.shape[1:3]
        clip = _Clip(self, video)
        start = resize_points(points, size, clip.size)
        template = sample_patches(clip.pictures[0], start, self.patch_radius)

        places = [start[:, None]]
        badness = [np.zeros((len(points), 1))]
        chained = start
        for i in range(1, len(video)):
            chained = clip.follow(i - 1, i, chained, chained, self.levels)
            options = [chained, clip.follow(0, i, start, chained, self.levels)]
            options += list(self._matches(clip.pictures[i], template))
            # Matches are whole pixels, chains drift: each also as Lucas-Kanade corrects it against
            # the first frame, unless it runs away.
            for option in list(options):
                precise = clip.follow(0, i, start, option, levels=0)
                near = np.linalg.norm(precise - option, axis=-1, keepdims=True) < 2
                options.append(np.where(near, precise, option))
            places.append(np.stack(options, axis=1))
            badness.append(self._badness(clip.pictures[i], places[-1], template))

        chosen = _shortest_path(places, badness, self.slowness)  # [k t]
        index = np.arange(len(points))
        path = np.stack([p[index, c] for p, c in zip(places, chosen.T, strict=True)], axis=1)
        bad = np.stack([b[index, c] for b, c in zip(badness, chosen.T, strict=True)], axis=1)
        path = resize_points(path, clip.size, size)
        path[:, 0] = points
        state = np.where(bad < 0.5, TrackState.VISIBLE, TrackState.OCCLUDED)
        return Tracks(path, np.where(inside(path, *size), state, TrackState.OUTSIDE))

    def _weights(self) -> Float[np.ndarray, " p"]:
        axis = np.arange(-self.patch_radius, self.patch_radius + 1)
        weights = np.exp(-0.5 * np.square(axis / self.patch_sigma))
        weights = np.outer(weights, weights).ravel()
        return (weights / weights.sum()).astype(np.float32)

    def _badness(
        self,
        picture: Float[np.ndarray, "h w 3"],
        places: Float[np.ndarray, "k n 2"],
        template: Float[np.ndarray, "k p 3"],
    ) -> Float[np.ndarray, "k n"]:
        patches = sample_patches(picture, places, self.patch_radius)
        difference = np.square(patches - template[:, None]).mean(axis=-1) @ self._weights()
        return difference / (difference + self.tolerance**2)

    def _matches(
        self, picture: Float[np.ndarray, "h w 3"], template: Float[np.ndarray, "k p 3"]
    ) -> Float[np.ndarray, "n k 2"]:
        """The `places` pixels where each patch fits best, none beside a better one."""
        radius = self.patch_radius
        side = 2 * radius + 1
        # OpenCV squares the mask.
        mask = np.sqrt(self._weights()).reshape(side, side)
        mask = np.repeat(mask[..., None], 3, axis=-1)
        padded = cv2.copyMakeBorder(picture, *[radius] * 4, cv2.BORDER_REPLICATE)
        found = np.zeros((self.places, len(template), 2))
        for k, patch in enumerate(template):
            patch = np.ascontiguousarray(patch.reshape(side, side, 3))
            difference = cv2.matchTemplate(padded, patch, cv2.TM_SQDIFF, mask=mask)
            rows, columns = np.nonzero(difference <= cv2.erode(difference, np.ones((3, 3))))
            best = np.argsort(difference[rows, columns], kind="stable")[: self.places]
            # Fewer minima than places: repeating some changes nothing.
            best = np.resize(best, self.places)
            found[:, k] = np.stack([columns[best], rows[best]], axis=-1)
        return found


class _Clip:
    """A video at the two sizes at which it is looked at; points in pixels of the matching copy."""

    def __init__(self, tracker: PersistentTracker, video: UInt8[np.ndarray, "t h w 3"]) -> None:
        small = [_resize_short_side(frame, tracker.matching_side) for frame in video]
        self.pictures = [picture.astype(np.float32) for picture in small]
        self.size = small[0].shape[:2]
        self._fine = [_resize_short_side(frame, tracker.tracking_side) for frame in video]
        self._window = tracker.window

    def follow(
        self,
        source: int,
        target: int,
        points: Float[np.ndarray, "k 2"],
        guess: Float[np.ndarray, "k 2"],
        levels: int,
    ) -> Float[np.ndarray, "k 2"]:
        """Lucas-Kanade from frame `source` to `target`."""
        fine = self._fine[0].shape[:2]
        found = lucas_kanade(
            self._fine[source],
            self._fine[target],
            resize_points(points, self.size, fine),
            resize_points(guess, self.size, fine),
            self._window,
            levels,
        )
        return resize_points(found, fine, self.size)


def _resize_short_side(frame: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "H W 3"]:
    height, width = frame.shape[:2]
    factor = side / min(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    shrinks = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return (
        np.ascontiguousarray(frame)
        if factor == 1
        else cv2.resize(frame, size, interpolation=shrinks)
    )


def _shortest_path(
    places: list[Float[np.ndarray, "k n 2"]],
    badness: list[Float[np.ndarray, "k n"]],
    slowness: tuple[float, float],
) -> Int[np.ndarray, "k t"]:
    """Which place to choose in every frame, for the least sum of badness and motion."""
    total, arrivals = badness[0], []
    for before, after, bad in zip(places, places[1:], badness[1:], strict=False):
        distance = np.linalg.norm(after[:, :, None] - before[:, None], axis=-1)
        reached = total[:, None] + slowness[0] * distance + slowness[1] * distance**2
        arrivals.append(reached.argmin(axis=-1))
        total = reached.min(axis=-1) + bad
    chosen = [total.argmin(axis=-1)]
    for arrival in reversed(arrivals):
        chosen.append(np.take_along_axis(arrival, chosen[-1][:, None], axis=1)[:, 0])
    return np.stack(chosen[::-1], axis=1)
