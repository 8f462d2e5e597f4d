import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nuwa_jax.data.prepare import ClipOptions
from nuwa_jax.data.records import RecordReader
from nuwa_jax.data.scenes import SceneConfig, render_scene
from nuwa_jax.data.shards import clip_pool, write_shard
from nuwa_jax.data.sources import CSV_LAYOUTS
from nuwa_jax.data.video import read_video, resize_video, write_video
from nuwa_jax.data.webvid import REJECTS, make_job, prepare, start
from nuwa_jax.errors import UserError
from nuwa_jax.motion.tracks import inside

COLUMNS = CSV_LAYOUTS["webvid"].columns
CLIPS = Path(__file__).resolve().parents[2] / ".." / "shared" / "clips"
OPTIONS = ClipOptions(height=48, width=64, frames=9, min_frames=6, max_tracks=64)


def moving_scene(seed, frames=27, height=120, width=160):
    config = SceneConfig(
        height=height,
        width=width,
        frames=frames,
        displacement=(0.4, 0.6),
        diameter=(0.4, 0.6),
        still_probability=0.0,
        pan_probability=1.0,
    )
    return render_scene(seed, config).video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips good and bad, and a csv that finds them in three ways."""
    root = tmp_path_factory.mktemp("clips")
    moving = moving_scene(1)
    write_video(root / "good.mp4", moving, 24)
    write_video(root / "page" / "000001.mp4", moving_scene(2), 24)
    write_video(root / "000002.mp4", moving_scene(3, frames=60), 24)
    write_video(root / "short.mp4", moving[:12], 24)
    write_video(root / "static.mp4", np.repeat(moving[:1], 27, axis=0), 24)
    brightness = np.linspace(100, 110, len(moving)).astype(np.uint8)
    flat = np.zeros_like(moving) + brightness[:, None, None, None]
    write_video(root / "flat.mp4", flat, 24)
    halves = [moving[:13], 255 - moving[13:]]
    write_video(root / "cut.mp4", np.concatenate(halves), 24)
    data = (root / "good.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(data[: len(data) // 2])
    (root / "empty.mp4").write_bytes(b"")
    (root / "notes.txt").write_text("not a video")
    rows = [
        ("000000", "good.mp4", "page", "a good clip, with a comma"),
        ("000001", "https://example.com/x.mp4", "page", "by page_dir"),
        ("000002", "", "elsewhere", "by videoid"),
        ("000003", "short.mp4", "page", "short"),
        ("000004", "static.mp4", "page", "static"),
        ("000005", "flat.mp4", "page", "flat"),
        ("000006", "cut.mp4", "page", "cut"),
        ("000007", "truncated.mp4", "page", "truncated"),
        ("000008", "empty.mp4", "page", "empty"),
        ("000009", "missing.mp4", "page", "missing"),
        ("000010", "../clips.mp4", "page", "beyond the root"),
        ("000000", "good.mp4", "page", "the same again"),
        ("", "good.mp4", "page", "no id"),
    ]
    write_csv(root / "webvid.csv", rows)
    return root


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for videoid, url, page, name in rows:
            writer.writerow([videoid, url, "PT00H00M02S", page, name])


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    return out, prepare(make_job(folder / "webvid.csv", folder, out, OPTIONS))


def read_rejects(out):
    lines = (out / REJECTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_every_input_ends_in_records_or_in_rejects_with_its_reason(prepared):
    out, counts = prepared
    reader = RecordReader(out)
    accepted = [reader.read(i).source_id for i in range(len(reader))]
    assert accepted == ["page__000000", "page__000001", "elsewhere__000002"]
    reasons = [(reject["id"], reject["reason"]) for reject in read_rejects(out)]
    assert reasons == [
        ("page__000003", "too_short"),
        ("page__000004", "static"),
        ("page__000005", "no_texture"),
        ("page__000006", "cut"),
        ("page__000007", "undecodable"),
        ("page__000008", "undecodable"),
        ("page__000009", "missing"),
        ("page__000010", "missing"),
        ("page__000000", "repeated"),
        ("row 14", "bad_row"),
    ]
    assert counts["inputs"] == 13 and counts["records"] == 3 and counts["rejects"] == 10
    manifest = json.loads((out / "manifest.json").read_text())
    of_this_run = {"clips", "bytes", "seconds_by_stage"}
    assert {key: manifest[key] for key in counts.keys() - of_this_run} == {
        key: counts[key] for key in counts.keys() - of_this_run
    }
    assert manifest["tracker"] and manifest["versions"]["numpy"] and manifest["encoders"] == {}
    assert counts["clips"] == 9 and counts["bytes"] == manifest["shards"][0]["bytes"]
    assert {"decode", "resize", "filter", "track", "encode"} <= counts["seconds_by_stage"].keys()
    paths = {reject["id"]: reject["path"] for reject in read_rejects(out)}
    assert paths["page__000006"] == "cut.mp4" and paths["page__000009"] == "missing.mp4"


def test_records_hold_the_clip_its_caption_and_its_tracks(folder, prepared):
    record = RecordReader(prepared[0]).read(0)
    assert record.caption == "a good clip, with a comma"
    assert (record.height, record.width, record.frames, record.fps) == (48, 64, 9, 8.0)
    video, fps = read_video(record.video)
    assert video.shape == (9, 48, 64, 3) and fps == 8.0
    # Every third frame of the source from `start` on, averaged down.
    source, _ = read_video(folder / "good.mp4", start=record.start, stride=3, max_frames=9)
    expected, _ = resize_video(source, 48, 64)
    assert np.abs(video.astype(float) - expected).mean() < 5
    assert record.tracks.num_frames == 9 and record.tracks.num_tracks >= OPTIONS.min_tracks
    visible = record.tracks.visible
    assert visible[:, 0].all()
    assert inside(record.tracks.points[visible], 48, 64).all()


def test_tracks_follow_the_picture(prepared):
    # Where a track goes, the brightness of its first frame goes along.
    record = RecordReader(prepared[0]).read(0)
    video, _ = read_video(record.video)
    grey = video.mean(axis=-1)
    last = record.tracks.visible[:, -1]
    points = np.rint(record.tracks.points[last]).astype(int)
    points = points.clip(0, [63, 47])
    first, end = points[:, 0], points[:, -1]
    followed = np.abs(grey[-1, end[:, 1], end[:, 0]] - grey[0, first[:, 1], first[:, 0]])
    stayed = np.abs(grey[-1, first[:, 1], first[:, 0]] - grey[0, first[:, 1], first[:, 0]])
    assert np.median(followed) < 0.6 * np.median(stayed)


def test_several_windows_of_a_clip_do_not_overlap(folder, tmp_path):
    write_csv(tmp_path / "one.csv", [("000002", "", "", "long")])
    options = ClipOptions(**{**vars(OPTIONS), "windows": 3, "frames": 6, "flow_divisor": 2})
    counts = prepare(make_job(tmp_path / "one.csv", folder, tmp_path / "out", options))
    reader = RecordReader(tmp_path / "out")
    starts = [reader.read(i).start for i in range(len(reader))]
    assert counts["inputs"] == counts["accepted"] == 1 and counts["records"] == len(starts) == 3
    assert np.diff(starts).min() >= (5 * 3 + 1) / 24 - 1e-9
    flow = reader.read(0).flow
    assert flow.shape == (6, 24, 32, 2) and not flow[0].any() and np.abs(flow[1:]).max() > 0.3


def test_folder_without_csv_takes_captions_from_file_names(tmp_path):
    root = tmp_path / "root"
    write_video(root / "deep" / "red_ball-rolls.mp4", moving_scene(1), 24)
    (root / ".hidden.mp4").write_bytes(b"x")
    (root / "readme.txt").write_text("x")
    counts = prepare(make_job(None, root, tmp_path / "out", OPTIONS))
    assert (counts["inputs"], counts["records"]) == (1, 1)
    record = RecordReader(tmp_path / "out").read(0)
    assert record.caption == "red ball rolls"
    assert record.source_id == "deep/red_ball-rolls.mp4"


def test_shards_hold_the_same_records_however_many_there_are(folder, prepared, tmp_path):
    one = RecordReader(prepared[0])
    counts = prepare(make_job(folder / "webvid.csv", folder, tmp_path, OPTIONS, num_shards=3))
    three = RecordReader(tmp_path)
    for key in ("inputs", "accepted", "records", "rejects", "reasons"):
        assert counts[key] == prepared[1][key]
    assert read_rejects(tmp_path) == read_rejects(prepared[0])

    def contents(reader):
        records = [reader.read(i) for i in range(len(reader))]
        return {(record.source_id, record.content_hash) for record in records}

    assert contents(one) == contents(three)


def test_finished_shard_is_kept_and_an_unfinished_one_is_made_again(folder, tmp_path):
    write_csv(
        tmp_path / "two.csv", [("000000", "good.mp4", "", "x"), ("000003", "short.mp4", "", "")]
    )
    job = make_job(tmp_path / "two.csv", folder, tmp_path / "out", OPTIONS)
    start(job)
    with clip_pool(job, 1, 60) as pool:
        first = write_shard(job, 0, pool)
        shard = tmp_path / "out" / "parts" / first["name"]
        written = shard.stat().st_mtime_ns
        data = shard.read_bytes()
        assert write_shard(job, 0, pool) == first
        assert shard.stat().st_mtime_ns == written
        shard.write_bytes(data[:1000])
        assert write_shard(job, 0, pool) == first
        assert shard.read_bytes() == data
        # Another file under the same name is another input.
        write_video(tmp_path / "new.mp4", moving_scene(4), 24)
        kept = (folder / "good.mp4").read_bytes()
        try:
            (folder / "good.mp4").write_bytes((tmp_path / "new.mp4").read_bytes())
            assert write_shard(job, 0, pool)["sha256"] != first["sha256"]
        finally:
            (folder / "good.mp4").write_bytes(kept)


def test_records_of_other_options_are_not_mixed(folder, tmp_path):
    write_csv(tmp_path / "one.csv", [("000000", "good.mp4", "", "good")])
    out = tmp_path / "out"
    prepare(make_job(tmp_path / "one.csv", folder, out, OPTIONS))
    prepare(make_job(tmp_path / "one.csv", folder, out, OPTIONS))
    other = ClipOptions(**{**vars(OPTIONS), "height": 32})
    with pytest.raises(UserError, match="--overwrite"):
        prepare(make_job(tmp_path / "one.csv", folder, out, other))
    with pytest.raises(UserError, match="--overwrite"):
        prepare(make_job(tmp_path / "one.csv", folder, out, OPTIONS, num_shards=2))
    assert RecordReader(out).read(0).height == 48
    prepare(make_job(tmp_path / "one.csv", folder, out, other), overwrite=True)
    assert RecordReader(out).read(0).height == 32
    prepare(make_job(tmp_path / "one.csv", folder, out, other, num_shards=2), overwrite=True)
    assert sorted(path.name for path in (out / "plan").iterdir()) == [
        "inputs-00000-of-00002.jsonl",
        "inputs-00001-of-00002.jsonl",
        "plan.json",
    ]
    assert len(list(out.glob("clips-*"))) == 2
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(UserError, match="not of prepared clips"):
        prepare(make_job(tmp_path / "one.csv", folder, tmp_path, OPTIONS), overwrite=True)


def test_unusable_input_is_one_line(folder, tmp_path):
    def check(message, csv_path=folder / "webvid.csv", root=folder, **options):
        with pytest.raises(UserError, match=message) as error:
            prepare(
                make_job(
                    csv_path, root, tmp_path / "out", ClipOptions(**{**vars(OPTIONS), **options})
                )
            )
        assert "\n" not in str(error.value)

    bad = tmp_path / "bad.csv"
    bad.write_text("videoid,name\n1,x\n")
    check("lacks the column contentUrl, duration, page_dir", csv_path=bad)
    bad.write_text(",".join(COLUMNS) + "\n")
    check("no rows", csv_path=bad)
    bad.write_text("")
    check("lacks the column", csv_path=bad)
    bad.write_bytes(b"\xff\xfe\x00bad")
    check("cannot be read", csv_path=bad)
    check("cannot be read", csv_path=tmp_path / "nowhere.csv")
    check("not a folder", root=tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    check("no video files", csv_path=None, root=tmp_path / "hollow")
    check("--min_frames", min_frames=20)
    check("--height", height=0)
    write_csv(bad, [("000003", "short.mp4", "", ""), ("000009", "missing.mp4", "", "")])
    check("all 2 inputs were rejected", csv_path=bad)
    assert len(read_rejects(tmp_path / "out")) == 2
    assert not (tmp_path / "out" / "manifest.json").exists()


def run(*arguments):
    command = [sys.executable, "-m", "nuwa_jax.data.webvid", *arguments]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


def test_command_line_ends_with_one_json_line(folder, tmp_path):
    arguments = [f"--csv={folder / 'webvid.csv'}", f"--root={folder}", f"--out={tmp_path}"]
    done = run(*arguments, "--height=48", "--width=64", "--frames=9", "--min_frames=6")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["inputs"], counts["records"], counts["rejects"]) == (13, 3, 10)


def test_command_line_errors_are_one_line_and_exit_code_2(folder, tmp_path):
    (tmp_path / "bad.csv").write_text("videoid,name\n1,x\n")
    done = run(f"--csv={tmp_path / 'bad.csv'}", f"--root={folder}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "contentUrl" in done.stderr
    for flag in ("--workers=-1", "--clip_timeout=0", "--clip_timeout=nan", "--csv=foo://x"):
        done = run(f"--root={folder}", f"--out={tmp_path / 'out'}", flag)
        assert done.returncode == 2 and flag.partition("=")[0] in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = run(f"--root={folder}")
    assert done.returncode == 2 and "--out is needed" in done.stderr


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no folder of real clips at {CLIPS}")
def test_real_clips_become_records(tmp_path):
    with (CLIPS / "webvid.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:4]
    chosen = [(row["videoid"], row["contentUrl"], row["page_dir"], row["name"]) for row in rows]
    write_csv(tmp_path / "some.csv", chosen)
    options = ClipOptions(height=64, width=64, frames=8, min_frames=8)
    counts = prepare(make_job(tmp_path / "some.csv", CLIPS, tmp_path / "out", options))
    assert counts["inputs"] == 4 and counts["records"] >= 2
    record = RecordReader(tmp_path / "out").read(0)
    assert read_video(record.video)[0].shape == (8, 64, 64, 3)
    assert record.caption == rows[0]["name"]
