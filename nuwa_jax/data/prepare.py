"""One video file to records: windows of it with tracks, or the reason why there are none."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float16, UInt8

from nuwa_jax.data.filters import (
    MAX_DISTANCE,
    colour_overlap,
    is_still,
    perceptual_hash,
    text_share,
    thumbnails,
)
from nuwa_jax.data.records import Record
from nuwa_jax.data.video import (
    VideoError,
    VideoInfo,
    encode_video,
    probe_video,
    read_video,
    resize_video,
    stride_for,
)
from nuwa_jax.errors import UserError
from nuwa_jax.motion.estimators import FlowEstimator, PointTracker, detect_keypoints
from nuwa_jax.motion.tracks import Tracks, TrackState, net_displacement

# Colour histograms of neighbouring frames overlap by less than this at a cut. In 61 real clips
# sampled at 16 frames per second the least overlap without a cut was 0.67, at a cut 0.25.
_CUT_OVERLAP = 0.6
# A cut between shots of the same colours shows in the tracks: nearly all end at once.
_CUT_LOSS = 0.9

# Windows to try for each that is wanted, before a clip is rejected.
_TRIES = 3

# Share of frames that may be shown for an unusual time. Above it, motion per frame means nothing.
_MAX_IRREGULAR = 0.05


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """How clips become records.

    Attributes:
      height, width: of the records' pictures in pixels.
      frames: of a record, at most.
      min_frames: of a record; a shorter clip is rejected.
      fps: frames per second to come near to, by taking every so manieth frame.
      windows: records to make of a clip, at most; spread evenly, never overlapping. Where one is
        not fit for training, another part of the clip is tried.
      substeps: frames to track per frame kept, at most. Tracks survive short steps better.
      max_tracks: points to follow.
      min_tracks: points that must be seen in at least half of the frames, or the clip is rejected.
      track_side: shorter side in pixels of the picture to track in, if the clip has as many.
      min_motion: share of the shorter side by which a track must move to count as moving.
      min_moving: tracks that must move, or the clip is rejected as static.
      min_scale: least size of the source's picture as a share of the records', or it is too small.
      min_seconds, max_seconds: how long a source may last; 0 for no limit.
      max_text: share of the square on the picture's shorter side that burned-in text may cover; 1
        lets all of it pass. Half-transparent watermarks are found in about every fourth clip.
      max_distance: bits, of 128, in which the perceptual hashes of two clips may differ for the
        later one to be rejected as a duplicate; -1 keeps duplicates.
      flow_divisor: store dense flow at 1 / this of the size; 0 stores none.
      crf: of the stored H.264; smaller is better and larger.
    """

    height: int = 256
    width: int = 256
    frames: int = 16
    min_frames: int = 8
    fps: float = 8.0
    windows: int = 1
    substeps: int = 2
    max_tracks: int = 256
    min_tracks: int = 8
    track_side: int = 256
    min_motion: float = 0.02
    min_moving: int = 4
    min_scale: float = 0.5
    min_seconds: float = 0.0
    max_seconds: float = 0.0
    max_text: float = 0.03
    max_distance: int = 6
    flow_divisor: int = 0
    crf: int = 18

    def __post_init__(self) -> None:
        for name in ("height", "width", "track_side"):
            if not 16 <= getattr(self, name) <= 4096:
                raise UserError(f"--{name} is from 16 to 4096 pixels, got {getattr(self, name)}")
        for name in ("windows", "substeps", "max_tracks", "min_tracks", "min_moving"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is at least 1, got {getattr(self, name)}")
        if not 2 <= self.min_frames <= self.frames:
            raise UserError(
                f"2 <= --min_frames <= --frames is needed, got {self.min_frames} and {self.frames}"
            )
        if not 0 < self.fps <= 1000:
            raise UserError(f"--fps is above 0 and at most 1000, got {self.fps}")
        if not 0 <= self.crf <= 51:
            raise UserError(f"--crf is from 0 to 51, got {self.crf}")
        if not 0 <= self.min_motion <= 1:
            raise UserError(f"--min_motion is a share from 0 to 1, got {self.min_motion}")
        for name in ("min_scale", "min_seconds", "max_seconds", "max_text"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} is at least 0, got {getattr(self, name)}")
        if not -1 <= self.max_distance <= MAX_DISTANCE:
            raise UserError(
                f"--max_distance is from -1 to {MAX_DISTANCE} bits, got {self.max_distance}"
            )
        if not 0 <= self.flow_divisor <= min(self.height, self.width):
            raise UserError(
                f"--flow_divisor is from 0 to the shorter side, got {self.flow_divisor}"
            )


class Rejected(Exception):
    """A clip, or a window of it, that is not fit for training.

    Attributes:
      reason: one word, to be counted.
      detail: one line, to be read.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Stopwatch:
    """CPU seconds of this process by stage; a stage within another counts for itself alone.

    Attributes:
      seconds: of each stage that was entered.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._running.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = time.process_time()
        if self._running:
            stage = self._running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


class MadeRecord(NamedTuple):
    """A record and the hash by which near-duplicates of it are found."""

    record: Record
    perceptual_hash: bytes


@dataclasses.dataclass(frozen=True)
class RecordMaker:
    """Makes records of video files.

    Attributes:
      options: how.
      tracker: follows the points.
      flow: estimates dense flow, if the options ask for it.
    """

    options: ClipOptions
    tracker: PointTracker
    flow: FlowEstimator

    def make(
        self,
        path: str | os.PathLike[str],
        source_id: str,
        caption: str,
        watch: Stopwatch,
        span: tuple[float, float] | None = None,
    ) -> list[MadeRecord]:
        """The records of one video file, at least one, in the order of their time.

        Args:
          path: of a local file.
          source_id: names the clip.
          caption: what is seen.
          watch: notes how long what took.
          span: seconds of the file between which the clip lies; None for all of it.

        Raises:
          Rejected: none of its windows is fit for training, or it cannot be decoded.
        """
        source = _Source(path, source_id, caption)
        try:
            with watch("decode"):
                info = probe_video(path)
            first, info = _within(info, span)
            _check_source(info, self.options)
            starts, length, stride = _windows(info, self.options)
            made: list[MadeRecord] = []
            rejected: list[Rejected] = []
            for start in starts:
                if len(made) == self.options.windows:
                    break
                window = _Window(first + start, length, stride, info.fps)
                try:
                    made.append(self._make(source, window, watch))
                except Rejected as error:
                    rejected.append(error)
        except VideoError as error:
            raise Rejected("undecodable", str(error)) from error
        if not made:
            first_error = rejected[0]
            tried = f" ({len(rejected)} windows tried)" if len(rejected) > 1 else ""
            raise Rejected(first_error.reason, first_error.detail + tried)
        return sorted(made, key=lambda each: each.record.start)

    def _make(self, source: _Source, window: _Window, watch: Stopwatch) -> MadeRecord:
        options = self.options
        # The finest step that divides the stride, so that every kept frame is also a tracked one.
        substeps = max(n for n in range(1, options.substeps + 1) if window.stride % n == 0)
        wanted = (window.length - 1) * substeps + 1

        def resized(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
            with watch("resize"):
                return _to_track_size(frame, options)

        with watch("decode"):
            fine, _ = read_video(
                source.path,
                start=window.start / window.fps,
                max_frames=wanted,
                stride=window.stride // substeps,
                each=resized,
            )
        if len(fine) < wanted:
            raise VideoError(
                f"{source.path} has only {len(fine)} frames of {wanted} from {window.start} on"
            )
        with watch("filter"):
            small = thumbnails(fine)
            _check_pictures(fine, small, options)
            hashed = perceptual_hash(small[::substeps])
        with watch("track"):
            tracks = _track(fine, substeps, options, self.tracker)
        with watch("resize"):
            video, _ = resize_video(fine[::substeps], options.height, options.width)
        flow = None
        if options.flow_divisor:
            with watch("flow"):
                flow = self._flow(video)
        fps = window.fps / window.stride
        with watch("encode"):
            encoded = encode_video(video, fps, crf=options.crf)
        record = Record(
            source_id=source.id,
            caption=source.caption,
            video=encoded,
            fps=fps,
            height=options.height,
            width=options.width,
            frames=window.length,
            start=window.start / window.fps,
            tracks=tracks,
            flow=flow,
        )
        return MadeRecord(record, hashed)

    def _flow(self, video: UInt8[np.ndarray, "t h w 3"]) -> Float16[np.ndarray, "t h w 2"]:
        divisor = self.options.flow_divisor
        height, width = video.shape[1] // divisor, video.shape[2] // divisor
        flow = self.flow.estimate(video)
        small = [cv2.resize(each, (width, height), interpolation=cv2.INTER_AREA) for each in flow]
        return np.stack(small).astype(np.float16)


class _Source(NamedTuple):
    path: str | os.PathLike[str]
    id: str
    caption: str


class _Window(NamedTuple):
    """Frames of the source: the first, how many are kept, one in how many, and per second."""

    start: int
    length: int
    stride: int
    fps: float


def _within(info: VideoInfo, span: tuple[float, float] | None) -> tuple[int, VideoInfo]:
    """The first frame of the part of a video between two times, and the part as if it were all."""
    if span is None:
        return 0, info
    first = max(0, round(span[0] * info.fps))
    frames = min(info.frames, round(span[1] * info.fps)) - first
    if frames < 1:
        raise Rejected(
            "too_short", f"{info.frames / info.fps:.2f} s, none from {span[0]:g} to {span[1]:g} s"
        )
    return first, dataclasses.replace(info, frames=frames)


def _check_source(info: VideoInfo, options: ClipOptions) -> None:
    scale = min(info.height / options.height, info.width / options.width)
    if scale < options.min_scale:
        raise Rejected(
            "too_small",
            f"{info.width}x{info.height}, at least {options.min_scale:g} of "
            f"{options.width}x{options.height} is needed",
        )
    seconds = info.frames / info.fps
    if seconds < options.min_seconds:
        raise Rejected("too_short", f"{seconds:.2f} s, {options.min_seconds:g} s are needed")
    if options.max_seconds and seconds > options.max_seconds:
        raise Rejected("too_long", f"{seconds:.2f} s, {options.max_seconds:g} s are allowed")
    if info.irregular > _MAX_IRREGULAR:
        raise Rejected(
            "variable_rate", f"{info.irregular:.0%} of the frames are shown for an unusual time"
        )


def _windows(info: VideoInfo, options: ClipOptions) -> tuple[list[int], int, int]:
    """The first frame of each window to try, in order; how many frames it keeps; their stride."""
    stride = stride_for(info.fps, options.fps)
    available = -(-info.frames // stride)
    if available < options.min_frames:
        raise Rejected(
            "too_short",
            f"{info.frames} frames at {info.fps:g} fps are {available} at {info.fps / stride:g}, "
            f"at least {options.min_frames} are needed",
        )
    length = min(options.frames, available)
    span = (length - 1) * stride + 1
    count = min(_TRIES * options.windows, info.frames // span)
    # Even gaps, also at the ends; from the middle outwards, as titles and fades are at the ends.
    edges = np.linspace(0, info.frames - count * span, count + 2)[1:-1]
    starts = [int(edge) + index * span for index, edge in enumerate(edges)]
    middle = (info.frames - span) / 2
    return sorted(starts, key=lambda start: abs(start - middle)), length, stride


def _to_track_size(
    frame: UInt8[np.ndarray, "h w 3"], options: ClipOptions
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture of the records' shape, larger than theirs where the clip allows it."""
    height, width = frame.shape[:2]
    most = min(height / options.height, width / options.width)
    side = min(options.height, options.width)
    scale = max(1.0, min(most, options.track_side / side))
    size = round(options.height * scale), round(options.width * scale)
    return resize_video(frame[None], *size)[0][0]


def _check_pictures(
    video: UInt8[np.ndarray, "t h w 3"], small: UInt8[np.ndarray, "t s s 3"], options: ClipOptions
) -> None:
    """What can be told of a window without tracking, which takes most of the time."""
    overlap = colour_overlap(small)
    worst = int(overlap.argmin())
    if overlap[worst] < _CUT_OVERLAP:
        raise Rejected(
            "cut", f"colours change at {_share(worst, video)} (overlap {overlap[worst]:.2f})"
        )
    if is_still(small):
        raise Rejected("static", "the picture does not change")
    if options.max_text < 1:
        text = text_share(video)
        if text > options.max_text:
            raise Rejected("text", f"burned-in text covers {text:.3f}")


def _track(
    video: UInt8[np.ndarray, "t h w 3"],
    substeps: int,
    options: ClipOptions,
    tracker: PointTracker,
) -> Tracks:
    """Tracks in pixels of the record, at its frames."""
    points = detect_keypoints(video[0], options.max_tracks)
    if len(points) < options.min_tracks:
        raise Rejected(
            "no_texture", f"{len(points)} points to follow, {options.min_tracks} are needed"
        )
    tracks = tracker.track(video, points)
    for index in range(1, len(video)):
        # Of those that did not leave the picture: an object that leaves is no cut.
        stayed = tracks.visible[:, index - 1] & (tracks.state[:, index] != TrackState.OUTSIDE)
        lost = 1 - tracks.visible[stayed, index].mean() if stayed.any() else 0.0
        if stayed.sum() >= options.min_tracks and lost >= _CUT_LOSS:
            raise Rejected("cut", f"{lost:.0%} of tracks end at once at {_share(index, video)}")
    tracks = Tracks(tracks.points[:, ::substeps], tracks.state[:, ::substeps])
    tracks = tracks.resize(video.shape[1:3], (options.height, options.width))
    lasting = 2 * tracks.visible.sum(axis=1) >= tracks.num_frames
    if lasting.sum() < options.min_tracks:
        raise Rejected(
            "lost",
            f"{lasting.sum()} of {len(points)} tracks are seen in half of the frames, "
            f"{options.min_tracks} are needed",
        )
    least = options.min_motion * min(options.height, options.width)
    moving = int((net_displacement(tracks) >= least).sum())
    if moving < options.min_moving:
        raise Rejected(
            "static",
            f"{moving} tracks move by {least:.1f} pixels, {options.min_moving} are needed",
        )
    # A point seen in its first frame only says nothing of motion.
    return tracks.select(tracks.visible.sum(axis=1) >= 2)


def _share(index: int, video: np.ndarray) -> str:
    return f"frame {index} of {len(video)}"
