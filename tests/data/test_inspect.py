"""The page of clips: what is on it, that it needs nothing else, and what it does with damage."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nuwa_jax.data import inspect
from nuwa_jax.data.inspect import Options, inspect_folder, inspect_scenes, load_config
from nuwa_jax.data.inspect_charts import bars, histogram, rose, shares_over_time
from nuwa_jax.data.inspect_statistics import directions, mean_step
from nuwa_jax.data.records import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    Record,
    RecordError,
    RecordReader,
    ShardWriter,
    hash_file,
)
from nuwa_jax.data.scenes import SceneConfig, render_scene
from nuwa_jax.data.video import encode_video
from nuwa_jax.errors import UserError
from nuwa_jax.motion.drag_synthesis import DragSynthesis
from nuwa_jax.motion.schedules import Schedule
from nuwa_jax.motion.tracks import Tracks, TrackState
from nuwa_jax.motion.trajectory_samplers import SamplerConfig

ROOT = Path(inspect.__file__).parents[2]
HOSTILE = '<script>alert("1")</script> & "quotes" </p>'
VOID = {"meta", "img", "br", "link", "input"}
SCENES = SceneConfig(height=36, width=52, frames=5, supersample=1)


class Page(HTMLParser):
    """What is on a page; fails if its tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.text, self.attributes = Counter(), [], [], []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, (tag, self._open)
        self._open.pop()

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def picture(image):
    kind, _, data = image["src"].partition(";base64,")
    assert kind == "data:image/webp"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def make_folder(folder, count=4, broken=(), flow=False, rejects=True):
    """A prepared folder of scenes; the videos of those in `broken` cannot be decoded."""
    folder.mkdir()
    path = folder / "clips.array_record"
    with ShardWriter(path) as writer:
        for index in range(count):
            scene = render_scene(index, SCENES)
            writer.write(
                Record(
                    source_id=f"clip<{index}>",
                    caption=HOSTILE if index == 1 else scene.caption,
                    video=b"no video" if index in broken else encode_video(scene.video, 10),
                    fps=10.0,
                    height=SCENES.height,
                    width=SCENES.width,
                    frames=SCENES.frames,
                    start=0.5,
                    tracks=scene.tracks,
                    flow=scene.flow[:, ::2, ::2].astype(np.float16) if flow else None,
                )
            )
    shard = {"name": path.name, "records": count, "bytes": path.stat().st_size}
    manifest = {"format": FORMAT, "version": SCHEMA_VERSION, "records": count, "inputs": 1234}
    manifest |= {"min_frames": SCENES.frames, "tracker": "by <hand>"}
    manifest["shards"] = [{**shard, "sha256": hash_file(path)}]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    if rejects:
        lines = [{"id": f"r{i}", "reason": "static", "detail": HOSTILE} for i in range(9)]
        lines.append({"id": "r9", "reason": "cut", "detail": "at <5>"})
        text = "\n".join(map(json.dumps, lines)) + '\n{"id": "half\n[1]\n\n'
        (folder / "rejects.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("inspect") / "clips")


@pytest.fixture(scope="module")
def page(folder):
    return inspect_folder(folder, Options())


def test_the_page_stands_alone_and_every_picture_decodes(page):
    text, counts = page
    parsed = Page(text)
    assert counts == {"clips": 4, "sampled": 4, "shown": 4, "damaged": 0}
    assert not {"script", "link", "iframe", "object"} & parsed.tags.keys()
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(parsed.images) == 1 + 3 * 4  # the key to flow; tracks, drags and flow of each clip
    pictures = [picture(image) for image in parsed.images[1:]]
    for number, image in enumerate(pictures):
        image.load()
        scale = image.height // SCENES.height
        enlarged = 1 if number % 3 == 2 else scale
        assert image.size == (SCENES.width * enlarged, SCENES.height * enlarged)
    assert [image.n_frames for image in pictures] == [5, 1, 1] * 4


def test_what_was_prepared_and_what_was_refused_is_told(page):
    parsed = Page(page[0])
    for words in (
        "inputs 1,234",
        "tracker by <hand>",
        "shards 1",
        "rejects listed 12",
        "10 rejects",
        "2 lines of it cannot be read",
        "clip<3>",
        f"52x36, 5 frames at 10 fps, {render_scene(0, SCENES).tracks.num_tracks} tracks; by their",
        "at <5>",
    ):
        assert words in parsed.words, words
    assert parsed.words.count("r9") == 1
    assert sum(f"r{i} " in parsed.words for i in range(9)) == 4  # examples, not all


def test_background_and_objects_of_a_clip_are_counted(page):
    found = re.findall(
        r"(\d+) tracks; by their motion (\d+) of the background, (\d+) of (\d+) objects, "
        r"(\d+) of neither",
        Page(page[0]).words,
    )
    assert len(found) == 4
    for tracks, background, grouped, objects, neither in (map(int, each) for each in found):
        assert tracks == background + grouped + neither
        assert background >= 10 and (grouped >= 3) == (objects >= 1)


def test_texts_are_escaped(page):
    assert page[0].count("<script") == 0
    assert Page(page[0]).words.count('<script>alert("1")</script>') >= 5


def test_all_distributions_are_drawn(page):
    parsed = Page(page[0])
    assert parsed.tags["svg"] == parsed.tags["figure"] == 14
    for title in (
        "Tracks per clip",
        "still seen in the last frame",
        "Displacement of a track",
        "Speed of a track",
        "Direction of tracks",
        "States of tracks",
        "Camera",
        "Drags per clip",
        "Length of captions",
        "Frames per second",
        "Sizes",
        "Lengths",
        "Reasons",
    ):
        assert title in parsed.words, title
    tracks = sum(render_scene(i, SCENES).tracks.num_tracks for i in range(4))
    assert f"{tracks:,} values, median" in parsed.words
    assert not re.search(r'="[^"]*(nan|inf)[^"]*"', re.sub(r'src="[^"]*"', "", page[0]))


def test_the_same_seed_makes_the_same_page_and_another_other_drags(folder, page):
    assert inspect_folder(folder, Options())[0] == page[0]
    assert inspect_folder(folder, Options(seed=1))[0] != page[0]


def test_fewer_clips_are_shown_than_counted(folder):
    text, counts = inspect_folder(folder, Options(clips=2, sample=3))
    assert counts == {"clips": 4, "sampled": 3, "shown": 2, "damaged": 0}
    assert len(Page(text).images) == 1 + 3 * 2
    assert "Distributions over 3 clips" in Page(text).words
    text, counts = inspect_folder(folder, Options(clips=3, sample=1))
    assert counts["sampled"] == 3 and "A sample of 3 of 4 records" in Page(text).words


def damage(folder):
    """Overwrites bytes of the shard such that exactly one record cannot be read."""
    shard = folder / "clips.array_record"
    whole = shard.read_bytes()
    for offset in range(256, len(whole), 512):
        shard.write_bytes(whole[:offset] + bytes(64) + whole[offset + 64 :])
        try:
            reader = RecordReader(folder)
        except RecordError:
            continue
        bad = []
        for index in range(len(reader)):
            try:
                reader.read(index)
            except RecordError:
                bad.append(index)
        if len(bad) == 1:
            return bad[0]
    raise AssertionError("no place found whose damage spoils one record")


def test_damaged_records_are_counted_and_shown(tmp_path):
    folder = make_folder(tmp_path / "clips", count=5, broken=(2,), rejects=False)
    bad = damage(folder)
    text, counts = inspect_folder(folder, Options())
    broken = 1 if bad == 2 else 2
    assert counts == {"clips": 5, "sampled": 5, "shown": 4, "damaged": broken}
    parsed = Page(text)
    assert f"{broken} damaged records" in parsed.words and f"record {bad}: " in parsed.words
    assert bad == 2 or "clip<2>: a video of 8 bytes" in parsed.words
    assert "rejects" not in parsed.words


def test_stored_flow_is_shown_as_such(tmp_path):
    text, _ = inspect_folder(make_folder(tmp_path / "clips", count=1, flow=True), Options())
    parsed = Page(text)
    assert "stored; full colour" in parsed.words and "estimated" not in parsed.words
    assert picture(parsed.images[-1]).size == (26, 18)


def test_scenes_need_no_folder(page):
    options = Options(clips=2, seed=3, scenes=SCENES)
    text, counts = inspect_scenes(5, options)
    assert counts == {"clips": 5, "sampled": 5, "shown": 2, "damaged": 0}
    assert "estimated" not in text and len(Page(text).images) == 1 + 3 * 2
    single = SceneConfig(height=20, width=30, frames=1, supersample=1)
    text, _ = inspect_scenes(1, Options(scenes=single))
    assert len(Page(text).images) == 1 + 2  # no flow in one frame
    empty = SceneConfig(height=20, width=30, frames=3, max_sprites=0, min_sprites=0)
    nothing = SceneConfig(**{**vars(empty), "background_points": 0})
    assert "nothing moves" in Page(inspect_scenes(2, Options(scenes=nothing))[0]).words


def test_schedules_are_read_at_the_step():
    sampler = SamplerConfig(
        kind="dense", min_count=Schedule(9, 2, 10), max_count=Schedule(9, 2, 10)
    )
    titles = []
    for step in (0, 10):
        synthesis = DragSynthesis(sampler=sampler)
        options = Options(scenes=SCENES, step=step, synthesis=synthesis)
        words = Page(inspect_scenes(1, options)[0]).words
        assert f"at step {step}" in words
        titles.append(int(re.search(r"(\d+) drags, on", words).group(1)))
    assert titles[0] > titles[1] == 2


def test_configs_are_read_from_python_files_and_from_runs(tmp_path):
    data = {"height": 20, "sampler": {"kind": "grid"}, "scenes": {"max_sprites": 2}}
    run = tmp_path / "config.json"
    run.write_text(json.dumps({"data": data}))
    synthesis, scenes = load_config(str(run))
    assert synthesis.sampler.kind == "grid" and (scenes.height, scenes.max_sprites) == (20, 2)
    synthesis, scenes = load_config(f"{ROOT}/configs/dragnuwa_paper.py:small")
    assert synthesis.sampler.kind == "grid" and scenes.height == 32


@pytest.mark.parametrize(
    "text, name, message",
    [
        (None, "none.py", "no such file"),
        ("x = 1", "a.py", "get_config"),
        ("import no_such_module", "a.py", "no_such_module.*configs/"),
        ("{", "a.json", "neither .py nor JSON"),
        ('{"model": {}}', "a.json", "no section data"),
        ("[3]", "a.json", "no section data"),
        ('{"data": {"sampler": {"kin": 1}}}', "a.json", "data.sampler.kin"),
        ('{"data": {"scenes": {"sprites": 1}}}', "a.json", "data.scenes.sprites"),
    ],
)
def test_configs_that_make_no_sense_are_named(tmp_path, text, name, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(path))


def test_options_that_make_no_sense_are_named(tmp_path):
    for options in (dict(clips=0), dict(sample=0), dict(seed=-1), dict(step=-1)):
        with pytest.raises(UserError, match=f"--{next(iter(options))}"):
            Options(**options)
    with pytest.raises(UserError, match="--scenes"):
        inspect_scenes(0, Options())
    with pytest.raises(UserError, match="not a folder of prepared clips"):
        inspect_folder(tmp_path, Options())


def test_the_program_writes_the_page_and_prints_the_counts(folder, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "nuwa_jax.data.inspect", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
        )

    done = run(str(folder), "--out=sub/page.html", "--clips=1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["shown"] == 1
    assert len(Page((tmp_path / "sub/page.html").read_text()).images) == 4
    for arguments in ([], [str(folder), "--scenes=2"], [str(tmp_path)], [str(folder), "--clips=0"]):
        failed = run(*arguments)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ")


def test_charts_count_what_they_are_given():
    chart = histogram([1, 1, 2, 5, np.nan], "<Title>", "px")
    assert "&lt;Title&gt;" in chart and "4 values, median 1.5 px" in chart
    titles = re.findall(r"<title>(.*?)</title>", chart)
    assert titles == ["0.5 to 1.5: 2", "1.5 to 2.5: 1", "4.5 to 5.5: 1"]
    clipped = histogram(np.arange(100) + 0.5, "t", bins=10, highest=10.0)
    assert re.findall(r": (\d+)<", clipped) == ["1"] * 9 + ["91"] and "10+" in clipped
    many = bars({f"n{i:02d}": i for i in range(20)}, "t", most=5)
    assert "16 others" in many and many.count("<rect") == 5 and "190 in all" in many
    counts = np.array([[3.0, 1.0], [0.0, 4.0]])
    shares = shares_over_time(counts, ["a", "b"], [(1, 2, 3), (255, 0, 16)], "t")
    assert re.findall(r"<title>(.*?)</title>", shares) == [
        "frame 0: a 75%",
        "frame 0: b 25%",
        "frame 1: b 100%",
    ]
    assert "#ff0010" in shares and "a 37.5%" in shares
    petals = rose([0.0, 0.05, -0.05, np.pi / 2, 7 * np.pi], "t", sectors=4)
    assert sorted(re.findall(r"<title>(\d+)</title>", petals)) == ["1", "1", "3"]
    for empty in (histogram([], "t"), bars({}, "t"), rose([], "t")):
        Page(empty)
    assert "nothing" in shares_over_time(np.zeros((0, 2)), ["a", "b"], [(0, 0, 0)] * 2, "t")


def test_speed_and_direction_are_of_what_is_seen():
    points = np.zeros((3, 4, 2))
    points[0, :, 0] = [0, 3, 6, 100]
    points[1, :, 1] = [0, -4, -8, -12]
    state = np.ones((3, 4), np.uint8)
    state[0, 3] = state[2, 1:] = TrackState.OCCLUDED
    tracks = Tracks(points, state)
    np.testing.assert_allclose(mean_step(tracks), [3.0, 4.0])
    np.testing.assert_allclose(directions(tracks)[:2], [0.0, -np.pi / 2])
    assert directions(tracks.select([])).shape == (0,)
