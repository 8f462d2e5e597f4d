"""The same losses on one device and on meshes of eight virtual ones."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("mesh_run.py")
ROOT = PROGRAM.parents[2]


def run(devices, mesh, steps, workdir, model, die_after=0):
    arguments = [devices, json.dumps(mesh), steps, workdir, model, die_after]
    command = [str(part) for part in (sys.executable, PROGRAM, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    divided = [line for line in done.stdout.splitlines() if "stay whole" in line]
    assert bool(divided) == (devices > 1), done.stdout
    # Losses would be the same, too, if nothing were split.
    assert (told["split"] > 0) == (mesh.get("fsdp", 1) * mesh.get("tensor", 1) > 1)
    return np.array([told["loss"], told["grad_norm"]])


def assert_same(together, alone):
    """Losses, and norms of gradients: wrong ones of a few small layers may leave losses as good."""
    assert together.shape == alone.shape
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert (np.ptp(alone, 1) > 0.1).all()  # they are of different batches


def test_a_run_may_change_its_mesh_on_the_way(tmp_path):
    """With a stand-in for the model, whose layers no frame or tensor rule is about."""
    alone = run(1, {}, 6, tmp_path / "alone", "fake")
    assert_same(run(8, {"data": 2, "fsdp": 4}, 6, tmp_path / "together", "fake"), alone)
    before = run(8, {"data": 1, "fsdp": 8}, 6, tmp_path / "moved", "fake", die_after=6)
    assert 0 < before.shape[1] < 6
    assert_same(run(4, {"data": 2, "fsdp": 2}, 6, tmp_path / "moved", "fake"), alone)


def test_activations_are_split_by_frames_and_by_pixels():
    program = """
import jax, json
jax.config.update("jax_num_cpu_devices", 4)
from jax import numpy as jnp
from nuwa_jax.models.partition import by_frames, by_pixels
from nuwa_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
x = jnp.zeros((2, 4, 6, 3))
assert jax.jit(by_frames)(x).sharding.is_fully_replicated  # no mesh is in use
with use_mesh(make_mesh(MeshConfig(data=2, frame=2))):
    made = [jax.jit(by)(x) for by in (by_frames, by_pixels)]
print(json.dumps([each.addressable_shards[0].data.shape for each in made]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [[1, 2, 6, 3], [1, 4, 3, 3]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a model's run on one device says of its losses; made once for every model asked for."""
    losses = {}

    def get(model):
        if model not in losses:
            losses[model] = run(1, {}, 20, tmp_path_factory.mktemp(model), model)
        return losses[model]

    return get


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 4, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 4, "frame": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "frame": 2}, marks=pytest.mark.slow),
        {"data": 1, "fsdp": 2, "frame": 2, "tensor": 2},
    ],
    ids=json.dumps,
)
def test_losses_of_the_smallest_model_are_the_same_on_every_mesh(mesh, tmp_path, alone):
    """The one that is not slow splits parameters, samples, frames and heads at once."""
    assert_same(run(8, mesh, 20, tmp_path, "small"), alone("small"))


def test_gradients_of_convolutions_are_the_same_where_frames_and_heads_are_divided():
    """XLA's own are, where rows are divided, as many times too large as there are devices."""
    program = PROGRAM.with_name("convolutions_run.py")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 24
    assert {case: off for case, off in found.items() if not off < 1e-5} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"data": 1, "fsdp": 8},
        {"data": 4, "frame": 2},
        {"data": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "frame": 2},
        {"data": 1, "fsdp": 2, "frame": 2, "tensor": 2},
    ],
    ids=json.dumps,
)
def test_losses_are_the_same_on_every_mesh(mesh, tmp_path, alone):
    assert math.prod(mesh.values()) == 8
    assert_same(run(8, mesh, 20, tmp_path, "real"), alone("real"))
