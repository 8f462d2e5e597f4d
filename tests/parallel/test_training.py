"""The same losses on one device and on meshes of eight virtual ones."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("mesh_run.py")
ROOT = PROGRAM.parents[2]


def losses(devices, mesh, steps, workdir, model):
    arguments = [devices, json.dumps(mesh), steps, workdir, model]
    command = [sys.executable, PROGRAM, *arguments]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    told = [line for line in lines if "stay whole" in line]
    assert bool(told) == (devices > 1), done.stdout
    return np.array(json.loads(lines[-1]))


def assert_same_on(mesh, steps, tmp_path, model="real"):
    alone = losses(1, {}, steps, tmp_path / "alone", model)
    together = losses(8, mesh, steps, tmp_path / "together", model)
    assert len(alone) == len(together) == steps
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert np.ptp(alone) > 0.1  # they are of different batches


def test_the_loop_gives_the_same_losses_on_a_mesh(tmp_path):
    """With a stand-in for the model, whose layers no frame or tensor rule is about."""
    assert_same_on({"data": 2, "fsdp": 4}, 6, tmp_path, "fake")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"data": 1, "fsdp": 8},
        {"data": 4, "frame": 2},
        {"data": 4, "tensor": 2},
        {"data": 1, "fsdp": 2, "frame": 2, "tensor": 2},
    ],
    ids=json.dumps,
)
def test_losses_are_the_same_on_every_mesh(mesh, tmp_path):
    assert_same_on(mesh, 20, tmp_path)
