"""Prepared clips: the one schema of a record, and folders of ArrayRecord shards of them.

A record is a msgpack map of plain values and raw little-endian arrays: readable from any language,
with no TensorFlow. A folder holds shards, `rejects.jsonl` and `manifest.json`, which says what was
made of what, and against which the shards are checked when they are opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, Float16

from nuwa_jax.errors import UserError
from nuwa_jax.motion.tracks import Tracks

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FORMAT = "nuwa_jax.records"


class RecordError(UserError):
    """A record, or a folder of them, that is not what this version writes."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One clip.

    Attributes:
      source_id: names the clip it was made from.
      caption: what is seen, in words.
      video: the bytes of an mp4 with one key frame.
      fps: frames per second.
      height, width: of the picture in pixels.
      frames: number of them.
      start: second of the source clip at which it begins.
      tracks: in pixels of this picture; kept as float16 shares of the picture, counted from its
        middle, so that rounding moves a point inside by less than 1/8000 of the side.
      flow: float16 [t h' w' 2] or None: dense flow at a reduced size; displacements in pixels of
        this picture, not of the reduced one.
      content_hash: SHA-256 of `video`; filled in if empty.

    Raises:
      RecordError: the parts contradict each other.
    """

    source_id: str
    caption: str
    video: bytes
    fps: float
    height: int
    width: int
    frames: int
    start: float
    tracks: Tracks
    flow: Float16[np.ndarray, "t h w 2"] | None = None
    content_hash: str = ""

    def __post_init__(self) -> None:
        name = f"record {self.source_id!r}"
        if min(self.height, self.width, self.frames) < 1 or not 0 < self.fps < float("inf"):
            raise RecordError(
                f"{name} has size {self.width}x{self.height}, {self.frames} frames, {self.fps} fps"
            )
        if not self.video:
            raise RecordError(f"{name} has no video")
        if self.tracks.num_frames != self.frames:
            raise RecordError(
                f"{name} has tracks of {self.tracks.num_frames} frames, video of {self.frames}"
            )
        if self.flow is not None and (
            self.flow.ndim != 4 or self.flow.shape[::3] != (self.frames, 2) or 0 in self.flow.shape
        ):
            raise RecordError(f"{name} has flow of shape {self.flow.shape}, not [t h w 2]")
        content_hash = hashlib.sha256(self.video).hexdigest()
        if self.content_hash not in ("", content_hash):
            raise RecordError(f"{name} is damaged: its video does not have its content hash")
        object.__setattr__(self, "content_hash", content_hash)


def encode_record(record: Record) -> bytes:
    """The record as bytes; `decode_record` is its inverse up to the rounding of tracks."""
    size = np.array([record.width, record.height], np.float64)
    points = (record.tracks.points - (size - 1) / 2) / size
    values = {
        "version": SCHEMA_VERSION,
        "source_id": record.source_id,
        "caption": record.caption,
        "video": record.video,
        "fps": float(record.fps),
        "height": int(record.height),
        "width": int(record.width),
        "frames": int(record.frames),
        "start": float(record.start),
        "points": _pack(points.astype("<f2")),
        "state": _pack(record.tracks.state),
        "flow": None if record.flow is None else _pack(record.flow.astype("<f2")),
        "content_hash": record.content_hash,
    }
    return msgpack.packb(values)


def decode_record(data: bytes) -> Record:
    """The record in `data`.

    Raises:
      RecordError: it is damaged, of another version, or lacks something.
    """
    try:
        values = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise RecordError(f"a record of {len(data)} bytes is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("version") != SCHEMA_VERSION:
        version = values.get("version") if isinstance(values, dict) else None
        raise RecordError(
            f"a record has schema version {version}, this program reads {SCHEMA_VERSION}: "
            "prepare the clips again"
        )
    try:
        height, width = values["height"], values["width"]
        size = np.array([width, height], np.float64)
        points = _unpack(values["points"]).astype(np.float64) * size + (size - 1) / 2
        return Record(
            source_id=values["source_id"],
            caption=values["caption"],
            video=values["video"],
            fps=values["fps"],
            height=height,
            width=width,
            frames=values["frames"],
            start=values["start"],
            tracks=Tracks(points, _unpack(values["state"])),
            flow=None if values["flow"] is None else _unpack(values["flow"]),
            content_hash=values["content_hash"],
        )
    except RecordError:
        raise
    except KeyError as error:
        raise RecordError(f"a record lacks {error}: prepare the clips again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"a record is damaged: {error}") from error


class ShardWriter:
    """Writes records to one ArrayRecord file, which appears under its name only when complete."""

    def __init__(self, path: Path) -> None:
        self.records = 0
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> ShardWriter:
        # Groups of one: a damaged chunk costs one record, and reading one decodes no other.
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
        return self

    def write(self, record: Record) -> None:
        """Appends a record."""
        self._writer.write(encode_record(record))
        self.records += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)


class RecordReader:
    """Random access to the records of a prepared folder. Threads may share one.

    Attributes:
      manifest: as it was read.
      frames: the fewest frames that a record has.
      fingerprint: changes whenever the records or their order do.

    Raises:
      RecordError: there is no such folder, or a shard is missing, truncated or another one.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        shards = self.manifest["shards"]
        for shard in shards:
            path = folder / shard["name"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["bytes"]:
                raise RecordError(
                    f"{path} has {size} bytes, {MANIFEST} says {shard['bytes']}: copy it again or "
                    "prepare the clips again"
                )
        self.frames = int(self.manifest["min_frames"])
        self.fingerprint = hashlib.sha256(
            json.dumps([shard["sha256"] for shard in shards]).encode()
        ).hexdigest()
        filled = [str(folder / shard["name"]) for shard in shards if shard["records"]]
        if not filled:
            raise RecordError(f"{folder} has no records: see its rejects.jsonl")
        try:
            self._source = ArrayRecordDataSource(filled)
        except (RuntimeError, ValueError) as error:
            raise RecordError(f"{folder} has a damaged shard: {_line(error)}") from error
        if len(self._source) != self.manifest["records"]:
            raise RecordError(
                f"{folder} has {len(self._source)} records, {MANIFEST} says "
                f"{self.manifest['records']}: prepare the clips again"
            )

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Record:
        """Record `index`.

        Raises:
          RecordError: it is damaged.
        """
        try:
            data = self._source[index]
        except RuntimeError as error:
            raise RecordError(f"record {index} is damaged: {_line(error)}") from error
        return decode_record(data)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `manifest.json` of a prepared folder says.

    Raises:
      RecordError: there is none, or it is of another format or version.
    """
    path = folder / MANIFEST
    advice = "make one with python -m nuwa_jax.data.webvid"
    if not path.is_file():
        raise RecordError(f"{folder} is not a folder of prepared clips (no {MANIFEST}): {advice}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}): {advice}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RecordError(f"{path} is not a manifest of {FORMAT}: {advice}")
    if manifest.get("version") != SCHEMA_VERSION:
        raise RecordError(
            f"{path} has version {manifest.get('version')}, this program reads {SCHEMA_VERSION}: "
            "prepare the clips again"
        )
    missing = {"shards", "records", "min_frames"} - manifest.keys()
    if missing:
        raise RecordError(f"{path} lacks {', '.join(sorted(missing))}: prepare the clips again")
    return manifest


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(array: np.ndarray) -> dict[str, Any]:
    array = np.ascontiguousarray(array)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


def _unpack(packed: dict[str, Any]) -> Float[np.ndarray, "..."]:
    if packed["dtype"] not in ("<f2", "|u1"):
        raise RecordError(f"a record has an array of type {packed['dtype']!r}")
    return np.frombuffer(packed["data"], packed["dtype"]).reshape(packed["shape"])


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
