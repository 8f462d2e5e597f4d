"""Signals that come while something long is running."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel
from micro_config import get_config

from nuwa_jax.errors import StoppedBySignal, report
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.training.checkpoint import StageCheckpoints, load_final
from nuwa_jax.training.loop import train
from nuwa_jax.training.stopping import Stop, Stopped

HERE = Path(__file__).parent
GRACE = 60  # seconds that a machine which is taken away leaves
DEADLINE = 300


@pytest.fixture
def drag_config(monkeypatch):
    monkeypatch.setattr(VideoLDM, "from_config", lambda config: FakeModel())
    config = get_config()
    config.curriculum = ("drag",)
    config.train.log_every = 1
    return config


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_call_gives_what_the_function_gives():
    stop = Stop()
    assert stop.call(lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        stop.call(lambda: 1 // 0)


def test_a_call_is_left_behind_when_the_run_is_to_stop():
    stop, release = Stop(), threading.Event()

    def function():
        stop.signal = signal.SIGTERM
        release.wait(DEADLINE)

    with pytest.raises(Stopped):
        stop.call(function)
    release.set()
    with pytest.raises(Stopped):
        stop.call(pytest.fail, "nothing is begun any more")


def test_sigterm_while_sampling_saves_the_step_and_leaves_the_sampler(tmp_path, drag_config):
    release = threading.Event()

    def sample(params, stage):
        send_sigterm()
        release.wait(DEADLINE)
        return np.zeros((1, 3, 16, 24, 3), np.uint8)

    drag_config.train.update(sample_every=4, checkpoint_every=3)
    try:
        result = train(drag_config, tmp_path, sample)
    finally:
        release.set()
    assert (result.step, result.signal) == (4, signal.SIGTERM)
    assert load_final(tmp_path).step == 4
    assert not (tmp_path / "samples").exists()


def test_sigterm_while_compiling_leaves_at_once_with_the_checkpoint_there_is(
    tmp_path, drag_config, monkeypatch
):
    drag_config.train.checkpoint_every = 3

    def sample(params, stage):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(drag_config.train, "sample_every", 4)
        train(drag_config, tmp_path, sample)
    release, plain = threading.Event(), FakeModel.denoise

    def denoise(*args):
        send_sigterm()
        release.wait(DEADLINE)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(FakeModel, "denoise", denoise)
        try:
            result = train(drag_config, tmp_path)
        finally:
            release.set()
    assert (result.step, result.signal) == (3, signal.SIGTERM)
    with StageCheckpoints(tmp_path, "00_drag") as checkpoints:
        assert checkpoints.latest() == 3
    assert train(drag_config, tmp_path).step == 6


def test_sigterm_while_a_checkpoint_is_compared_ends_at_once(tmp_path, drag_config, monkeypatch):
    drag_config.stages.drag.steps = 2
    train(drag_config, tmp_path)
    release = threading.Event()

    def last(*args):
        send_sigterm()
        release.wait(DEADLINE)

    monkeypatch.setattr(StageCheckpoints, "last", last)
    try:
        result = train(drag_config, tmp_path)
    finally:
        release.set()
    assert (result.step, result.signal) == (2, signal.SIGTERM)


def test_sigterm_to_one_of_several_before_the_first_step_is_told_as_that(
    tmp_path, drag_config, monkeypatch, capsys
):
    def init(*args, **kwargs):
        send_sigterm()
        threading.Event().wait(1)

    monkeypatch.setattr(FakeModel, "init", init)
    # What follows is of the loop alone, which asks whether it is alone when it is to stop.
    monkeypatch.setattr("nuwa_jax.training.loop.check_same_program", lambda *args: None)
    monkeypatch.setattr("nuwa_jax.training.loop.check_same", lambda *args: None)
    last = StageCheckpoints.last

    def count_two(*args):
        monkeypatch.setattr("jax.process_count", lambda: 2)
        return last(*args)

    monkeypatch.setattr(StageCheckpoints, "last", count_two)
    with pytest.raises(StoppedBySignal) as caught:
        train(drag_config, tmp_path)
    assert report(caught.value) == 128 + signal.SIGTERM
    assert "stopped: signal 15 came before stage drag went on" in capsys.readouterr().err


def stop_run(workdir, part):
    """Sends SIGTERM to a run in its slow part; returns seconds to its end, and what it told."""
    flags = [f"--config={HERE / 'micro_config.py'}", f"--workdir={workdir}"]
    flags += ["--config.curriculum=('drag',)", "--config.train.log_every=1"]
    flags += ["--config.stages.drag.steps=400", "--config.train.checkpoint_every=5"]
    if "sampl" in part or part == "native":
        flags.append("--config.train.sample_every=7")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "slow_run.py"), part, *flags],
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = []
    mark = "drag 3/" if part == "steps" else "slow part"
    for line in process.stdout:
        told.append(line)
        if mark in line:
            break
    assert told and mark in told[-1], "".join(told)
    time.sleep(2)  # well into it
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    told += process.communicate(timeout=DEADLINE)[0].splitlines(keepends=True)
    seconds = time.monotonic() - start
    assert process.returncode == 128 + signal.SIGTERM, "".join(told)
    return seconds, "".join(told)


@pytest.mark.slow
@pytest.mark.parametrize("again", range(3))
@pytest.mark.parametrize(
    "part", ["steps", "trace", "compile", "sampler", "native", "sampler_compile"]
)
def test_sigterm_ends_a_run_in_time_whatever_it_is_doing(tmp_path, part, again):
    compiling = part in ("trace", "compile")
    if compiling:  # there is something to go on from
        before = tmp_path / "before"
        stop_run(before, "sampler")
        tmp_path = before
    seconds, told = stop_run(tmp_path, part)
    print(f"\n{part}: {seconds:.1f} s")
    assert seconds < GRACE
    with StageCheckpoints(tmp_path, "00_drag") as checkpoints:
        meta = checkpoints.last()
    if compiling:
        assert meta.step == 7 and f"stopped in drag after step {meta.step}:" in told
    elif part == "steps":
        assert meta.step >= 3 and f"drag: saved step {meta.step}" in told
    else:
        assert meta.step == 7 and "drag: saved step 7" in told
