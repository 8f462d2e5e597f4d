"""Trains a small model on a mesh of virtual CPU devices; the last line tells of it as JSON.

python mesh_run.py DEVICES MESH_AS_JSON STEPS WORKDIR real|small|fake [BATCHES_AFTER_WHICH_TO_DIE]
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

from nuwa_jax.data.pipeline import Batches  # noqa: E402
from nuwa_jax.parallel import sharding  # noqa: E402
from nuwa_jax.training import loop  # noqa: E402


class Died(Exception):
    pass


def main(mesh: str, steps: str, workdir: str, model: str, die_after: str = "0") -> None:
    if model == "fake":
        fake_model.install()
    sharding.MIN_SIZE = 1  # so that parameters as small as these are split, too
    split = watch_state()
    die_in(int(die_after))
    config = get_config("small" if model == "small" else None)
    config.mesh.update(json.loads(mesh))
    config.curriculum = ("drag",)
    config.stages.drag.update(steps=int(steps), batch_size=8, warmup_steps=1)
    # Of the real layers, whose many arrays take as long to save as to train, the last step alone.
    config.train.update(log_every=1, checkpoint_every=2 if model == "fake" else int(steps))
    try:
        loop.train(config, workdir)
    except Died:
        pass
    rows = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row) for row in rows if "loss" in json.loads(row)]
    told = {name: [step[name] for step in steps] for name in ("loss", "grad_norm")}
    print(json.dumps(told | {"split": split[-1]}))


def watch_state() -> list[int]:
    """After each step, how many arrays of the state that it returns lie on several devices."""
    split = []
    make = loop.make_train_step

    def make_watched(*args):
        step = make(*args)

        def watched(*args):
            state, metrics = step(*args)
            leaves = jax.tree.leaves(state)
            if not isinstance(leaves[0], jax.core.Tracer):  # else its FLOPs are being counted
                split.append([leaf.sharding.is_fully_replicated for leaf in leaves].count(False))
            return state, metrics

        return watched

    loop.make_train_step = make_watched
    return split


def die_in(count: int) -> None:
    draw, drawn = Batches.__next__, []

    def dying(batches):
        drawn.append(0)
        if len(drawn) == count:
            raise Died
        return draw(batches)

    Batches.__next__ = dying


if __name__ == "__main__":
    main(*sys.argv[2:])
