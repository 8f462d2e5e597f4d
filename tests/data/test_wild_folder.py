"""What the world holds besides good clips: all of it is accounted for, none of it ends a run."""

import dataclasses
import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from moving_clips import OPTIONS, moving_scene

from nuwa_jax.data.prepare import RecordMaker, Stopwatch
from nuwa_jax.data.records import RecordReader
from nuwa_jax.data.shards import clip_pool
from nuwa_jax.data.sources import Input, Place
from nuwa_jax.data.video import read_video, write_video
from nuwa_jax.data.webvid import REJECTS, Limits, make_job, prepare
from nuwa_jax.estimation import load_estimators


def write_raw(path, video, rates=None, fps=24, suffix_format="mp4", rotate=0):
    """A file with time stamps of its own, as `write_video` makes none."""
    with av.open(str(path), "w", format=suffix_format) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.time_base = Fraction(1, 1000)
        clock = 0
        for index, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = clock, Fraction(1, 1000)
            clock += 1000 // fps if rates is None else rates[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rotated(data):
    """The bytes of an mp4 whose track header says to turn the picture by 90 degrees."""
    upright = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    place = data.index(upright, data.index(b"tkhd"))
    return data[:place] + turned + data[place + len(turned) :]


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    root = tmp_path_factory.mktemp("wild")
    moving = moving_scene(0)
    write_video(root / "good.mp4", moving, 24)
    data = (root / "good.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(data[: 2 * len(data) // 3])
    (root / "zero_bytes.mp4").write_bytes(b"")
    (root / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (root / "text.avi").write_text("this is not a video\n" * 50)
    (root / "flipped.mp4").write_bytes(
        data[:3000] + bytes(byte ^ 0x5A for byte in data[3000:3400]) + data[3400:]
    )
    with av.open(str(root / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_raw(root / "variable.mp4", moving_scene(1), [10, 120, 30] * 7)
    write_video(root / "upright.mp4", moving_scene(2), 24)
    (root / "turned.mp4").write_bytes(rotated((root / "upright.mp4").read_bytes()))
    (root / "upright.mp4").unlink()
    write_video(root / "one_frame.mp4", moving[:1], 24)
    # 8K: one picture that moves under a window, and few frames.
    large = np.tile(moving_scene(3)[0], (47, 61, 1))[: 4320 + 96, : 7680 + 96]
    frames = [large[8 * t : 4320 + 8 * t, 8 * t : 7680 + 8 * t] for t in range(6)]
    write_large(root / "large.mp4", frames)
    write_video(root / "tiny.mp4", moving[:, :16, :16], 24)
    (root / "folder.mp4").mkdir()
    return root


def write_large(path, frames):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_everything_in_a_wild_folder_is_accounted_for(wild, tmp_path):
    counts = prepare(make_job(None, wild, tmp_path, OPTIONS, num_shards=2), limits=Limits(1.0, 0.0))
    lines = [json.loads(line) for line in (tmp_path / REJECTS).read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    reader = RecordReader(tmp_path)
    accepted = {reader.read(i).source_id for i in range(len(reader))}
    files = {path.name for path in wild.iterdir() if path.is_file()}
    assert accepted | reasons.keys() == files and not accepted & reasons.keys()
    assert counts["inputs"] == len(files) == 12
    assert {"good.mp4", "turned.mp4"} <= accepted
    assert reasons.pop("variable.mp4") == "variable_rate"
    assert reasons.pop("one_frame.mp4") == "too_short"
    assert reasons.pop("tiny.mp4") == "too_small"
    unreadable = ("truncated.mp4", "zero_bytes.mp4", "noise.mp4", "text.avi", "audio.mp4")
    assert all(reasons.pop(name) == "undecodable" for name in unreadable)
    # Damage within the pictures may or may not be noticed by the decoder; a size may be too much.
    assert set(reasons) <= {"flipped.mp4", "large.mp4"}
    assert not {"crashed", "timeout"} & set(reasons.values())


def test_turned_picture_is_shown_upright(wild):
    tracker, flow = load_estimators()
    options = dataclasses.replace(OPTIONS, height=64, width=48)
    made = RecordMaker(options, tracker, flow).make(wild / "turned.mp4", "a", "", Stopwatch())
    pictures, _ = read_video(made[0].record.video)
    assert pictures.shape[1:3] == (64, 48)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_pictures_are_not_all_in_memory(wild):
    with clip_pool(make_job(None, wild, wild, OPTIONS), 1, 120) as pool:
        ((_, result),) = pool.map([Input("large", "", (Place("large.mp4"),))])
        process = pool._processes[0]._process
        status = Path(f"/proc/{process.pid}/status").read_text()
    assert result.get("reason") != "undecodable"
    # Six decoded frames are 0.6 GB, beside what the decoder holds.
    assert int(status.split("VmHWM:")[1].split()[0]) < 600 << 10
