"""The unit of work: the same bytes whoever calls it, whatever happened before."""

import dataclasses
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from moving_clips import OPTIONS, moving_scene

from nuwa_jax.data import webvid
from nuwa_jax.data.isolation import IsolatedPool
from nuwa_jax.data.prepare import RecordMaker, Stopwatch
from nuwa_jax.data.records import RecordReader
from nuwa_jax.data.runners import BeamRunner, LocalRunner
from nuwa_jax.data.sealing import seal_shard
from nuwa_jax.data.shards import clip_pool, make_clip, planned_inputs, write_shard
from nuwa_jax.data.sources import Input, Place
from nuwa_jax.data.storage import Folder
from nuwa_jax.data.video import read_video, resize_video, write_video
from nuwa_jax.data.webvid import REJECTS, Limits, finish, make_job, prepare, start
from nuwa_jax.errors import UserError
from nuwa_jax.estimation import load_estimators

sys.path.insert(0, str(Path(__file__).parent))  # workers import what is on the parent's path
import faulty  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--height=48", "--width=64", "--frames=7", "--min_frames=5", "--max_tracks=48"]
FLAGS += ["--min_motion=0.01"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Clips, two of them a near copy of another, and one that is short."""
    root = tmp_path_factory.mktemp("corpus")
    for seed in range(5):
        write_video(root / f"scene{seed}.mp4", moving_scene(seed), 24)
    write_video(root / "again.mp4", moving_scene(3), 24, crf=28)
    write_video(root / "zz.mp4", moving_scene(1), 24, crf=28)
    write_video(root / "short.mp4", moving_scene(7)[:9], 24)
    return root


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    return out, prepare(make_job(None, corpus, out, OPTIONS, num_shards=3))


def contents(out):
    """Bytes of everything that must not depend on how it was made."""
    names = ["manifest.json", REJECTS, "dataset_info.json", "features.json"]
    names += sorted(path.name for path in out.glob("clips-*"))
    assert len(names) == 7
    return {name: (out / name).read_bytes() for name in names}


def run(*arguments):
    command = [sys.executable, "-m", "nuwa_jax.data.webvid", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_near_duplicates_leave_one_record_the_first_in_the_list(reference):
    out, counts = reference
    assert counts["inputs"] == 8 and counts["records"] == 5
    assert counts["reasons"] == {"duplicate": 2, "too_short": 1}
    rejects = [json.loads(line) for line in (out / REJECTS).read_text().splitlines()]
    assert [reject["id"] for reject in rejects] == ["scene3.mp4", "short.mp4", "zz.mp4"]
    assert rejects[0]["detail"].endswith("from again.mp4")
    reader = RecordReader(out)
    kept = {reader.read(i).source_id for i in range(len(reader))}
    assert kept == {"again.mp4", "scene0.mp4", "scene1.mp4", "scene2.mp4", "scene4.mp4"}


def test_duplicates_are_the_same_in_any_number_of_shards(corpus, reference, tmp_path):
    counts = prepare(make_job(None, corpus, tmp_path, OPTIONS, num_shards=1))
    assert counts["reasons"] == reference[1]["reasons"]
    assert (tmp_path / REJECTS).read_bytes() == (reference[0] / REJECTS).read_bytes()


def test_duplicates_are_kept_if_asked_for(corpus, tmp_path):
    options = dataclasses.replace(OPTIONS, max_distance=-1)
    assert prepare(make_job(None, corpus, tmp_path, options))["records"] == 7


def test_tfds_reads_the_folder(reference):
    source = tfds.builder_from_directory(reference[0]).as_data_source("train")
    reader = RecordReader(reference[0])
    assert [each["source_id"].decode() for each in source] == [
        reader.read(i).source_id for i in range(len(reader))
    ]
    assert source[0]["video"] == reader.read(0).video


def test_array_job_makes_the_same_bytes(corpus, reference, tmp_path):
    # Without --plan, in another order, and one of them twice.
    job = make_job(None, corpus, tmp_path, OPTIONS, num_shards=3)
    arguments = [f"--root={corpus}", f"--out={tmp_path}", "--num_shards=3", *FLAGS, "--workers=1"]
    done = run(*arguments, "--shard_index=2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["inputs"] == len(planned_inputs(job, 2))
    with pytest.raises(UserError, match="shard 0 of 3 is not there yet"):
        finish(job, LocalRunner(1))
    with clip_pool(job, 1, 60) as pool:
        for index in (2, 1, 0, 1):
            write_shard(job, index, pool)
    done = run(*arguments, "--finish")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["records"] == 5
    assert contents(tmp_path) == contents(reference[0])


def test_parts_of_other_options_or_versions_are_not_joined(corpus, reference, tmp_path):
    job = make_job(None, corpus, tmp_path, OPTIONS, num_shards=3)
    finer = dataclasses.replace(OPTIONS, crf=17)
    start(job)
    for index, options in enumerate((OPTIONS, finer, OPTIONS)):
        LocalRunner(1).write(dataclasses.replace(job, options=options), [index])
    with pytest.raises(UserError, match="shard 1 of 3 was made with other options"):
        finish(job, LocalRunner(1))
    with pytest.raises(UserError, match="shard 0 of 3 was made with other options"):
        finish(dataclasses.replace(job, options=finer), LocalRunner(1))
    LocalRunner(1).write(job, [1])
    with pytest.MonkeyPatch.context() as patch:
        versions = {**job.versions(), "av": "0.0"}
        patch.setattr(type(job), "versions", lambda self: versions)
        with pytest.raises(UserError, match="shard 0 of 3 was made with .* library versions"):
            finish(dataclasses.replace(job), LocalRunner(1))
    assert not (tmp_path / "manifest.json").exists()
    finish(job, LocalRunner(1))
    assert contents(tmp_path) == contents(reference[0])


def test_beam_makes_the_same_bytes(corpus, reference, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra: prepare")
    counts = prepare(make_job(None, corpus, tmp_path, OPTIONS, num_shards=3), runner=BeamRunner())
    assert counts["reasons"] == reference[1]["reasons"]
    ours, theirs = contents(tmp_path), contents(reference[0])
    assert ours == theirs


def test_buckets_get_the_same_bytes(corpus, reference, tmp_path):
    # fsspec's view of the disk stands in for a bucket: the same code, but for the driver.
    url = f"file://{tmp_path}/out"
    prepare(make_job(None, f"file://{corpus}", url, OPTIONS, num_shards=3), runner=LocalRunner(1))
    ours, theirs = contents(tmp_path / "out"), contents(reference[0])
    assert {name: data for name, data in ours.items() if name.startswith("clips-")} == {
        name: data for name, data in theirs.items() if name.startswith("clips-")
    }
    assert ours[REJECTS] == theirs[REJECTS]
    assert not list(tmp_path.rglob("*.tmp"))
    # Nothing is made again.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("clips-*")}
    prepare(make_job(None, f"file://{corpus}", url, OPTIONS, num_shards=3), runner=LocalRunner(1))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("clips-*")}


@pytest.mark.parametrize("when", ["first part", "sealed"])
def test_killed_run_goes_on_to_the_same_bytes(corpus, reference, tmp_path, when):
    arguments = [f"--root={corpus}", f"--out={tmp_path}", "--num_shards=3", *FLAGS, "--workers=1"]
    waited = {
        "first part": lambda: any((tmp_path / "parts").glob("*.tmp")),
        "sealed": lambda: any(tmp_path.glob("clips-*")),
    }[when]
    command = [sys.executable, "-m", "nuwa_jax.data.webvid", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not waited():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "manifest.json").exists()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(reference[0])
    assert not list(tmp_path.rglob("*.tmp"))


def test_seal_can_be_interrupted_between_its_steps(corpus, reference, tmp_path, monkeypatch):
    job = make_job(None, corpus, tmp_path, OPTIONS, num_shards=3)
    start(job)
    LocalRunner(1).write(job, range(3))
    removals = webvid.find_removals(job)
    assert sorted(len(each) for each in removals) != [0, 0, 0]

    class KilledError(BaseException):
        pass

    def killed(*arguments):
        raise KilledError

    for method in ("move", "remove"):
        for index, removed in enumerate(removals):
            with monkeypatch.context() as patch:
                patch.setattr(Folder, method, killed)
                try:
                    seal_shard(job, index, removed)
                except KilledError:
                    pass
    finish(job, LocalRunner(1))
    assert contents(tmp_path) == contents(reference[0])
    assert not list((tmp_path / "parts").glob("clips-*-of-00003"))


def test_crash_and_hang_cost_their_clips(corpus, tmp_path):
    job = make_job(None, corpus, tmp_path / "out", OPTIONS)
    start(job)
    plan = tmp_path / "out" / "plan" / "inputs-00000-of-00001.jsonl"
    lines = plan.read_text().splitlines()
    for line, name in ((1, "crash"), (3, "hang")):
        planned = Input.from_json(lines[line])
        lines[line] = dataclasses.replace(planned, id=name).to_json()
    plan.write_text("\n".join(lines) + "\n")
    setup = faulty.FaultyClips(job.root, job.options, job.estimator, job.estimator_weights)
    with IsolatedPool(setup, 2, 5) as pool:
        stats = write_shard(job, 0, pool)
    reasons = {reject["id"]: reject["reason"] for reject in stats["rejects"]}
    assert reasons["crash"] == "crashed" and reasons["hang"] == "timeout"
    assert len(stats["clips"]) == 5
    assert all(reject["path"] for reject in stats["rejects"])


def test_bug_is_counted_told_and_fails_the_run(corpus, tmp_path):
    tracker, flow = load_estimators()

    class Broken:
        name = "broken"

        def track(self, video, points):
            raise ZeroDivisionError("no points\nat all")

    made = make_clip(
        Input("a", "", (Place("scene0.mp4"),)),
        Folder(corpus),
        RecordMaker(OPTIONS, Broken(), flow),
    )
    assert made["reason"] == "bug:ZeroDivisionError" and "test_shards.py:" in made["detail"]
    rejects = [{"id": "a", "reason": made["reason"], "detail": made["detail"]}]
    with pytest.raises(UserError, match="fault of this program rejected 1 of 999"):
        webvid._check_limits(999, rejects, Limits(), "rejects.jsonl")
    webvid._check_limits(1001, rejects, Limits(), "rejects.jsonl")


def test_bucket_that_does_not_answer_costs_the_clip_and_is_no_bug(corpus, monkeypatch):
    def size(folder, name):
        raise PermissionError(13, "Forbidden")

    monkeypatch.setattr(Folder, "size", size)
    maker = RecordMaker(OPTIONS, *load_estimators())
    made = make_clip(Input("a", "", (Place("scene0.mp4"),)), Folder(f"file://{corpus}"), maker)
    assert made["reason"] == "unreadable"
    assert made["path"] == "scene0.mp4" and "Forbidden" in made["detail"]


def test_one_row_of_rubbish_does_not_stop_a_run(corpus, tmp_path):
    text = f"video,caption\n{'a caption that is not a name ' * 20},x\nscene0.mp4,a scene\n"
    (tmp_path / "list.csv").write_text(text)
    counts = prepare(make_job(tmp_path / "list.csv", corpus, tmp_path / "out", OPTIONS, "openvid"))
    assert (counts["records"], counts["reasons"]) == (1, {"missing": 1})


def test_run_that_rejects_nearly_all_fails_and_says_why(corpus, tmp_path):
    with pytest.raises(UserError, match="3 of 8 inputs were rejected, mostly as 'duplicate'"):
        prepare(make_job(None, corpus, tmp_path / "b", OPTIONS), limits=Limits(max_rejected=0.2))
    assert len((tmp_path / "b" / REJECTS).read_text().splitlines()) == 3
    assert not (tmp_path / "b" / "manifest.json").exists()
    # What was made is kept: with another limit, the run ends at once.
    prepare(make_job(None, corpus, tmp_path / "b", OPTIONS), limits=Limits(max_rejected=0.5))
    with pytest.raises(UserError, match="--max_bugs"):
        Limits(max_bugs=2.0)


def test_changed_clip_changes_what_repeats_it(corpus, tmp_path):
    root, runner = tmp_path / "root", LocalRunner(1)
    root.mkdir()
    for name in ("scene1.mp4", "zz.mp4", "scene0.mp4"):
        (root / name).write_bytes((corpus / name).read_bytes())
    counts = prepare(make_job(None, root, tmp_path / "out", OPTIONS, num_shards=3), runner=runner)
    assert counts["reasons"] == {"duplicate": 1}
    # The original of zz.mp4 becomes another clip, so that zz.mp4 must come back.
    write_video(root / "scene1.mp4", moving_scene(9), 24)
    counts = prepare(make_job(None, root, tmp_path / "out", OPTIONS, num_shards=3), runner=runner)
    assert counts["records"] == 3
    prepare(make_job(None, root, tmp_path / "fresh", OPTIONS, num_shards=3), runner=runner)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("separator", ["\n", "\u2028", "\u2029", "\x85", "\r\n"])
def test_any_caption_comes_through_the_plan(tmp_path, separator):
    caption = f"one{separator}two"
    (tmp_path / "list.csv").write_text(
        f'videoid,contentUrl,duration,page_dir,name\n7,a.mp4,1,p,"{caption}"\n',
        encoding="utf-8",
        newline="",
    )
    job = make_job(tmp_path / "list.csv", tmp_path, tmp_path / "out", OPTIONS, num_shards=1)
    (found,) = planned_inputs(job, 0)
    assert found.caption.split() == caption.split()


def test_job_of_a_learned_estimator_depends_on_what_computes_it(corpus, tmp_path, monkeypatch):
    plain = make_job(None, corpus, tmp_path, OPTIONS)
    job = dataclasses.replace(plain, estimator="gmflow")
    assert "jaxlib" not in plain.versions()
    before, version = job.fingerprint(""), importlib.metadata.version
    assert job.versions()["jaxlib"] == version("jaxlib")
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0" if name == "jaxlib" else version(name)
    )
    assert job.fingerprint("") != before


def test_plan_for_other_shards_is_refused(corpus, tmp_path):
    start(make_job(None, corpus, tmp_path, OPTIONS, num_shards=3))
    with pytest.raises(UserError, match="num_shards=3, got 2"):
        planned_inputs(make_job(None, corpus, tmp_path, OPTIONS, num_shards=2), 0)


def test_no_input_is_lost_with_its_part_of_the_plan(corpus, tmp_path):
    job, runner = make_job(None, corpus, tmp_path, OPTIONS, num_shards=3), LocalRunner(1)
    start(job)
    sizes = [len(planned_inputs(job, index)) for index in range(3)]
    index = int(np.argmax(sizes))
    path = tmp_path / "plan" / f"inputs-{index:05d}-of-00003.jsonl"
    whole = path.read_text()
    path.unlink()
    with pytest.raises(UserError, match="is missing: list the inputs again"):
        runner.write(job, [index])
    path.write_text(whole.partition("\n")[2])  # a line is gone
    runner.write(job, range(3))
    with pytest.raises(UserError, match="the shards have 7 inputs, the plan has 8"):
        finish(job, runner)
    start(job)
    runner.write(job, [index])
    assert finish(job, runner)["inputs"] == 8


def test_nothing_to_prepare_is_an_error_of_one_line(corpus, tmp_path):
    (tmp_path / "list.csv").write_text('videoID,timestamp,caption\na,"[]","[]"\n')
    with pytest.raises(UserError, match="no rows with clips"):
        prepare(make_job(tmp_path / "list.csv", corpus, tmp_path / "out", OPTIONS, "panda70m"))
    with pytest.raises(UserError, match="there are no inputs"):
        webvid._check_limits(0, [], Limits(), "rejects.jsonl")


def test_plan_of_another_list_is_refused(corpus, tmp_path):
    lists = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for number, path in enumerate(lists):
        path.write_text(f"video,caption\nscene{number}.mp4,a scene\n")
    first, second = (make_job(each, corpus, tmp_path / "out", OPTIONS, "openvid") for each in lists)
    start(first)
    LocalRunner(1).write(first, [0])
    with pytest.raises(UserError, match=r"plan for --csv=.*one.csv, got .*two.csv"):
        LocalRunner(1).write(second, [0])
    with pytest.raises(UserError, match=r"plan for --csv="):
        finish(second, LocalRunner(1))
    with pytest.raises(UserError, match=r"plan for --root="):
        finish(dataclasses.replace(first, root=str(tmp_path)), LocalRunner(1))
    assert finish(first, LocalRunner(1))["records"] == 1


def test_span_of_a_film_becomes_a_clip(corpus, tmp_path):
    tracker, flow = load_estimators()
    film = np.concatenate([moving_scene(seed) for seed in (0, 1, 2)])
    write_video(tmp_path / "film.mp4", film, 24)
    maker = RecordMaker(OPTIONS, tracker, flow)
    span = (21 / 24, 42 / 24)
    made = maker.make(tmp_path / "film.mp4", "film_1", "", Stopwatch(), span)
    alone = maker.make(corpus / "scene1.mp4", "scene1", "", Stopwatch())
    assert made[0].record.start == pytest.approx(alone[0].record.start + 21 / 24)
    pictures, _ = read_video(made[0].record.video)
    expected, _ = read_video(alone[0].record.video)
    assert np.abs(pictures.astype(int) - expected).mean() < 6
    other, _ = read_video(corpus / "scene2.mp4", max_frames=7)
    other, _ = resize_video(other, 48, 64)
    assert np.abs(pictures.astype(int) - other).mean() > 15
