"""The protocol, with generators whose score is known: an oracle, a sleeper, and one in between."""

import dataclasses
import json
import math

import ml_collections
import numpy as np
import pytest
from absl import flags
from PIL import Image

from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import held_out_scene
from nuwa_jax.data.scenes import HELD_OUT_SEED, render_scene
from nuwa_jax.data.video import read_video
from nuwa_jax.diffusion.guidance import GuidanceScales
from nuwa_jax.errors import UserError
from nuwa_jax.evaluation import protocol
from nuwa_jax.evaluation.report import metrics_table
from nuwa_jax.motion.tracks import Tracks, TrackState

HEIGHT, WIDTH, FRAMES = 48, 56, 5


class FakeGenerator:
    """Knows the true clip of every first frame; `make` says what it does with it."""

    def __init__(self, make, **looks):
        data = {
            "height": HEIGHT,
            "width": WIDTH,
            "frames": FRAMES,
            "max_drags": 5,
            "sampler": {"max_count": 5},
        }
        data |= looks
        sampling = {"steps": 7, "guidance": {"text": 1.0, "image": 1.0, "drag": 1.0}}
        self.config = ml_collections.ConfigDict({"data": data, "sampling": sampling})
        self.guidance = GuidanceScales()
        self.calls = []
        self._make = make
        self._data = DataConfig.from_config(self.config.data)

    def generate(self, image, points, state, text, *, seed, steps, guidance):
        self.calls.append(dict(image=image, points=points, state=state, text=text, seed=seed))
        self.calls[-1].update(steps=steps, guidance=guidance)
        return np.stack([self._make(self._truth(one), points is not None) for one in image])

    def _truth(self, image):
        for index in range(40):
            scene = held_out_scene(index, self._data)
            if (scene.video[0] == image).all():
                return scene.video
        raise AssertionError("not the first frame of a held-out scene of this seed")


def oracle(video, with_drags):
    return video


def sleeper(video, with_drags):
    return np.repeat(video[:1], len(video), axis=0)


def obedient(video, with_drags):
    """Follows drags; sleeps without."""
    return oracle(video, True) if with_drags else sleeper(video, False)


@pytest.fixture(scope="module")
def evaluation():
    generator = FakeGenerator(obedient)
    return generator, protocol.evaluate(generator, num_scenes=5, batch_size=2)


def test_following_scores_the_floor_and_sleeping_the_ceiling(evaluation):
    metrics = evaluation[1].metrics
    for name in ("trajectory_error", "end_point_error", "object_error", "appearance_difference"):
        values = metrics[name]
        assert values["drag"] == values["floor"]
        assert values["no_drag"] == values["ceiling"]
        assert values["floor"] < 0.5 * values["ceiling"]
    assert metrics["trajectory_error"]["floor"] < 1
    assert metrics["ratios"]["drag/no_drag"] == metrics["ratios"]["drag/ceiling"]
    assert metrics["ratios"]["drag/no_drag"]["value"] < 0.3


def test_metrics_say_how_they_were_measured(evaluation):
    generator, result = evaluation
    metrics = result.metrics
    expected = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "num_scenes": 5, "seed": 0}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["steps"] == 7 and metrics["guidance"] == {"text": 1, "image": 1, "drag": 1}
    assert metrics["tracker"].startswith("template")
    assert len(metrics["scenes"]) == 5
    error = metrics["trajectory_error"]
    for video in protocol.VIDEOS:
        low, high = error[f"{video}_interval"]
        assert low <= error[video] <= high
        share = metrics["trajectory_error_fraction_of_diagonal"][video]
        assert share == pytest.approx(error[video] / math.hypot(HEIGHT, WIDTH), abs=1e-4)
    means = np.mean([each["trajectory_error"]["ceiling"] for each in metrics["scenes"]])
    assert error["ceiling"] == pytest.approx(means, abs=1e-4)


def test_drags_are_withheld_with_all_else_equal(evaluation):
    calls = evaluation[0].calls
    assert len(calls) == 6  # three batches, with and without
    for given, withheld in zip(calls[::2], calls[1::2], strict=True):
        assert withheld["points"] is None and withheld["state"] is None
        assert given["points"].shape == (2, 5, FRAMES, 2)
        assert given["state"].max() == TrackState.VISIBLE or given["state"].max() > 0
        assert given["seed"] == withheld["seed"] and given["text"] == withheld["text"]
        np.testing.assert_array_equal(given["image"], withheld["image"])
    assert len({call["seed"] for call in calls}) == 3  # other noise for every batch


def test_results_do_not_depend_on_the_batch_size(evaluation):
    metrics = protocol.evaluate(FakeGenerator(obedient), num_scenes=3, batch_size=3).metrics
    assert metrics["scenes"] == evaluation[1].metrics["scenes"][:3]


def test_moving_without_drags_is_seen_and_moving_the_background_too():
    def earthquake(video, with_drags):
        return np.stack([np.roll(video[0], 2 * i, axis=1) for i in range(len(video))])

    still_camera = {"scenes": {"pan_probability": 0.0, "zoom_probability": 0.0}}
    generator = FakeGenerator(earthquake, **still_camera)
    metrics = protocol.evaluate(generator, num_scenes=2, batch_size=2).metrics
    background = metrics["background_motion"]
    assert background["num_clips"] == 2
    assert background["drag"] == pytest.approx(5, abs=1)  # the mean of 2, 4, 6, 8 pixels
    assert background["floor"] < 0.5 and background["ceiling"] < 0.5


def test_background_is_not_scored_where_the_camera_moves():
    moving = {"scenes": {"pan_probability": 1.0}}
    generator = FakeGenerator(sleeper, **moving)
    background = protocol.evaluate(generator, num_scenes=2).metrics["background_motion"]
    assert background["num_clips"] == 0 and background["drag"] is None


def data_config(**scenes):
    size = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES}
    return DataConfig.from_config({**size, "scenes": scenes})


def test_drags_are_the_middles_of_visible_sprites_and_others_are_scored_apart():
    data = data_config(min_sprites=3, max_sprites=3)
    for task in protocol.make_tasks(data, seed=0, num_scenes=6, background_anchor=False):
        scene = task.scene
        assert 1 <= task.drags.num_tracks <= 3
        assert (task.drags.state[:, 0] == TrackState.VISIBLE).all()
        assert (task.object.state[:, 0] == TrackState.VISIBLE).all()
        middles = {tuple(point) for point in scene.tracks.points[:3, 0]}
        assert {tuple(point) for point in task.drags.points[:, 0]} <= middles
        assert not {tuple(point) for point in task.object.points[:, 0]} & middles
        assert scene.seed >= HELD_OUT_SEED


def test_scenes_without_anything_to_grasp_are_passed_over():
    scene = held_out_scene(0, data_config())
    hidden = scene.tracks.state.copy()
    hidden[: scene.track_object.max()] = TrackState.OCCLUDED
    hidden = dataclasses.replace(scene, tracks=Tracks(scene.tracks.points, hidden))
    assert protocol.make_task(0, hidden) is None


def test_other_seeds_are_other_scenes():
    data = data_config()
    seeds = [
        {task.scene.seed for task in protocol.make_tasks(data, seed, 4, False)} for seed in (0, 1)
    ]
    assert not seeds[0] & seeds[1]


def test_an_anchor_on_the_background_is_given_but_not_scored():
    data = data_config(pan_probability=0.0, zoom_probability=0.0)
    scene = render_scene(HELD_OUT_SEED + 3, data.scenes)
    plain, anchored = (protocol.make_task(3, scene, anchor) for anchor in (False, True))
    assert anchored.drags.num_tracks == plain.drags.num_tracks + 1
    assert (anchored.drags.points[-1] == anchored.drags.points[-1, :1]).all()
    np.testing.assert_array_equal(anchored.dragged.points, plain.dragged.points)
    assert anchored.background.num_tracks == plain.background.num_tracks - 1


def test_everything_is_written(tmp_path, evaluation):
    result = evaluation[1]
    result.metrics["checkpoint"], result.metrics["stage"] = "runs/some", None
    protocol.write(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result.metrics
    assert (tmp_path / "out" / "metrics.md").read_text() == metrics_table(result.metrics)
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    assert sheet.shape[0] > 5 * 160 and sheet.shape[1] > 10 * 160
    videos = sorted((tmp_path / "out" / "videos").iterdir())
    assert len(videos) == 5
    video, _ = read_video(videos[0])
    assert video.shape[0] == FRAMES and video.shape[2] > 3 * 160


@pytest.mark.parametrize("name", protocol.TRACKERS)
def test_any_tracker_can_score(name):
    tracker = protocol.TRACKERS[name]()
    generator = FakeGenerator(obedient)
    metrics = protocol.evaluate(generator, num_scenes=2, batch_size=2, tracker=tracker).metrics
    assert metrics["tracker"] == tracker.name
    error = metrics["trajectory_error"]
    assert error["drag"] == error["floor"] < 0.2 * error["no_drag"]


@pytest.fixture
def command(monkeypatch):
    """Runs the command line with a generator that obeys."""

    def run(*options):
        values = flags.FlagValues()
        protocol.define_flags(values)
        rest = values(["protocol", *options])
        monkeypatch.setattr(flags, "FLAGS", values)
        loaded = []
        monkeypatch.setattr(
            protocol.Generator,
            "load",
            lambda *source: loaded.append((source, FakeGenerator(obedient))) or loaded[-1][1],
        )
        protocol.main(rest)
        return loaded[0]

    return run


def test_command_evaluates_what_its_options_name(command, tmp_path, capsys):
    source, generator = command(
        f"--out={tmp_path}", "--checkpoint=run", "--stage=flow", "--num_scenes=1", "--steps=3",
        "--batch_size=1", "--drag_scale=2.5", "--tracker=lk-viterbi",
    )  # fmt: skip
    assert source == ("run", "flow")
    call = generator.calls[0]
    assert call["steps"] == 3 and call["guidance"] == GuidanceScales(drag=2.5)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["checkpoint"] == "run" and metrics["stage"] == "flow"
    assert metrics["num_scenes"] == 1 and metrics["guidance"]["drag"] == 2.5
    assert "trajectory error" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [([], "add --out=DIR"), (["--out=x", "--steps=0"], "--steps"), (["--out=x", "y"], "'y'")],
)
def test_faults_of_the_command_are_named(command, options, message):
    with pytest.raises(UserError, match=message):
        command(*options)


@pytest.mark.parametrize("fault", [{"num_scenes": 0}, {"batch_size": 0}, {"seed": -1}])
def test_impossible_requests_are_refused(fault):
    with pytest.raises(UserError, match=next(iter(fault))):
        protocol.evaluate(FakeGenerator(sleeper), **fault)


def test_a_generator_of_another_length_is_refused():
    generator = FakeGenerator(lambda video, with_drags: video[:-1])
    with pytest.raises(ValueError, match="generator made"):
        protocol.evaluate(generator, num_scenes=1, batch_size=1)
