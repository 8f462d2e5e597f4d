"""Steps on the CPU take the memory of the step before, in place of new pages of the system's."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nuwa_jax.host_memory import computes_on_host, keep_host_memory

PROGRAM = """
import json, resource, sys
import jax, jax.numpy as jnp
from nuwa_jax.host_memory import keep_host_memory

kept = keep_host_memory() if sys.argv[1] == "keep" else None
step = jax.jit(lambda x: jnp.cos(jnp.tile(x, (64, 1))))  # 64 MB
x, faults = jnp.ones((512, 512)), []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, sum(faults[1:])]))
"""


def run(how):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_a_step_takes_no_new_pages_where_memory_is_kept():
    told, without = run("as it is")
    assert told is None
    assert without > 15 * 10_000  # pages of 4 KB
    kept, faults = run("keep")
    assert kept is True
    assert faults < without / 2  # the heap still grows a few times, until every array has a place


@pytest.mark.parametrize("platforms", ["tpu", "cuda,cpu", "tpu,cpu"])
def test_programs_of_an_accelerator_are_left_alone(platforms, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert not computes_on_host()
    assert not keep_host_memory()


def test_what_is_installed_tells_where_nothing_else_does(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert computes_on_host()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert not computes_on_host()
