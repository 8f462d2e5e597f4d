import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nuwa_jax.watching.slow_hosts import HostTimes, gather, report

ROOT = Path(__file__).parents[2]
NAMES = ["a", "b", "c", "d"]
USUAL = HostTimes(step=1.0, data=0.01, own=0.02)


def test_a_host_without_batches_is_named():
    times = np.array([USUAL, USUAL, USUAL._replace(data=0.4), USUAL])
    told = report(NAMES, times, ratio=1.25)
    assert "process 2 on c: step 1 s, without a batch 0.4 s" in told
    assert "process 0" not in told and "median of 4 processes: step 1 s" in told


def test_a_host_that_is_busy_with_itself_is_named():
    times = np.array([USUAL, USUAL._replace(own=0.5), USUAL, USUAL])
    assert "process 1 on b" in report(NAMES, times, ratio=1.25)


def test_small_differences_are_not_told():
    times = np.array([USUAL, USUAL._replace(data=0.2), USUAL._replace(own=0.001), USUAL])
    assert report(NAMES, times, ratio=1.25) is None
    assert "process 1" in report(NAMES, times, ratio=1.1)


def test_times_are_gathered_of_every_process():
    names, times = gather(USUAL)
    assert names == [socket.gethostname()[:64]]
    np.testing.assert_allclose(times, [USUAL], rtol=1e-6)


PROGRAM = """
import sys, jax, numpy as np
from nuwa_jax.watching.slow_hosts import HostTimes, gather, report
number = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, number)
with jax.transfer_guard("disallow"):  # as in the loop
    names, times = gather(HostTimes(1.0, 0.5 * number, 0.01))
assert len(names) == 2, names
print(report(names, times, 1.2))
"""


@pytest.mark.slow
def test_two_processes_agree_on_who_is_slow():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROGRAM, address]
    running = [
        subprocess.Popen([*command, number], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number in ("0", "1")
    ]
    told = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    for text in told:
        # Of two, the median lies between them.
        assert "slow hosts: process 1 on " in text and "process 0" not in text
