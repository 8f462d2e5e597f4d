"""Trains a small model on a mesh of virtual CPU devices and prints its losses as JSON.

python mesh_run.py DEVICES MESH_AS_JSON STEPS WORKDIR real|fake
"""

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "training")]

import fake_model  # noqa: E402
from micro_config import get_config  # noqa: E402

from nuwa_jax.parallel import sharding  # noqa: E402
from nuwa_jax.training.loop import train  # noqa: E402


def main(mesh: str, steps: str, workdir: str, model: str) -> None:
    if model == "fake":
        fake_model.install()
    sharding.MIN_SIZE = 1  # so that parameters as small as these are split, too
    config = get_config()
    config.mesh.update(json.loads(mesh))
    config.curriculum = ("drag",)
    config.stages.drag.update(steps=int(steps), batch_size=8, warmup_steps=1)
    config.train.update(log_every=1, checkpoint_every=1000)
    train(config, workdir)
    rows = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    print(json.dumps([json.loads(row)["loss"] for row in rows if "loss" in json.loads(row)]))


if __name__ == "__main__":
    main(*sys.argv[2:])
