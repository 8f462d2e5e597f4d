"""GMFlow as an estimator: batches, sizes, names; and what its published weights reach."""

import os
import pathlib
import re

import numpy as np
import pytest

from nuwa_jax.convert.gmflow import convert_gmflow
from nuwa_jax.errors import UserError
from nuwa_jax.estimation import load_estimators
from nuwa_jax.estimation.gmflow import FlowTracker, GMFlowEstimator
from nuwa_jax.estimation.ground_truth import find_pairs
from nuwa_jax.estimation.quality import score_flow
from nuwa_jax.motion.tracks import TrackState
from nuwa_jax.tensor_files import Spec, write_safetensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gmflow_small.npz"
GT = pathlib.Path(__file__).parents[3] / "shared" / "gt"
WEIGHTS = os.environ.get("NUWA_GMFLOW", "")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A file of a narrow GMFlow with random weights."""
    folder = tmp_path_factory.mktemp("gmflow")
    with np.load(GOLDEN) as file:
        arrays = {n: file[n].astype(np.float32) for n in file.files if n.startswith("weights|")}
    arrays = {name.removeprefix("weights|"): array for name, array in arrays.items()}
    specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(folder / "in.safetensors", specs, arrays.items())
    convert_gmflow(folder / "in.safetensors", folder / "gmflow.safetensors")
    return str(folder / "gmflow.safetensors")


def clip(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def test_batches_change_nothing_and_small_pictures_keep_their_size(narrow):
    video = clip(6, 9, 14)  # five pairs: parts of three and of two
    flow = GMFlowEstimator(narrow, batch=3).estimate(video)
    assert flow.shape == (6, 9, 14, 2) and flow.dtype == np.float32
    assert not flow[0].any() and flow[1:].any(axis=(1, 2, 3)).all()
    alone = GMFlowEstimator(narrow, batch=1, upsample=4).estimate(video[3:5])
    np.testing.assert_allclose(flow[4], alone[1], atol=1e-3 * np.abs(flow).max())
    assert GMFlowEstimator(narrow).estimate(video[:1]).shape == (1, 9, 14, 2)


def test_flow_back_is_the_flow_of_the_reversed_clip(narrow):
    video = clip(3, 10, 12)
    estimator = GMFlowEstimator(narrow)
    forward, backward = estimator.both_ways(video)
    tolerance = dict(atol=1e-3 * np.abs(forward).max())
    np.testing.assert_allclose(forward, estimator.estimate(video), **tolerance)
    reverse = estimator.estimate(video[::-1])
    np.testing.assert_allclose(backward[1:], reverse[1:][::-1], **tolerance)


def test_names_tell_the_weights(narrow, tmp_path):
    tracker, flow = load_estimators("gmflow", narrow)
    assert re.fullmatch(r"gmflow-1 \(weights [0-9a-f]{12}\)", flow.name)
    assert flow.name in tracker.name
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(pathlib.Path(narrow).read_bytes())
    assert load_estimators("gmflow", str(copy)).flow.name == flow.name
    enlarged = load_estimators("gmflow_x2", narrow)
    assert (
        enlarged.flow.name.endswith(", enlarged 2)") and enlarged.flow.name in enlarged.tracker.name
    )
    with pytest.raises(ValueError, match="at least 1"):
        GMFlowEstimator(narrow, batch=0)


def test_other_files_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="needs its weights"):
        load_estimators("gmflow")
    with pytest.raises(UserError, match=r"flownet\.pkl.*--part=gmflow"):
        load_estimators("gmflow", "flownet.pkl")
    with pytest.raises(UserError, match="cannot be read"):
        load_estimators("gmflow", str(tmp_path / "none.safetensors"))
    write_safetensors(tmp_path / "other.safetensors", {}, ())
    with pytest.raises(UserError, match=r"no.* converted GMFlow.*--part=gmflow"):
        load_estimators("gmflow", str(tmp_path / "other.safetensors"))


class KnownFlow:
    """A uniform motion of 7 pixels to the right, and its return; off by up to 2 pixels."""

    name = "known"

    def both_ways(self, video):
        flow = np.zeros((*video.shape[:3], 2), np.float32)
        flow[1:, ..., 0] = 6
        return flow, -flow


def test_tracks_follow_flow_and_are_made_precise():
    rng = np.random.default_rng(1)
    wide = np.kron(rng.integers(0, 256, (16, 50, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    video = np.stack([wide[:, 60 - 7 * i : 156 - 7 * i] for i in range(5)])
    video[3, 20:44, 40:70] = 128  # covers the second point, for one frame
    points = np.array([[20.0, 10.0], [31.0, 30.0], [85.0, 50.0]])
    tracks = FlowTracker(KnownFlow()).track(video, points)
    truth = points[0] + 7 * np.arange(5)[:, None] * [1, 0]
    assert np.linalg.norm(tracks.points[0] - truth, axis=-1).max() < 0.3
    assert tracks.visible[0].all()
    assert tracks.state[1].tolist() == [TrackState.VISIBLE] * 3 + [TrackState.OCCLUDED] * 2
    assert tracks.state[2, 2:].tolist() == [TrackState.OUTSIDE] * 3


@pytest.mark.slow
@pytest.mark.skipif(not GT.is_dir(), reason=f"no true flow at {GT}")
@pytest.mark.skipif(not WEIGHTS, reason="NUWA_GMFLOW does not name a converted GMFlow")
@pytest.mark.parametrize(
    ("pair", "bound"),
    [("middlebury/flow10", 0.55), ("flyingchairs/0_flow", 1.2), ("flyingchairs/1_flow", 1.2)],
)
def test_published_weights_reach_the_error_of_the_original(pair, bound):
    found = {each.name: each for each in find_pairs(GT)}
    assert score_flow(GMFlowEstimator(WEIGHTS), found[pair])["end_point_error"] <= bound
