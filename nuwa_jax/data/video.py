"""Clips as files and as arrays: probe, decode, encode, resize (PyAV, no ffmpeg program needed).

Files come from anywhere, so every fault of theirs becomes a `VideoError` with its reason, and
decoding is bounded: one thread, a limit on the size of a picture and on the memory of a clip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, UInt8

from nuwa_jax.errors import UserError

MAX_PICTURE_PIXELS = 8192 * 8192
MAX_CLIP_BYTES = 4 << 30

# Written into the file where the picture had to be padded to even sides, read back to undo it.
_SIZE_COMMENT = "nuwa_jax picture size "

# FFmpeg's names of formats that are sought in exactly. MPEG program and transport streams, for one,
# are sought in by bytes, and the times of what is then decoded first are guesses.
_SOUGHT_IN = {"mov", "mp4", "matroska", "webm"}

# An AVI has the order in which frames are decoded, not shown: they are counted. So are frames of
# streams without a container.
_WITHOUT_TIMES = {"avi", "h264", "hevc", "m4v", "mpegvideo"}


class VideoError(UserError):
    """A video that cannot be read or written: the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file holds, counted rather than believed.

    Attributes:
      height, width: of the picture as it is shown, in pixels.
      frames: number of them.
      fps: frames per second, on average.
      irregular: share of frames that are shown for a time other than the usual one.
    """

    height: int
    width: int
    frames: int
    fps: float
    irregular: float = 0.0


@dataclasses.dataclass(frozen=True)
class PointTransform:
    """Where the points of a clip are after it was resized: `points * scale + offset`."""

    scale: tuple[float, float]
    offset: tuple[float, float]

    def __call__(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        return points * np.array(self.scale) + np.array(self.offset)


def probe_video(source: str | os.PathLike[str] | bytes) -> VideoInfo:
    """Walks through a file without decoding it.

    Raises:
      VideoError: it is missing, empty, truncated, damaged or has no pictures.
    """
    name = _name(source)
    with _opened(source) as (container, stream):
        packets = 0
        times = []
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(f"{name} is damaged at frame {packets}: copy or encode it again")
            packets += packet.size > 0
            if packet.size > 0 and packet.pts is not None:
                times.append(packet.pts)
        # A file that was cut off still has the number of frames in its header.
        if packets < stream.frames:
            raise VideoError(
                f"{name} is truncated: {packets} frames of {stream.frames} are there; copy it again"
            )
        if packets == 0:
            raise VideoError(f"{name} has no frames")
        height, width = _shown_size(container, stream)
        return VideoInfo(height, width, packets, _rate(stream, name), _irregular(times))


def read_video(
    source: str | os.PathLike[str] | bytes,
    *,
    start: float = 0.0,
    max_frames: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    each: Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "h w 3"]] | None = None,
) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """Decodes a clip, or a part of it.

    Args:
      source: a path, or the bytes of a file.
      start: seconds from the beginning at which to start, exact to a frame. mp4, mov, mkv and webm
        are decoded from the key frame before it, others from their beginning.
      max_frames: frames to return at most; all there are by default.
      stride: take every so manieth frame.
      fps: instead of `stride`: the stride that comes nearest to this rate, so that frames stay
        evenly spaced.
      each: done to every frame that is taken, such as making it smaller: then large pictures need
        not all be in memory.

    Returns:
      The frames and how many of them make a second.

    Raises:
      VideoError: it cannot be read, ends before `start`, or would take too much memory.
    """
    if stride is not None and fps is not None:
        raise ValueError("read_video takes stride or fps, not both")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is at least 1, got {max_frames}")
    name = _name(source)
    frames: list[UInt8[np.ndarray, "h w 3"]] = []
    shape: tuple[int, ...] | None = None
    with _opened(source) as (container, stream):
        rate = _rate(stream, name)
        step = stride_for(rate, fps) if fps is not None else stride or 1
        crop = _picture_size(container)
        # One for all frames: it takes longer to set up than to convert a small picture.
        reformatter = VideoReformatter()
        for index, frame in enumerate(_decode_from(container, stream, start, rate, name)):
            if index % step:
                continue
            picture = _to_rgb(frame, reformatter, crop)
            if shape is not None and picture.shape != shape:
                raise VideoError(f"{name} changes its picture size at frame {index}")
            shape = picture.shape
            picture = picture if each is None else each(picture)
            if (len(frames) + 1) * picture.nbytes > MAX_CLIP_BYTES:
                raise VideoError(
                    f"{name} takes more than {MAX_CLIP_BYTES >> 30} GiB decoded: ask for fewer "
                    "frames with max_frames"
                )
            frames.append(picture)
            if len(frames) == max_frames:
                break
        if not frames:
            raise VideoError(f"{name} has no frame at {start:g} s")
        if max_frames is None and start == 0 and index + 1 < stream.frames:
            raise VideoError(
                f"{name} is truncated: {index + 1} frames of {stream.frames} can be decoded; "
                "copy it again"
            )
    return np.stack(frames), rate / step


def stride_for(source_fps: float, fps: float) -> int:
    """The stride at which a clip of `source_fps` comes nearest to `fps` (in ratio)."""
    exact = max(source_fps / fps, 1.0)
    low = math.floor(exact)
    return low if exact / low <= (low + 1) / exact else low + 1


def write_video(
    path: str | os.PathLike[str],
    video: UInt8[np.ndarray, "t h w 3"],
    fps: float,
    *,
    crf: int = 18,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an mp4 (H.264, yuv420p: plays everywhere), complete or not at all.

    Odd sides are padded to even ones by repeating the last row or column; the true size is noted
    in the file, and `read_video` gives it back.

    Args:
      path: of the file; its folder is made.
      video: the frames.
      fps: frames per second.
      crf: constant rate factor of x264; smaller is better and larger, 18 is visually lossless.
      metadata: tags for the file, such as title.

    Raises:
      VideoError: the name does not end in .mp4 or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise VideoError(f"videos are written as .mp4, got {path}: change the name")
    # Same folder, so that the rename at the end does not cross file systems.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            options = {"crf": str(crf)}
            # The index in front lets browsers play while they load.
            _encode(str(temporary), video, fps, options, {"movflags": "+faststart"}, metadata or {})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path} cannot be written: {error}") from error


def encode_video(video: UInt8[np.ndarray, "t h w 3"], fps: float, *, crf: int = 18) -> bytes:
    """The bytes of an mp4 for records: one key frame, quick to encode and to decode."""
    buffer = io.BytesIO()
    # On clips of 16 frames, veryfast takes a third of the default preset's time for files 2 %
    # smaller and 0.45 dB worse.
    options = {"crf": str(crf), "preset": "veryfast", "tune": "fastdecode", "g": str(len(video))}
    _encode(buffer, video, fps, options, {}, {})
    return buffer.getvalue()


def resize_video(
    video: UInt8[np.ndarray, "t h w 3"], height: int, width: int
) -> tuple[UInt8[np.ndarray, "t h w 3"], PointTransform]:
    """Fills height x width: crops the middle of the right shape, averages it down.

    Returns:
      The clip and where its points went.
    """
    old_height, old_width = video.shape[1:3]
    crop_height = max(1, min(old_height, round(old_width * height / width)))
    crop_width = max(1, min(old_width, round(old_height * width / height)))
    top, left = (old_height - crop_height) // 2, (old_width - crop_width) // 2
    scale = (width / crop_width, height / crop_height)
    transform = PointTransform(scale, ((0.5 - left) * scale[0] - 0.5, (0.5 - top) * scale[1] - 0.5))
    video = video[:, top : top + crop_height, left : left + crop_width]
    if (crop_height, crop_width) == (height, width):
        return np.ascontiguousarray(video), transform
    shrinks = min(crop_height / height, crop_width / width) >= 1
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = [cv2.resize(frame, (width, height), interpolation=method) for frame in video]
    return np.stack(resized), transform


def _encode(
    target: str | io.BytesIO,
    video: np.ndarray,
    fps: float,
    options: Mapping[str, str],
    container_options: Mapping[str, str],
    metadata: Mapping[str, str],
) -> None:
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"a video is uint8 [t h w 3], got {video.dtype} {video.shape}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is positive, got {fps}")
    height, width = video.shape[1:3]
    # yuv420p stores colour for 2x2 pixels: sides must be even.
    video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(target, "w", format="mp4", options=dict(container_options)) as container:
        container.metadata.update(metadata)
        if video.shape[1:3] != (height, width):
            container.metadata["comment"] = f"{_SIZE_COMMENT}{width}x{height}"
        # The denominator 1001 * 2^k holds the NTSC rates, also after a stride.
        rate = Fraction(fps).limit_denominator(1001 * 64)
        stream = container.add_stream("libx264", rate=rate, options=dict(options))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread: the same bytes on every machine.
        stream.codec_context.thread_count = 1
        for picture in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextlib.contextmanager
def _opened(
    source: str | os.PathLike[str] | bytes,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream; FFmpeg's errors become `VideoError`s."""
    name = _name(source)
    if isinstance(source, bytes):
        opened: str | io.BytesIO = io.BytesIO(source)
        size = len(source)
    else:
        # Also keeps FFmpeg from taking a name for the address of something on the network.
        path = Path(source)
        if not path.is_file():
            raise VideoError(f"{name} is not a file")
        opened, size = f"file:{path}", path.stat().st_size
    if size == 0:
        raise VideoError(f"{name} is empty (0 bytes)")
    try:
        with av.open(opened, metadata_errors="replace") as container:
            # Cover pictures of songs count as video streams.
            streams = [
                each
                for each in container.streams.video
                if not each.disposition & av.stream.Disposition.attached_pic
            ]
            if not streams:
                raise VideoError(f"{name} has no video in it")
            stream = streams[0]
            if stream.codec_context is None:
                raise VideoError(f"{name} is in a format that this FFmpeg cannot decode")
            if not 0 < stream.width * stream.height <= MAX_PICTURE_PIXELS:
                raise VideoError(
                    f"{name} has pictures of {stream.width}x{stream.height}: at most "
                    f"{MAX_PICTURE_PIXELS} pixels can be decoded"
                )
            # Clips are decoded in parallel by the caller; threads within one cost more than they
            # save.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{name} cannot be decoded: {error.strerror or error}") from error


def _decode_from(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    start: float,
    rate: float,
    name: str,
) -> Iterator[av.VideoFrame]:
    """Frames in the order they are shown, from the one shown at `start` seconds on."""
    if start <= 0:
        yield from container.decode(stream)
        return
    names = set(container.format.name.split(","))
    first = (stream.start_time or 0) + round(start / float(stream.time_base))
    tolerance = 0.5 / rate / float(stream.time_base)
    if names & _SOUGHT_IN:
        container.seek(first, stream=stream, backward=True)
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is not None and frame.pts is not None and frame.pts <= first + tolerance:
            yield from _shown_from(itertools.chain([frame], frames), first - tolerance, name)
            return
        # A key frame may be decoded before `start` and shown after it.
        container.seek(stream.start_time or 0, stream=stream, backward=True)
    if names & _WITHOUT_TIMES:
        yield from itertools.islice(container.decode(stream), round(start * rate), None)
    else:
        yield from _shown_from(container.decode(stream), first - tolerance, name)


def _shown_from(frames: Iterable[av.VideoFrame], time: float, name: str) -> Iterator[av.VideoFrame]:
    for frame in frames:
        if frame.pts is None:
            raise VideoError(f"{name} has no time stamps: only its beginning can be read")
        if frame.pts >= time:
            yield frame


def _to_rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, crop: tuple[int, int] | None
) -> UInt8[np.ndarray, "h w 3"]:
    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if crop is not None:
        picture = picture[: crop[0], : crop[1]]
    turns = _quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often to turn the picture counter-clockwise: telephones store it lying on its side."""
    return round(frame.rotation / 90) % 4


def _picture_size(container: av.container.InputContainer) -> tuple[int, int] | None:
    comment = container.metadata.get("comment", "")
    if not comment.startswith(_SIZE_COMMENT):
        return None
    width, _, height = comment.removeprefix(_SIZE_COMMENT).partition("x")
    return int(height), int(width)


def _shown_size(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[int, int]:
    height, width = _picture_size(container) or (stream.height, stream.width)
    container.seek(0)
    for frame in container.decode(stream):
        return (width, height) if _quarter_turns(frame) % 2 else (height, width)
    return height, width


def _irregular(times: list[int]) -> float:
    """Share of the steps between time stamps that are not within a half of the median step."""
    steps = np.diff(np.sort(times))
    if not len(steps):
        return 0.0
    return float((np.abs(steps - np.median(steps)) > 0.5 * np.median(steps)).mean())


def _rate(stream: av.VideoStream, name: str) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError(f"{name} does not say how many frames make a second")
    return float(rate)


def _name(source: str | os.PathLike[str] | bytes) -> str:
    return f"a video of {len(source)} bytes" if isinstance(source, bytes) else str(source)
