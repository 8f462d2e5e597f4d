import dataclasses
import json

import msgpack
import numpy as np
import pytest

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
)
from nuwa_jax.motion.tracks import Tracks


def make_record(index=0, frames=5, height=30, width=50, flow=True, size=200):
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
    )


@pytest.mark.parametrize("flow", [True, False])
def test_record_survives_encoding(flow):
    record = make_record(flow=flow)
    decoded = decode_record(encode_record(record))
    for field in dataclasses.fields(Record):
        if field.name not in ("tracks", "flow"):
            assert getattr(decoded, field.name) == getattr(record, field.name)
    np.testing.assert_array_equal(decoded.tracks.state, record.tracks.state)
    np.testing.assert_allclose(decoded.tracks.points, record.tracks.points, atol=50 / 4000)
    if flow:
        np.testing.assert_array_equal(decoded.flow, record.flow)
    else:
        assert decoded.flow is None


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
    values = msgpack.unpackb(encode_record(make_record()))

    def check(message, **changes):
        changed = {**values, **changes}
        changed = {key: value for key, value in changed.items() if value != "drop"}
        with pytest.raises(RecordError, match=message):
            decode_record(msgpack.packb(changed))

    check("version 99", version=99)
    check("lacks 'caption'", caption="drop")
    check("tracks of 5 frames", frames=6)
    check("0x30", width=0)
    check("fps", fps=float("inf"))
    check("damaged", width="wide")
    check("no video", video=b"")
    check("type '<f8'", points={**values["points"], "dtype": "<f8"})
    check("damaged", points={**values["points"], "shape": [7, 5, 3]})
    check("damaged", state={**values["state"], "data": b"\x09" * 35})


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
