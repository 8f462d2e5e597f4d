"""Prepared clips: the one schema of a record, and folders of ArrayRecord shards of them.

A record is a tf.train.Example whose features TFDS describes, though nothing here needs TensorFlow:
with the metadata that `write_metadata` adds, `tfds.builder_from_directory(folder).as_data_source()`
reads the same shards. A folder holds shards, `rejects.jsonl` and `manifest.json`, which says what
was made of what, and against which the shards are checked when they are opened.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf.message import DecodeError
from jaxtyping import Float16

from nuwa_jax.errors import UserError
from nuwa_jax.motion.tracks import Tracks

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
FORMAT = "nuwa_jax.records"
DATASET = "clips"
SPLIT = "train"


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
      latents: float16 [t h' w' c] or None: what the autoencoder's `encode` makes of the video,
        scaled as the U-Net takes it. The manifest's `encoders` says whose. A record that has them
        may do without `video`.
      text_embedding: float16 [l c] or None: the caption as the model's text encoder gives it.
      content_hash: SHA-256 of `video`, or of `latents` where there is no video; filled in if empty.

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
    latents: Float16[np.ndarray, "t h w c"] | None = None
    text_embedding: Float16[np.ndarray, "l c"] | None = None
    content_hash: str = ""

    def __post_init__(self) -> None:
        name = f"record {self.source_id!r}"
        if min(self.height, self.width, self.frames) < 1 or not 0 < self.fps < float("inf"):
            raise RecordError(
                f"{name} has size {self.width}x{self.height}, {self.frames} frames, {self.fps} fps"
            )
        if not self.video and self.latents is None:
            raise RecordError(f"{name} has neither video nor latents")
        if self.tracks.num_frames != self.frames:
            raise RecordError(
                f"{name} has tracks of {self.tracks.num_frames} frames, video of {self.frames}"
            )
        if self.flow is not None and (
            self.flow.ndim != 4 or self.flow.shape[::3] != (self.frames, 2) or 0 in self.flow.shape
        ):
            raise RecordError(f"{name} has flow of shape {self.flow.shape}, not [t h w 2]")
        latents, text = self.latents, self.text_embedding
        if latents is not None and (
            latents.ndim != 4 or len(latents) != self.frames or 0 in latents.shape
        ):
            raise RecordError(f"{name} has latents of shape {latents.shape}, not [t h w c]")
        if text is not None and (text.ndim != 2 or 0 in text.shape):
            raise RecordError(f"{name} has a text embedding of shape {text.shape}, not [l c]")
        content = self.video or latents.astype("<f2").tobytes()
        content_hash = hashlib.sha256(content).hexdigest()
        if self.content_hash not in ("", content_hash):
            raise RecordError(f"{name} is damaged: its content does not have its content hash")
        object.__setattr__(self, "content_hash", content_hash)


@functools.cache
def record_features() -> tfds.features.FeaturesDict:
    """What TFDS calls the features of a record.

    A tensor may have one unknown dimension, so that arrays are kept flat: [k t 2] as [k t, 2] with
    t from `frames`, others beside their shape. Absent arrays are empty. Times are kept as bytes,
    since a tf.train.Example rounds numbers to float32.
    """
    # Half a second, which programs that neither write nor read records need not wait for.
    import tensorflow_datasets as tfds

    def array(*shape: int | None, dtype: type, doc: str) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes", doc=doc)

    def number(doc: str) -> tfds.features.Scalar:
        return tfds.features.Scalar(dtype=np.int64, doc=doc)

    halves, integers = np.float16, np.int32
    return tfds.features.FeaturesDict(
        {
            "version": number("schema of the record"),
            "source_id": tfds.features.Text(doc="names the clip it was made from"),
            "caption": tfds.features.Text(doc="UTF-8"),
            "video": tfds.features.Text(doc="bytes of an mp4; empty if there are latents instead"),
            "fps": array(dtype=np.float64, doc="frames per second"),
            "height": number("of the picture in pixels"),
            "width": number("of the picture in pixels"),
            "frames": number("of the video, t"),
            "start": array(dtype=np.float64, doc="second of the source at which it begins"),
            "points": array(
                *(None, 2),
                dtype=halves,
                doc="[k t, 2]: tracks (x, y) as shares of the picture, from its middle",
            ),
            "state": array(
                None,
                dtype=np.uint8,
                doc="[k t]: 0 unspecified, 1 visible, 2 occluded, 3 outside",
            ),
            "flow": array(None, dtype=halves, doc="pixels of the picture per frame"),
            "flow_shape": array(4, dtype=integers, doc="t h w 2"),
            "latents": array(None, dtype=halves, doc="scaled, of the manifest's autoencoder"),
            "latents_shape": array(4, dtype=integers, doc="t h w c"),
            "text_embedding": array(None, dtype=halves, doc="of the manifest's text encoder"),
            "text_embedding_shape": array(2, dtype=integers, doc="l c"),
            "content_hash": tfds.features.Text(doc="SHA-256 of the video, else of the latents"),
        }
    )


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
        "points": points.astype("<f2").reshape(-1, 2),
        "state": record.tracks.state.reshape(-1),
        "content_hash": record.content_hash,
        **_flattened("flow", record.flow, 4),
        **_flattened("latents", record.latents, 4),
        **_flattened("text_embedding", record.text_embedding, 2),
    }
    example = _example_type().FromString(record_features().serialize_example(values))
    # A map's order is the library's choice, unless asked for: shards must be equal to the byte.
    return example.SerializeToString(deterministic=True)


def decode_record(data: bytes) -> Record:
    """The record in `data`.

    Reads the tf.train.Example itself, which takes 0.03 ms where TFDS takes 0.25.

    Raises:
      RecordError: it is damaged, of another version, or lacks something.
    """
    try:
        features = _example_type().FromString(data).features.feature
    except DecodeError as error:
        raise RecordError(f"a record of {len(data)} bytes is damaged: {error}") from error
    values = _Values(features)
    version = values.integer("version") if "version" in features else None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"a record has schema version {version}, this program reads {SCHEMA_VERSION}: "
            "prepare the clips again"
        )
    try:
        height, width, frames = (values.integer(name) for name in ("height", "width", "frames"))
        size = np.array([width, height], np.float64)
        points = values.array("points", "<f2").reshape(-1, frames, 2).astype(np.float64)
        return Record(
            source_id=values.data("source_id").decode(),
            caption=values.data("caption").decode(),
            video=values.data("video"),
            fps=float(values.array("fps", "<f8").item()),
            height=height,
            width=width,
            frames=frames,
            start=float(values.array("start", "<f8").item()),
            tracks=Tracks(
                points * size + (size - 1) / 2,
                values.array("state", np.uint8).reshape(-1, frames),
            ),
            flow=values.shaped("flow"),
            latents=values.shaped("latents"),
            text_embedding=values.shaped("text_embedding"),
            content_hash=values.data("content_hash").decode(),
        )
    except RecordError:
        raise
    except KeyError as error:
        raise RecordError(f"a record lacks {error}: prepare the clips again") from error
    except (TypeError, ValueError, IndexError) as error:
        raise RecordError(f"a record is damaged: {error}") from error


class ShardWriter:
    """Writes records to one ArrayRecord file, which appears under its name only when complete."""

    def __init__(self, path: Path) -> None:
        self.records = 0
        self._path = path
        # Machines that share a folder may have processes of one number.
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")

    def __enter__(self) -> ShardWriter:
        # Groups of one: a damaged chunk costs one record, and reading one decodes no other.
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
        return self

    def write(self, record: Record) -> None:
        """Appends a record."""
        self.write_encoded(encode_record(record))

    def write_encoded(self, data: bytes) -> None:
        """Appends what `encode_record` made."""
        self._writer.write(data)
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
        record_features()  # here rather than in each of the threads that decode
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


def shard_name(index: int, count: int) -> str:
    """The name of a shard's file, in TFDS's pattern."""
    return f"{DATASET}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


def tfds_metadata(shards: Sequence[Mapping[str, Any]], description: str) -> dict[str, str]:
    """The files by which TFDS reads a folder: name to text, to be put beside the shards.

    Args:
      shards: as the manifest lists them, all and in order, named by `shard_name`, with `records`
        and `bytes`.
      description: what the data set is.
    """
    import tensorflow_datasets as tfds

    # TFDS looks for the files that it describes; their names are all that it wants to know.
    with tempfile.TemporaryDirectory(prefix="nuwa_jax_") as folder:
        for shard in shards:
            Path(folder, shard["name"]).touch()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=DATASET, split=SPLIT, filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[shard["records"] for shard in shards],
            num_bytes=sum(shard["bytes"] for shard in shards),
            filename_template=template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=record_features(),
            split_infos=[split],
            version=f"{SCHEMA_VERSION}.0.0",
            description=description,
            check_data=False,  # the check needs TensorFlow
        )
        written = Path(folder).glob("*.json")
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(written)}


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _example_type() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


class _Values:
    """The features of a tf.train.Example by name; a KeyError names the one that is missing."""

    def __init__(self, features: Mapping[str, Any]) -> None:
        self._features = features

    def _feature(self, name: str) -> Any:
        if name not in self._features:  # indexing a protobuf map adds what it does not find
            raise KeyError(name)
        return self._features[name]

    def integer(self, name: str) -> int:
        return self._feature(name).int64_list.value[0]

    def data(self, name: str) -> bytes:
        return self._feature(name).bytes_list.value[0]

    def array(self, name: str, dtype: str | type) -> np.ndarray:
        return np.frombuffer(self.data(name), dtype)

    def shaped(self, name: str) -> Float16[np.ndarray, "..."] | None:
        shape = self.array(f"{name}_shape", "<i4")
        return self.array(name, "<f2").reshape(shape) if shape.any() else None


def _flattened(name: str, array: np.ndarray | None, rank: int) -> dict[str, np.ndarray]:
    values = np.zeros(0, "<f2") if array is None else array.astype("<f2").reshape(-1)
    shape = (0,) * rank if array is None else array.shape
    return {name: values, f"{name}_shape": np.array(shape, np.int32)}


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
