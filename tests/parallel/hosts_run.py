"""Runs train.py with the model "fake" or "real", as one process of perhaps several.

python hosts_run.py fake|real SECONDS_BEFORE_EACH_BATCH FLAGS

How many CPU devices it has is in the environment, JAX_NUM_CPU_DEVICES.
"""

import runpy
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "training")]

import fake_model  # noqa: E402

from nuwa_jax.data.pipeline import Batches  # noqa: E402
from nuwa_jax.parallel import sharding  # noqa: E402


def slow_down(seconds: float) -> None:
    """So that what is sent to a process finds it in the middle of a run."""
    draw = Batches.__next__

    def slow(batches):
        time.sleep(seconds)
        return draw(batches)

    Batches.__next__ = slow


if __name__ == "__main__":
    _, model, seconds, *arguments = sys.argv
    if model == "fake":
        fake_model.install()
    slow_down(float(seconds))
    sharding.MIN_SIZE = 1  # so that parameters as small as these are split, too
    sys.argv = [str(TESTS.parent / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
