import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from nuwa_jax.data.records import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    Record,
    RecordError,
    RecordReader,
    ShardWriter,
    decode_record,
    encode_record,
    hash_file,
    record_features,
    shard_name,
    tfds_metadata,
)
from nuwa_jax.motion.tracks import Tracks, TrackState


def make_record(
    index=0, frames=5, height=30, width=50, flow=True, size=200, latents=False, text=False
):
    rng = np.random.default_rng(index)
    points = rng.uniform([-5, -5], [width + 5, height + 5], (7, frames, 2))
    tracks = Tracks(points, rng.integers(0, 4, (7, frames)))
    dense = rng.normal(size=(frames, 6, 10, 2)).astype(np.float16) if flow else None
    return Record(
        source_id=f"clip{index}",
        caption="a red ball, ünïcode",
        video=rng.bytes(size),
        fps=7.5,
        height=height,
        width=width,
        frames=frames,
        start=1.25,
        tracks=tracks,
        flow=dense,
        latents=rng.normal(size=(frames, 4, 7, 3)).astype(np.float16) if latents else None,
        text_embedding=rng.normal(size=(6, 8)).astype(np.float16) if text else None,
    )


ARRAYS = ("flow", "latents", "text_embedding")


def assert_equal(decoded, record):
    for field in dataclasses.fields(Record):
        if field.name not in ("tracks", *ARRAYS):
            assert getattr(decoded, field.name) == getattr(record, field.name)
    np.testing.assert_array_equal(decoded.tracks.state, record.tracks.state)
    np.testing.assert_allclose(decoded.tracks.points, record.tracks.points, atol=50 / 4000)
    for name in ARRAYS:
        if getattr(record, name) is None:
            assert getattr(decoded, name) is None
        else:
            np.testing.assert_array_equal(getattr(decoded, name), getattr(record, name))
            assert getattr(decoded, name).dtype == np.float16


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("latents,text", [(False, False), (True, False), (False, True)])
def test_record_survives_encoding(flow, latents, text):
    record = make_record(flow=flow, latents=latents, text=text)
    assert_equal(decode_record(encode_record(record)), record)


def test_record_of_latents_needs_no_video():
    record = make_record(size=0, latents=True)
    data = encode_record(record)
    assert_equal(decode_record(data), record)
    flipped = bytearray(data)
    flipped[data.index(record.latents.tobytes()) + 10] ^= 1
    with pytest.raises(RecordError, match="content hash"):
        decode_record(bytes(flipped))


def test_times_are_exact():
    record = dataclasses.replace(make_record(), fps=30000 / 1001, start=1 / 3)
    decoded = decode_record(encode_record(record))
    assert (decoded.fps, decoded.start) == (record.fps, record.start)


def test_tfds_and_this_program_read_the_same(tmp_path):
    records = [
        make_record(0, latents=True, text=True),
        make_record(1, flow=False),
        make_record(2, frames=7, flow=False),
    ]
    counts, shards, left = (2, 0, 1), [], list(records)
    for index, count in enumerate(counts):
        path = tmp_path / shard_name(index, len(counts))
        with ShardWriter(path) as writer:
            for _ in range(count):
                writer.write(left.pop(0))
        shards.append({"name": path.name, "records": count, "bytes": path.stat().st_size})
    for name, text in tfds_metadata(shards, "clips for a test").items():
        (tmp_path / name).write_text(text)

    builder = tfds.builder_from_directory(tmp_path)
    source = builder.as_data_source("train")
    assert len(source) == builder.info.splits["train"].num_examples == 3
    for read, record in zip(source, records, strict=True):
        decoded = decode_record(encode_record(record))
        for name in ("source_id", "caption", "content_hash"):
            assert read[name].decode() == getattr(decoded, name)
        for name in ("video", "fps", "height", "width", "frames", "start"):
            assert read[name] == getattr(decoded, name)
        size = np.array([record.width, record.height])
        points = read["points"].reshape(-1, record.frames, 2).astype(np.float64)
        points = points * size + (size - 1) / 2
        state = read["state"].reshape(-1, record.frames)
        known = state != TrackState.UNSPECIFIED  # elsewhere, points have no meaning
        np.testing.assert_array_equal(points[known], decoded.tracks.points[known])
        np.testing.assert_array_equal(state, decoded.tracks.state)
        for name in ARRAYS:
            shape = read[f"{name}_shape"]
            if getattr(decoded, name) is None:
                assert not shape.any() and read[name].size == 0
            else:
                np.testing.assert_array_equal(read[name].reshape(shape), getattr(decoded, name))
    assert not {"tensorflow", "jax"} & modules_of_reading(tmp_path)


def modules_of_reading(folder):
    """The frameworks that a process which reads a folder, by us and by TFDS, has imported."""
    program = (
        "import sys, pathlib, tensorflow_datasets as tfds\n"
        "from nuwa_jax.data.records import decode_record, record_features\n"
        f"source = tfds.builder_from_directory({str(folder)!r}).as_data_source('train')\n"
        "assert source[0]['frames'] == 5\n"
        "print(*sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
    )
    return set(done.stdout.split())


def test_points_in_a_large_picture_keep_their_precision():
    record = make_record(height=720, width=1280)
    inside = (record.tracks.points > 0).all(-1) & (record.tracks.points < [1280, 720]).all(-1)
    error = decode_record(encode_record(record)).tracks.points - record.tracks.points
    assert np.abs(error[inside]).max() < 1280 / 8000


def test_damaged_records_are_errors_not_arrays():
    data = encode_record(make_record())
    for cut in (0, 1, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(RecordError):
            decode_record(data[:cut])
    with pytest.raises(RecordError):
        decode_record(data + b"\x00")
    flipped = bytearray(data)
    flipped[data.index(make_record().video) + 100] ^= 1
    with pytest.raises(RecordError, match="content hash"):
        decode_record(bytes(flipped))
    rng = np.random.default_rng(0)
    for _ in range(50):
        with pytest.raises(RecordError):
            decode_record(rng.bytes(100))


def test_contradictory_records_are_errors():
    values = record_features().deserialize_example_np(encode_record(make_record()))

    def check(message, drop=(), **changes):
        example = tf_example_pb2.Example.FromString(
            record_features().serialize_example({**values, **changes})
        )
        for name in drop:
            del example.features.feature[name]
        with pytest.raises(RecordError, match=message):
            decode_record(example.SerializeToString())

    check("version 99", version=99)
    check("version None", drop=["version"])
    check("lacks 'caption'", drop=["caption"])
    check("damaged", frames=6)
    check("damaged", frames=0)
    check("0x30", width=0)
    check("fps", fps=np.float64(np.inf))
    check("neither video nor latents", video=b"")
    check("damaged", state=np.full(35, 9, np.uint8))
    check("damaged", state=np.zeros(34, np.uint8))
    check("damaged", flow_shape=np.array([5, 6, 10, 3], np.int32))
    # Like a feature of another type than the one that is written.
    example = tf_example_pb2.Example.FromString(encode_record(make_record()))
    example.features.feature["width"].bytes_list.value.append(b"wide")
    with pytest.raises(RecordError, match="damaged"):
        decode_record(example.SerializeToString())


def test_contradictory_arrays_are_errors():
    latents = np.zeros((4, 6, 10, 3), np.float16)
    with pytest.raises(RecordError, match="latents of shape"):
        dataclasses.replace(make_record(), latents=latents)
    with pytest.raises(RecordError, match="text embedding of shape"):
        dataclasses.replace(make_record(), text_embedding=np.zeros((3, 0), np.float16))
    with pytest.raises(RecordError, match="tracks of 5 frames"):
        dataclasses.replace(make_record(flow=False), frames=6)


def make_folder(folder, counts=(3, 2), size=200):
    shards, index = [], 0
    for number, count in enumerate(counts):
        path = folder / f"clips-{number}.array_record"
        with ShardWriter(path) as writer:
            for _ in range(count):
                writer.write(make_record(index, size=size))
                index += 1
        length, digest = path.stat().st_size, hash_file(path)
        shards.append({"name": path.name, "records": count, "bytes": length, "sha256": digest})
    manifest = {"format": FORMAT, "version": SCHEMA_VERSION, "shards": shards}
    manifest |= {"records": sum(counts), "min_frames": 5}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return manifest


def test_reader_finds_every_record_of_every_shard(tmp_path):
    make_folder(tmp_path, (3, 0, 2))
    reader = RecordReader(tmp_path)
    assert len(reader) == 5 and reader.frames == 5
    assert [reader.read(i).source_id for i in (4, 0, 3)] == ["clip4", "clip0", "clip3"]


def test_fingerprint_changes_with_the_records(tmp_path):
    prints = []
    for name, counts in (("a", (3, 2)), ("b", (3, 2)), ("c", (3, 3))):
        (tmp_path / name).mkdir()
        make_folder(tmp_path / name, counts)
        prints.append(RecordReader(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_folder_that_is_not_what_its_manifest_says_is_refused(tmp_path):
    with pytest.raises(RecordError, match="webvid"):
        RecordReader(tmp_path)
    manifest = make_folder(tmp_path)
    shard = tmp_path / manifest["shards"][1]["name"]
    data = shard.read_bytes()

    shard.write_bytes(data[:-70000])
    with pytest.raises(RecordError, match="bytes"):
        RecordReader(tmp_path)
    shard.unlink()
    with pytest.raises(RecordError, match="0 bytes"):
        RecordReader(tmp_path)
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(RecordError):
        RecordReader(tmp_path)
    shard.write_bytes(data)
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "records": 9}))
    with pytest.raises(RecordError, match="says 9"):
        RecordReader(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(RecordError, match="version 0"):
        RecordReader(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(RecordError, match="not JSON"):
        RecordReader(tmp_path)


def test_one_damaged_record_leaves_its_neighbours_readable(tmp_path):
    manifest = make_folder(tmp_path, (4,), size=20000)
    shard = tmp_path / manifest["shards"][0]["name"]
    data = bytearray(shard.read_bytes())
    place = 50000  # in the third record: all are a little over 20000 bytes, one after the other
    data[place : place + 64] = bytes(64)
    shard.write_bytes(data)
    reader = RecordReader(tmp_path)
    with pytest.raises(RecordError, match="damaged"):
        reader.read(2)
    assert [reader.read(i).source_id for i in (1, 3)] == ["clip1", "clip3"]


def test_interrupted_shard_does_not_appear(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.array_record") as writer:
        writer.write(make_record())
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
