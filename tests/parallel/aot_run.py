"""`python -m nuwa_jax.parallel.aot` with the stand-in for the model, which compiles in seconds."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "training")]

import fake_model  # noqa: E402

from nuwa_jax.errors import run_main  # noqa: E402
from nuwa_jax.parallel import aot, sharding, topology  # noqa: E402

if __name__ == "__main__":
    fake_model.install()
    sharding.MIN_SIZE = 1  # so that parameters as small as these are split, too
    if sys.argv[1] == "little-memory":
        chip = topology.CHIPS["v5e"]
        topology.CHIPS["v5e"] = topology.dataclasses.replace(chip, memory=2**10)
    aot.define_flags()
    sys.argv[1:] = sys.argv[2:]
    run_main(aot.main)
