"""Point trackers and flow estimators behind two small protocols; OpenCV's need no weights.

Whatever follows points or estimates flow can stand in for these: a learned tracker only has to
have a `name` and a `track`. Names go into the manifest of the records made with them, and so tell
all that the result depends on: the method, a number that grows when its results change, and the
version of the library or the hash of the weights behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from nuwa_jax.motion.tracks import Tracks, TrackState, inside, resize_points


class PointTracker(Protocol):
    """Follows points of the first frame through a clip."""

    @property
    def name(self) -> str: ...

    def track(
        self, video: UInt8[np.ndarray, "t h w 3"], points: Float[np.ndarray, "k 2"]
    ) -> Tracks:
        """Tracks of `points` (x, y) of frame 0, in their order, each visible or outside there."""
        ...


class FlowEstimator(Protocol):
    """Estimates the motion of every pixel."""

    @property
    def name(self) -> str: ...

    def estimate(self, video: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t h w 2"]:
        """`flow[0]` is 0, `flow[i]` the displacement from frame i-1 to i at positions of i-1."""
        ...


@dataclasses.dataclass(frozen=True)
class LucasKanadeTracker:
    """Pyramidal Lucas-Kanade from frame to frame that gives a point up as soon as it is unsure.

    A point is lost where tracking it back does not return, or where the patch about it no longer
    resembles that of the frame before. From then on it is occluded (outside, if that was at the
    border of the picture), stays where it was last seen and is not found again: what is called
    visible shall be right, for training drags are made of it. Changes of exposure are undone first
    (`even_exposure`).

    Attributes:
      window: side in pixels of the patch that is matched, on the enlarged copy. A larger one sees
        more of what moves otherwise: on procedural scenes of 256 x 256 pixels 15 instead of 13
        leaves a third more of the surviving tracks astray. A smaller one loses fast points.
      levels: halvings of the picture, so that motion larger than the window is found.
      max_round_trip: pixels by which tracking back may miss the start (0.5 as in BackFlow checks).
      min_similarity: least normalised cross-correlation of the patches of successive frames.
      upsample: track on a copy enlarged by this factor. On pictures of 64 x 64 the patch is then a
        smaller part of an object and positions are finer: 3 leaves a third as many points astray
        as 1 does. None: so that the short side becomes at least 192, by at most 4.
    """

    window: int = 13
    levels: int = 3
    max_round_trip: float = 0.5
    min_similarity: float = 0.7
    upsample: int | None = None

    def __post_init__(self) -> None:
        if self.window < 3 or self.levels < 0 or (self.upsample or 1) < 1:
            raise ValueError(
                "a tracker needs window >= 3, levels >= 0 and upsample >= 1, got "
                f"{self.window}, {self.levels} and {self.upsample}"
            )

    @property
    def name(self) -> str:
        return f"opencv-lk-2 (opencv {cv2.__version__})"

    def track(
        self, video: UInt8[np.ndarray, "t h w 3"], points: Float[np.ndarray, "k 2"]
    ) -> Tracks:
        """See `PointTracker`.

        Raises:
          ValueError: the video is not uint8 [t h w 3] or the points are not finite [k 2].
        """
        points = check_track_inputs(video, points)
        frames, height, width = video.shape[:3]
        factor = self.upsample or enlargement(height, width)
        pictures = [enlarge(frame, factor) for frame in even_exposure(video)]
        size = pictures[0].shape[:2]
        position = resize_points(points, (height, width), size)

        def step(i: int, start: Float[np.ndarray, "k 2"]) -> tuple[np.ndarray, np.ndarray]:
            before, after = pictures[i - 1], pictures[i]
            moved = lucas_kanade(before, after, start, start, self.window, self.levels)
            return moved, lucas_kanade(after, before, moved, start, self.window, self.levels)

        tracks = follow_while_sure(
            pictures, position, step, self.window, self.max_round_trip * factor, self.min_similarity
        )
        return tracks.resize(size, (height, width))


@dataclasses.dataclass(frozen=True)
class DISFlow:
    """Dense inverse search flow (Kroeger et al., ECCV 2016) in OpenCV's presets."""

    preset: Literal["ultrafast", "fast", "medium"] = "medium"

    @property
    def name(self) -> str:
        return f"opencv-dis-{self.preset}-1 (opencv {cv2.__version__})"

    def estimate(self, video: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t h w 2"]:
        """See `FlowEstimator`.

        Raises:
          ValueError: the video is not uint8 [t h w 3].
        """
        check_video(video)
        frames, height, width = video.shape[:3]
        # DIS matches patches of 8 pixels on a pyramid and fails on pictures that have no room for
        # it; those continue outwards.
        bottom, right = max(0, 32 - height), max(0, 32 - width)
        method = cv2.DISOpticalFlow.create(
            getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{self.preset.upper()}")
        )
        grey = [
            cv2.copyMakeBorder(
                cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), 0, bottom, 0, right, cv2.BORDER_REPLICATE
            )
            for frame in video
        ]
        flow = np.zeros((frames, height, width, 2), np.float32)
        for i in range(1, frames):
            flow[i] = method.calc(grey[i - 1], grey[i], None)[:height, :width]
        return flow


def detect_keypoints(
    frame: UInt8[np.ndarray, "h w 3"],
    count: int,
    *,
    quality: float = 0.01,
    min_distance: float | None = None,
) -> Float[np.ndarray, "k 2"]:
    """At most `count` corners (Shi & Tomasi 1994) that can be tracked well, strongest first.

    Args:
      frame: the picture.
      count: how many at most; a picture without texture has none.
      quality: least strength, as a share of that of the strongest.
      min_distance: in pixels between two of them; None: such that `count` of them would cover a
        quarter of the picture evenly, at least 1.
    """
    check_video(frame[None])
    height, width = frame.shape[:2]
    if min_distance is None:
        min_distance = max(1.0, 0.5 * (height * width / max(count, 1)) ** 0.5)
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    corners = cv2.goodFeaturesToTrack(grey, count, quality, min_distance, blockSize=5)
    if corners is None or count < 1:
        return np.zeros((0, 2), np.float32)
    return corners.reshape(-1, 2).astype(np.float32)


# Parts that other trackers share.


def follow_while_sure(
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]],
    points: Float[np.ndarray, "k 2"],
    step: Callable[[int, Float[np.ndarray, "k 2"]], tuple[np.ndarray, np.ndarray]],
    window: int,
    max_round_trip: float,
    min_similarity: float,
) -> Tracks:
    """Follows points from picture to picture and gives each up for good once it is unsure.

    Args:
      pictures: of one size.
      points: (x, y) in the first.
      step: given i and points of picture i-1, where they are in picture i, and where those lead
        back to in picture i-1.
      window: side in pixels of the patches that must look alike.
      max_round_trip: pixels by which tracking back may miss the start.
      min_similarity: least normalised cross-correlation of the patches.
    """
    size = pictures[0].shape[:2]
    position = points
    alive = inside(position, *size)
    state = np.where(alive, TrackState.VISIBLE, TrackState.OUTSIDE)
    positions, states = [position], [state]
    for i, (before, after) in enumerate(zip(pictures, pictures[1:], strict=False), 1):
        rows = np.flatnonzero(alive)  # what is lost stays lost: nothing is spent on it
        start = position[rows]
        moved, back = step(i, start)
        sure = np.linalg.norm(back - start, axis=-1) <= max_round_trip
        sure &= _similarity(before, after, start, moved, window) >= min_similarity
        within = inside(moved, *size)
        # Half a patch from the border, a lost point most likely went out.
        leaving = ~within | ~inside(moved + window / 2 * np.sign(moved - start), *size)
        lost = np.where(leaving, TrackState.OUTSIDE, TrackState.OCCLUDED)
        # A point that leaves the picture in good order is followed beyond its border.
        position, state, alive = position.copy(), state.copy(), alive.copy()
        position[rows] = np.where((sure | ~within)[:, None], moved, start)
        state[rows] = np.where(sure & within, TrackState.VISIBLE, lost)
        alive[rows] = sure & within
        positions.append(position)
        states.append(state)
    return Tracks(np.stack(positions, axis=1), np.stack(states, axis=1))


def lucas_kanade(
    before: UInt8[np.ndarray, "h w 3"],
    after: UInt8[np.ndarray, "h w 3"],
    points: Float[np.ndarray, "k 2"],
    guess: Float[np.ndarray, "k 2"],
    window: int,
    levels: int,
) -> Float[np.ndarray, "k 2"]:
    """Where `points` of `before` are in `after`, searched from `guess`; in colour.

    Colour matters: on procedural scenes a third fewer points go astray than by brightness alone.
    A point with no texture about it, or that starts outside, stays at the guess.
    """
    guess = np.asarray(guess, np.float32)
    if len(points) == 0:
        return guess.astype(np.float64)
    found, _, _ = cv2.calcOpticalFlowPyrLK(
        before,
        after,
        np.ascontiguousarray(points, np.float32),
        np.ascontiguousarray(guess).copy(),
        winSize=(window, window),
        maxLevel=levels,
        criteria=(cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 0.01),
        flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
        minEigThreshold=1e-6,
    )
    # A nearly singular patch can be thrown anywhere.
    size = max(before.shape[:2])
    sane = np.isfinite(found) & (np.abs(found) < 4 * size)
    return np.where(sane.all(axis=-1, keepdims=True), found, guess).astype(np.float64)


def even_exposure(
    video: UInt8[np.ndarray, "t h w 3"], max_gain: float = 2.0
) -> UInt8[np.ndarray, "t h w 3"]:
    """The video with each channel as bright as in frame 0, by at most a factor of `max_gain`.

    Lucas-Kanade takes a change of brightness for motion: where a clip darkens by a fifth, its
    median error on procedural scenes is 1 pixel, and 0.15 after this. The gain between neighbours
    is the median over the picture, which what moves through it hardly touches.
    """
    small = [cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA) for frame in video]
    small = np.stack(small).reshape(len(video), -1, 3).astype(np.float64) + 1
    gains = np.cumprod(np.median(small[:-1] / small[1:], axis=1), axis=0)
    gains = np.clip(gains, 1 / max_gain, max_gain)
    out = video.copy()
    for frame, gain in zip(out[1:], gains, strict=True):
        if np.abs(gain - 1).max() >= 0.01:  # a grey level or two: as good as none
            table = np.clip(np.arange(256)[:, None] * gain, 0, 255).round().astype(np.uint8)
            cv2.LUT(frame, table[None], frame)
    return out


def enlargement(height: int, width: int) -> int:
    """The factor by which the short side becomes at least 192 pixels, at most 4."""
    return min(4, max(1, -(-192 // min(height, width))))


def enlarge(frame: UInt8[np.ndarray, "h w 3"], factor: int) -> UInt8[np.ndarray, "H W 3"]:
    if factor == 1:
        return np.ascontiguousarray(frame)
    return cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def sample_patches(
    image: Float[np.ndarray, "h w c"], centres: Float[np.ndarray, "*n 2"], radius: int
) -> Float[np.ndarray, "*n p c"]:
    """The (2 radius + 1)^2 pixels about each centre, bilinear, borders continued outwards."""
    centres = np.asarray(centres, np.float32)
    axis = np.arange(-radius, radius + 1, dtype=np.float32)
    offsets = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    places = (centres[..., None, :] + offsets).reshape(-1, len(offsets), 2)
    shape = (*centres.shape[:-1], len(offsets), image.shape[-1])
    if not len(places):
        return np.zeros(shape, np.float32)
    if shape[-1] == 2:  # of these OpenCV 5 samples places rounded to 1/32 pixel, of others not
        image = np.concatenate([image, np.zeros_like(image[..., :1])], axis=-1)
    # OpenCV's maps have fewer than 2^15 rows.
    sampled = [
        cv2.remap(image, places[i : i + 30000], None, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE)
        for i in range(0, len(places), 30000)
    ]
    found = sampled[0] if len(sampled) == 1 else np.concatenate(sampled)
    found = found.reshape(*places.shape[:2], -1)
    return found[..., : shape[-1]].reshape(shape)


def check_track_inputs(video: np.ndarray, points: np.ndarray) -> Float[np.ndarray, "k 2"]:
    """The points as float64 [k 2]; raises ValueError if they or the video are not as promised."""
    check_video(video)
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"points to track are finite and [k 2], got shape {points.shape}")
    return points


def check_video(video: np.ndarray) -> None:
    """Raises ValueError if it is no uint8 [t h w 3]."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(f"expected video uint8 [t h w 3], got {video.dtype} {video.shape}")


def _similarity(
    before: UInt8[np.ndarray, "h w 3"],
    after: UInt8[np.ndarray, "h w 3"],
    points: Float[np.ndarray, "k 2"],
    moved: Float[np.ndarray, "k 2"],
    window: int,
) -> Float[np.ndarray, " k"]:
    """Normalised cross-correlation, -1..1, of the patches about the points, over all channels.

    Grey levels of 1 are added to both deviations, so that two flat patches count as unlike.
    """
    a = sample_patches(before.astype(np.float32), points, window // 2)
    b = sample_patches(after.astype(np.float32), moved, window // 2)
    count = a.shape[1] * a.shape[2]
    a -= np.einsum("kpc->kc", a)[:, None] / a.shape[1]
    b -= np.einsum("kpc->kc", b)[:, None] / b.shape[1]
    power_a, power_b, product = (
        np.einsum("kpc,kpc->k", x, y) / count for x, y in ((a, a), (b, b), (a, b))
    )
    return product / np.sqrt((power_a + 1) * (power_b + 1))
