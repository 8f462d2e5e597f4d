import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.parallel import fsdp
from nuwa_jax.parallel.mesh import AXES

PROGRAM = Path(__file__).with_name("fsdp_run.py")


def run(what):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), what],
        capture_output=True,
        text=True,
        cwd=PROGRAM.parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_gradients_are_scattered_as_they_are_summed():
    told = run("step")
    kinds = {}
    for kind, sizes, _ in told["collectives"]:
        kinds.setdefault(kind, []).extend(sizes)
    # Over fsdp each gradient once; over data what is left of it, a quarter.
    assert sum(kinds["reduce-scatter"]) * 4 == sum(told["trained"])
    assert max(kinds["all-reduce"]) <= max(told["trained"]) / 4
    # Forward and, at most, backward; and what is frozen.
    assert sum(told["trained"]) <= sum(kinds["all-gather"]) <= 2.5 * sum(told["trained"])


def test_several_phases_give_what_one_gives():
    for same, error in run("phases"):
        assert same
        assert error < 1e-5


def test_what_is_summed_over_many_tokens_is_gathered_exact():
    params = {"text": {"bytes": {"embedding": jnp.zeros((8, 4))}, "to_q": {"kernel": jnp.eye(4)}}}
    split = {"text": {"bytes": {"embedding": 0}, "to_q": {"kernel": 1}}}
    how = fsdp.Exchange(dtype=jnp.bfloat16, reduce_dtype=jnp.float32, rings=(None,))
    text = fsdp.boxed(params, split, how, ["text"])["text"]
    assert text["bytes"]["embedding"].how.dtype == jnp.float32
    assert text["to_q"]["kernel"].how.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which holds the TPU's compiler, is not installed",
)
def test_the_compiler_of_a_tpu_keeps_them_scattered():
    told = run("tpu")
    assert told["phases"] == 2
    whole = sum(told["trained"])
    summed = sum(
        sum(sizes)
        for kind, sizes, fused in told["collectives"]
        if kind == "all-reduce" and not fused
    )
    # The second phase, an eighth, may be summed whole where tiles do not divide.
    assert summed <= whole / 8
    gathered = sum(sum(sizes) for kind, sizes, _ in told["collectives"] if kind == "all-gather")
    assert whole <= gathered <= 1.25 * whole


def mesh_of(coords, others=1):
    chips = [SimpleNamespace(coords=c) for c in coords]
    devices = np.empty(len(chips), object)
    devices[:] = chips
    shape = (others, len(chips) // others, 1, 1)
    return SimpleNamespace(axis_names=AXES, devices=devices.reshape(shape))


def grid(*sizes):
    """Coordinates of chips, the last axis fastest."""
    return [tuple(int(i) for i in place) for place in np.ndindex(*sizes)]


def test_a_torus_is_exchanged_over_side_by_side():
    rows, columns = fsdp.rings(mesh_of(grid(4, 8)))
    assert rows == tuple(tuple(range(8 * i, 8 * i + 8)) for i in range(4))
    assert columns[:2] == ((0, 8, 16, 24), (1, 9, 17, 25))
    assert [len(ring[0]) for ring in fsdp.rings(mesh_of(grid(2, 4, 8)))] == [8, 4, 2]
    # Copies of the model beside each other: a side each.
    assert fsdp.rings(mesh_of(grid(4, 16), others=4)) == (None,)


@pytest.mark.parametrize(
    "coords",
    [grid(2, 4), [(i,) for i in range(64)], grid(4, 4)[::2] + grid(4, 4)[1::2]],
    ids=["few", "one side", "out of order"],
)
def test_other_devices_are_exchanged_over_in_one_phase(coords):
    assert fsdp.rings(mesh_of(coords)) == (None,)


def test_gradients_are_summed_in_a_dtype_that_the_config_names():
    assert fsdp.reduce_dtype("bfloat16") == jnp.bfloat16
    with pytest.raises(UserError, match=r"train.reduce_dtype must be one of .*'float16'"):
        fsdp.reduce_dtype("float16")
