"""A model of a sharded training run as one file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import traverse_util

from nuwa_jax.tensor_files import SafetensorsFile
from nuwa_jax.training.checkpoint import load_final

ROOT = Path(__file__).parents[2]


def python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_averaged_parameters_of_a_sharded_run_are_exported_on_one_device(tmp_path):
    mesh = json.dumps({"data": 1, "fsdp": 4})
    told = python(ROOT / "tests/parallel/mesh_run.py", 4, mesh, 3, tmp_path / "run", "fake")
    assert json.loads(told.splitlines()[-1])["split"] > 0
    flags = [f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--dtype=float32"]
    python("-m", "nuwa_jax.generation.export", *flags)
    file = SafetensorsFile(tmp_path / "out/model.safetensors")
    averaged = traverse_util.flatten_dict(load_final(tmp_path / "run").params, sep="/")
    assert sorted(file.specs) == sorted(averaged)  # no optimizer, nothing twice
    for name, values in averaged.items():
        np.testing.assert_array_equal(file.read(name), values)
    assert json.loads((tmp_path / "out/config.json").read_text())["curriculum"] == ["drag"]
