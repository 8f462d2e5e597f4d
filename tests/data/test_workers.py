"""Worker processes live as long as the run wants batches, and no longer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import alive

PROGRAM = Path(__file__).with_name("workers_run.py")
DEADLINE = 120


class Run:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def do(self, what):
        """The workers that are there after it."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return [int(pid) for pid in self.process.stdout.readline().split()]


@pytest.fixture
def run():
    run = Run()
    yield run
    try:
        os.killpg(run.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    run.process.communicate()


def wait_until_gone(pid):
    end = time.monotonic() + DEADLINE
    while alive(pid):
        assert time.monotonic() < end, f"{pid} is still there"
        time.sleep(0.05)


def test_a_signal_to_all_leaves_the_run_its_batches_until_it_closes_them_or_is_killed(run):
    (worker,) = run.do("draw")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.killpg(run.process.pid, number)
        assert run.do("draw") == [worker]
    assert run.do("close") == []
    assert not alive(worker)
    (worker,) = run.do("draw")
    run.process.kill()
    wait_until_gone(worker)


@pytest.mark.slow
def test_workers_end_with_a_run_that_closes_nothing(run):
    (worker,) = run.do("draw")
    run.process.stdin.write("end\n")
    run.process.stdin.flush()
    assert run.process.wait(DEADLINE) == 0
    assert not alive(worker)
