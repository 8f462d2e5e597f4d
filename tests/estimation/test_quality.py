"""The quality report as a program, and how good the default is on a few scenes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_ground_truth import picture, write_flo

from nuwa_jax.data.scene_layout import SceneConfig
from nuwa_jax.data.scenes import HELD_OUT_SEED, render_scene, true_tracks
from nuwa_jax.errors import UserError
from nuwa_jax.estimation.quality import score_tracks, weight_paths
from nuwa_jax.motion.estimators import LucasKanadeTracker
from nuwa_jax.motion.tracks import Tracks


def report(*flags):
    command = [sys.executable, "-m", "nuwa_jax.estimation.quality", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_report_of_flow_and_tracks(tmp_path):
    write_flo(tmp_path / "gt" / "a_flow.flo", np.zeros((40, 60, 2)))
    for i in range(2):
        picture(tmp_path / "gt" / f"a_{i}.png", size=(40, 60))
    run = report(
        *("--scenes=2", "--height=64", "--width=96", "--frames=4", "--points=32"),
        *(f"--gt={tmp_path / 'gt'}", f"--out={tmp_path / 'report.json'}"),
    )
    assert run.returncode == 0, run.stderr
    last = json.loads(run.stdout.splitlines()[-1])
    assert last == json.loads((tmp_path / "report.json").read_text())
    (backend,) = last["backends"].values()
    assert backend["tracker"].startswith("opencv-lk") and backend["flow"].startswith("opencv-dis")
    assert backend["pairs"]["a_flow"]["end_point_error"] == pytest.approx(0, abs=1e-3)
    scores = backend["tracks"]["64x96"]
    assert 0 < scores["survival"] <= 1 and scores["queries"] > 10
    assert "| 64x96 | lk_dis |" in run.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backend=raft"], "no motion estimator 'raft'"),
        (["--height=64"], "--height and --width go together"),
        (["--frames=1"], "--frames >= 2"),
        (["--gt=/nowhere"], "is no folder"),
        (["--backend=gmflow"], "gmflow needs its weights"),
        (["--out=/nowhere/report.json"], "there is no folder /nowhere"),
    ],
)
def test_mistakes_are_said_in_one_line(flags, said):
    run = report(*flags)
    assert run.returncode == 2
    assert said in run.stderr and len(run.stderr.strip().splitlines()) == 1


def test_weights_go_to_the_backend_that_they_are_for():
    assert weight_paths(["lk_dis", "gmflow"], ["g.safetensors"]) == {"gmflow": "g.safetensors"}
    both = weight_paths(["gmflow", "tapir"], ["tapir=t.npy", "gmflow=g.safetensors"])
    assert both == {"gmflow": "g.safetensors", "tapir": "t.npy"}
    with pytest.raises(UserError, match="for which of"):
        weight_paths(["gmflow", "tapir"], ["g.safetensors"])
    with pytest.raises(UserError, match="not compared"):
        weight_paths(["gmflow"], ["tapir=t.npy"])
    with pytest.raises(UserError, match="two files"):
        weight_paths(["gmflow"], ["a", "b"])


def test_the_truth_of_any_point_agrees_with_that_of_the_scene():
    config = SceneConfig(height=96, width=128, frames=5)
    scene = render_scene(HELD_OUT_SEED, config)
    seen = scene.tracks.visible[:, 0]
    truth = true_tracks(HELD_OUT_SEED, config, scene.tracks.points[seen, 0])
    np.testing.assert_allclose(truth.points, scene.tracks.points[seen], atol=1e-3)
    np.testing.assert_array_equal(truth.state, scene.tracks.state[seen])


class Oracle:
    """Tells the truth, or that nothing moves."""

    name = "oracle"

    def __init__(self, seed, config, still=False):
        self.seed, self.config, self.still = seed, config, still

    def track(self, video, points):
        if self.still:
            path = np.repeat(points[:, None], len(video), axis=1)
            return Tracks(path, np.ones(path.shape[:2], np.uint8))
        return true_tracks(self.seed, self.config, points)


def test_the_report_tells_a_perfect_tracker_from_one_that_sees_no_motion():
    config = SceneConfig(height=96, width=128, frames=6)
    perfect = score_tracks(Oracle(HELD_OUT_SEED, config), config, 1, 64)
    assert perfect["ok4"] == perfect["occlusion_recall"] == perfect["occlusion_precision"] == 1
    assert perfect["survival"] >= perfect["visible_throughout"] and perfect["median_error"] == 0
    still = score_tracks(Oracle(HELD_OUT_SEED, config, still=True), config, 1, 64)
    assert still["survival"] == 1 and still["ok4"] < 1 and still["occlusion_recall"] in (0, None)


@pytest.mark.parametrize(
    ("size", "scenes"),
    [((256, 256), 6), pytest.param((320, 576), 12, marks=pytest.mark.slow)],
)
def test_the_default_tracker_is_fit_to_train_on(size, scenes):
    config = SceneConfig(height=size[0], width=size[1], frames=16)
    scores = score_tracks(LucasKanadeTracker(), config, scenes, 256)
    assert scores["median_error"] <= 0.35
    assert scores["ok4"] >= 0.95
    assert scores["occlusion_recall"] >= 0.9
    assert scores["survival"] >= 0.7 * scores["visible_throughout"]
