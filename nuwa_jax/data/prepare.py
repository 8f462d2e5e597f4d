"""One video file to records: windows of it with tracks, or the reason why there are none."""

from __future__ import annotations

import dataclasses
import os

import cv2
import numpy as np
from jaxtyping import Float16, UInt8

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
from nuwa_jax.motion.estimators import DISFlow, PointTracker, detect_keypoints
from nuwa_jax.motion.tracks import Tracks, TrackState, net_displacement

# Colour histograms of neighbouring frames overlap by less than this at a cut. In 61 real clips
# sampled at 16 frames per second the least overlap without a cut was 0.67, at a cut 0.25.
_CUT_OVERLAP = 0.6
# A cut between shots of the same colours shows in the tracks: nearly all end at once.
_CUT_LOSS = 0.9

# Windows to try for each that is wanted, before a clip is rejected.
_TRIES = 3


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


def make_records(
    path: str | os.PathLike[str],
    source_id: str,
    caption: str,
    options: ClipOptions,
    tracker: PointTracker,
) -> list[Record]:
    """The records of one video file, at least one.

    Raises:
      Rejected: none of its windows is fit for training, or it cannot be decoded.
    """
    try:
        info = probe_video(path)
        starts, length, stride = _windows(info, options)
        records: list[Record] = []
        rejected: list[Rejected] = []
        for start in starts:
            if len(records) == options.windows:
                break
            try:
                records.append(
                    _make_record(
                        path, info, start, length, stride, source_id, caption, options, tracker
                    )
                )
            except Rejected as error:
                rejected.append(error)
    except VideoError as error:
        raise Rejected("undecodable", str(error)) from error
    if not records:
        first = rejected[0]
        tried = f" ({len(rejected)} windows tried)" if len(rejected) > 1 else ""
        raise Rejected(first.reason, first.detail + tried)
    return sorted(records, key=lambda record: record.start)


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


def _make_record(
    path: str | os.PathLike[str],
    info: VideoInfo,
    start: int,
    length: int,
    stride: int,
    source_id: str,
    caption: str,
    options: ClipOptions,
    tracker: PointTracker,
) -> Record:
    # The finest step that divides the stride, so that every kept frame is also a tracked one.
    substeps = max(n for n in range(1, options.substeps + 1) if stride % n == 0)
    wanted = (length - 1) * substeps + 1
    fine, _ = read_video(path, start=start / info.fps, max_frames=wanted, stride=stride // substeps)
    if len(fine) < wanted:
        raise VideoError(f"{path} has only {len(fine)} frames of {wanted} from frame {start} on")
    fine = _to_track_size(fine, options)
    _check_cuts(fine)
    tracks = _track(fine, substeps, options, tracker)
    video, _ = resize_video(fine[::substeps], options.height, options.width)
    fps = info.fps / stride
    return Record(
        source_id=source_id,
        caption=caption,
        video=encode_video(video, fps, crf=options.crf),
        fps=fps,
        height=options.height,
        width=options.width,
        frames=length,
        start=start / info.fps,
        tracks=tracks,
        flow=_flow(video, options.flow_divisor) if options.flow_divisor else None,
    )


def _to_track_size(
    video: UInt8[np.ndarray, "t h w 3"], options: ClipOptions
) -> UInt8[np.ndarray, "t h w 3"]:
    """A picture of the records' shape, larger than theirs where the clip allows it."""
    height, width = video.shape[1:3]
    most = min(height / options.height, width / options.width)
    side = min(options.height, options.width)
    scale = max(1.0, min(most, options.track_side / side))
    return resize_video(video, round(options.height * scale), round(options.width * scale))[0]


def _check_cuts(video: UInt8[np.ndarray, "t h w 3"]) -> None:
    histograms = []
    for frame in video:
        small = cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA)
        counts = cv2.calcHist([small], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3)
        histograms.append(counts.ravel() / 64**2)
    for index in range(1, len(video)):
        overlap = float(np.minimum(histograms[index - 1], histograms[index]).sum())
        if overlap < _CUT_OVERLAP:
            raise Rejected(
                "cut", f"colours change at {_share(index, video)} (overlap {overlap:.2f})"
            )


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


def _flow(video: UInt8[np.ndarray, "t h w 3"], divisor: int) -> Float16[np.ndarray, "t h w 2"]:
    height, width = video.shape[1] // divisor, video.shape[2] // divisor
    flow = DISFlow().estimate(video)
    small = [cv2.resize(each, (width, height), interpolation=cv2.INTER_AREA) for each in flow]
    return np.stack(small).astype(np.float16)


def _share(index: int, video: np.ndarray) -> str:
    return f"frame {index} of {len(video)}"
