import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import alive

from nuwa_jax.errors import UserError
from nuwa_jax.watching import watchdog as watchdog_module
from nuwa_jax.watching.watchdog import EXIT_STALLED, FLOOR_SECONDS, SLACK, Watchdog

ROOT = Path(__file__).parents[2]
DEADLINE = 60  # seconds after which a test that waits has failed


def wait_for(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_step_that_takes_too_long_is_told_with_all_stacks(tmp_path, capfd):
    release = threading.Event()

    def hang_here():
        release.wait(DEADLINE)

    hanging = threading.Thread(target=hang_here)
    hanging.start()
    stacks = tmp_path / "stacks_0.txt"
    with Watchdog(tmp_path, seconds=0.2) as watchdog:
        watchdog.beat("step 7 of stage drag")
        wait_for(lambda: stacks.exists() and "hang_here" in stacks.read_text())
        release.set()
        watchdog.beat("step 8 of stage drag")
    hanging.join()
    told = stacks.read_text()
    assert "process 0 of 1 on host " in told and "step 7 of stage drag has taken" in told
    assert "test_a_step_that_takes_too_long" in told  # the main thread's stack, too
    shown = capfd.readouterr().err
    assert "hang_here" in shown and "step 7 of stage drag went on after" in shown


def test_what_is_not_a_step_may_take_longer(tmp_path):
    with Watchdog(tmp_path, seconds=1.0) as watchdog:
        time.sleep(1.3)  # compiling: no step has ended yet
        watchdog.beat("step 1")
        with watchdog.off():
            time.sleep(1.3)  # a checkpoint
        watchdog.rest()
        time.sleep(1.3)  # the stage has ended
        assert not list(tmp_path.iterdir())
        watchdog.beat("step 2")
        wait_for(lambda: list(tmp_path.iterdir()))


def test_the_limit_follows_the_median_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog(tmp_path)  # not started: nothing waits
    assert watchdog.limit == FLOOR_SECONDS
    for seconds in (0, 50, 60, 1000):
        now[0] += seconds
        watchdog.beat("step")
    assert watchdog.limit == SLACK * 60
    with watchdog.off():
        now[0] += 10_000
    now[0] += 60
    watchdog.beat("step")  # without what was off
    assert watchdog.limit == SLACK * 60


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(UserError, match="train.watchdog_seconds"):
        Watchdog(tmp_path, seconds=-1.0)


def test_a_process_that_hangs_can_be_ended(tmp_path):
    program = f"""
import multiprocessing, threading, time
from nuwa_jax.watching.watchdog import Watchdog
worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,))
worker.start()
print(worker.pid, flush=True)
with Watchdog({str(tmp_path)!r}, seconds=0.2, abort=True) as watchdog:
    watchdog.beat("step 3 of stage flow")
    threading.Event().wait({DEADLINE})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == EXIT_STALLED
    assert "step 3 of stage flow has taken" in done.stderr
    assert f"exit code {EXIT_STALLED}" in done.stderr
    assert "threading.py" in (tmp_path / "stacks_0.txt").read_text()
    wait_for(lambda: not alive(int(done.stdout)))


def test_a_disk_that_fails_does_not_end_the_watchdog(tmp_path, capfd):
    (tmp_path / "stacks").write_text("a file where a folder should be")
    shown = ""
    with Watchdog(tmp_path / "stacks", seconds=0.1) as watchdog:
        for step in (7, 8):
            watchdog.beat(f"step {step}")
            end = time.monotonic() + DEADLINE
            while f"step {step} has taken" not in shown or shown.count("are not in") < step - 6:
                assert time.monotonic() < end, shown
                time.sleep(0.01)
                shown += capfd.readouterr().err
    assert "File exists" in shown or "Not a directory" in shown


def test_a_disk_that_hangs_holds_up_neither_the_steps_nor_the_end(tmp_path, capfd, monkeypatch):
    release, codes = threading.Event(), []
    monkeypatch.setattr(watchdog_module, "WRITE_SECONDS", 1.0)
    monkeypatch.setattr(watchdog_module, "_write_stacks", lambda *_: release.wait(DEADLINE))
    monkeypatch.setattr(watchdog_module, "leave", codes.append)
    shown = ""
    with Watchdog(tmp_path, seconds=0.1, abort=True) as watchdog:
        watchdog.beat("step 7")
        end = time.monotonic() + DEADLINE
        while "step 7 has taken" not in shown:
            assert time.monotonic() < end, shown
            time.sleep(0.01)
            shown += capfd.readouterr().err
        watchdog.beat("step 8")  # while the file is being written: not held up
        wait_for(lambda: codes)
    release.set()
    shown += capfd.readouterr().err
    assert codes[0] == EXIT_STALLED and "has not answered" in shown
    assert shown.index("step 7 has taken") < shown.index("step 8 has taken")
    assert shown.index("went on after") < shown.index("has not answered")
