"""The TAPIR backend with a stand-in for the package `tapnet`, of the same interface."""

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.estimation import load_estimators
from nuwa_jax.motion.tracks import TrackState


class Stand:
    """Points go right by 4 reference pixels per frame; those in the lower half hide at once."""

    def __init__(self, params, state, tapir_kwargs):
        self.options = tapir_kwargs

    def __call__(self, *, video, query_points, is_training, query_chunk_size):
        assert video.ndim == 5 and video.shape[2:] == (256, 256, 3) and not is_training
        assert query_points.shape[1] % query_chunk_size == 0
        time = jnp.arange(video.shape[1])
        start = query_points[:, :, None, 2:0:-1]
        tracks = start + jnp.stack([4.0 * time, 0.0 * time], axis=-1)
        lower = jnp.broadcast_to(start[..., 1] > 128, tracks.shape[:-1])
        return {
            "tracks": tracks,
            "occlusion": jnp.where(lower, 9.0, -9.0),
            "expected_dist": jnp.full(lower.shape, -9.0) + video.mean() * 0,
        }


@pytest.fixture
def tapnet(monkeypatch):
    module = types.ModuleType("tapnet.models.tapir_model")
    module.ParameterizedTAPIR = Stand
    for name in ("tapnet", "tapnet.models"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def checkpoint(path, *names):
    np.save(path, {"params": {name: {} for name in names}, "state": {}}, allow_pickle=True)
    return str(path)


def test_points_pass_to_tapir_and_back_in_pixels_of_the_clip(tapnet, tmp_path):
    weights = checkpoint(tmp_path / "tapir.npy", "tapir/~/resnet")
    tracker, flow = load_estimators("tapir", weights)
    assert tracker.name.startswith("tapir-1 (tapnet from source, weights ")
    assert flow.name.startswith("opencv-dis")
    video = np.zeros((3, 64, 128, 3), np.uint8)
    points = np.array([[10.0, 5.0], [20.0, 50.0], [126.0, 5.0]])
    tracks = tracker.track(video, points)
    # 4 of 256 pixels are 2 of 128.
    np.testing.assert_allclose(tracks.points[0], [[10, 5], [12, 5], [14, 5]], atol=1e-4)
    seen, hidden, out = TrackState.VISIBLE, TrackState.OCCLUDED, TrackState.OUTSIDE
    assert tracks.state.tolist() == [[seen] * 3, [seen, hidden, hidden], [seen, out, out]]
    assert tracker.track(video, points[:0]).num_tracks == 0


def test_bootstapir_is_known_by_its_layers(tapnet, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Stand, "__init__", lambda self, *_, tapir_kwargs: made.append(tapir_kwargs))
    plain = load_estimators("tapir", checkpoint(tmp_path / "a.npy", "tapir/~/resnet"))
    boots = load_estimators("tapir", checkpoint(tmp_path / "b.npy", "tapir/~/extra_convs/conv2_d"))
    assert boots.tracker.name.startswith("bootstapir") and plain.tracker.name.startswith("tapir")
    assert made[0]["pyramid_level"] == 0 and "extra_convs" not in made[0]
    assert made[1]["pyramid_level"] == 1 and made[1]["extra_convs"]


def test_what_is_missing_is_said(tapnet, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="needs its weights"):
        load_estimators("tapir")
    with pytest.raises(UserError, match="cannot be read"):
        load_estimators("tapir", str(tmp_path / "none.npy"))
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(UserError, match="no checkpoint of tapnet"):
        load_estimators("tapir", str(tmp_path / "other.npy"))
    (tmp_path / "text.npy").write_text("no pickle")
    with pytest.raises(UserError, match="no checkpoint of tapnet"):
        load_estimators("tapir", str(tmp_path / "text.npy"))
    (tmp_path / "empty.npy").touch()
    with pytest.raises(UserError, match="no checkpoint of tapnet"):
        load_estimators("tapir", str(tmp_path / "empty.npy"))
    monkeypatch.setitem(sys.modules, "tapnet.models.tapir_model", None)
    with pytest.raises(UserError, match=r"pip install git\+https.*tapnet"):
        load_estimators("tapir", checkpoint(tmp_path / "c.npy", "tapir"))
