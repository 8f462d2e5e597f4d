"""Runs of train.py as two real processes: joining, stopping, dying, going on."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nuwa_jax.parallel.peers import LOST
from nuwa_jax.training.checkpoint import StageCheckpoints

PROGRAM = Path(__file__).with_name("hosts_run.py")
ROOT = PROGRAM.parents[2]
DEADLINE = 400  # seconds; a machine may be busy, but nothing may hang
MESH = {"data": 2, "fsdp": -1}


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


class Job:
    """The processes of one run in `workdir`, `count` of them with four devices each."""

    def __init__(self, workdir, count, steps, *flags, model="fake", pace=0.1, mesh=MESH):
        self.workdir = workdir
        common = [
            *(str(part) for part in (sys.executable, PROGRAM, model, pace)),
            f"--config={ROOT}/tests/training/micro_config.py",
            f"--workdir={workdir}",
            "--config.curriculum=('drag',)",
            f"--config.stages.drag.steps={steps}",
            "--config.stages.drag.batch_size=8",
            "--config.train.log_every=1",
            "--config.train.checkpoint_every=4",
            *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
            *flags,
        ]
        if count > 1:
            common += [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
            common += ["--peer_timeout=5"]
        commands = [common + [f"--process_id={i}"] * (count > 1) for i in range(count)]
        self.processes = [start(command) for command in commands]

    def after(self, step, index, number):
        """Sends a signal to a process once `step` is logged."""
        deadline = time.monotonic() + DEADLINE
        while not any(at >= step for at, _ in rows(self.workdir)):
            assert all(p.poll() is None for p in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.processes[index].send_signal(number)
        return self

    def end(self):
        """(exit code, stdout, stderr) of every process."""
        told = [process.communicate(timeout=DEADLINE) for process in self.processes]
        return [(p.returncode, *texts) for p, texts in zip(self.processes, told, strict=True)]


def start(command):
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environ, **pipes)


def rows(workdir):
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # being written
        found.append((row["step"], row["loss"]))
    return found


def saved(workdir):
    with StageCheckpoints(workdir, "00_drag") as checkpoints:
        return checkpoints.latest()


def codes(ends):
    return [code for code, _, _ in ends]


def assert_same_losses(workdir, alone):
    mine, others = rows(workdir), rows(alone)
    assert [step for step, _ in mine] == [step for step, _ in others]
    losses = np.array([loss for _, loss in others])
    np.testing.assert_allclose([loss for _, loss in mine], losses, rtol=1e-5)
    assert np.ptp(losses) > 0.1  # they are of different batches


def test_a_run_stopped_and_killed_goes_on_with_other_numbers_of_hosts(tmp_path):
    """Two hosts, one, two, two, one; each time after another kind of end."""
    steps = 24
    [(code, _, told)] = Job(tmp_path / "alone", 1, steps, pace=0).end()
    assert code == 0, told
    run = tmp_path / "run"

    ends = Job(run, 2, steps).after(2, 1, signal.SIGTERM).end()
    assert codes(ends) == [128 + signal.SIGTERM] * 2, ends
    first = saved(run)
    assert f"stopped in drag after step {first}: run again" in ends[0][1]
    assert "4 clips read per host" in ends[0][1]
    assert not [line for line in ends[1][1].splitlines() if not line.startswith("[Gloo]")]
    assert 2 <= first < steps // 2

    ends = Job(run, 1, steps).after(first + 2, 0, signal.SIGTERM).end()
    assert codes(ends) == [128 + signal.SIGTERM], ends
    assert f"going on at step {first}" in ends[0][1]

    step = saved(run)
    for lost in (1, 0):
        ends = Job(run, 2, steps).after(step + 2, lost, signal.SIGKILL).end()
        assert codes(ends)[lost] == -signal.SIGKILL
        code, _, told = ends[1 - lost]
        assert code == LOST, told
        assert f"process {lost} ({platform.node()}) was lost" in told.replace("\n", " ")
        assert "start the job again" in told.splitlines()[-1]
        step = max(at for at, _ in rows(run))

    [(code, _, told)] = Job(run, 1, steps).end()
    assert code == 0, told
    assert_same_losses(run, tmp_path / "alone")


def test_processes_that_differ_are_refused(tmp_path):
    flags = ["--coordinator", f"localhost:{free_port()}", "--num_processes=2"]
    command = [sys.executable, PROGRAM, "fake", "0", f"--workdir={tmp_path}"]
    command += [f"--config={ROOT}/tests/training/micro_config.py", *flags]
    both = [
        start([*map(str, command), f"--process_id={i}", f"--config.train.clip_norm={1 + i}"])
        for i in range(2)
    ]
    for process in both:
        _, told = process.communicate(timeout=DEADLINE)
        assert process.returncode == 2, told
        expected = f"process 1 ({platform.node()}): config.train.clip_norm is 2.0, of process 0 1.0"
        assert expected in told.splitlines()[-1]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_join_that_fails_is_an_error(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}"]
    command += [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--process_id=1"]
    process = start([*command, "--join_timeout=1"])
    _, told = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2, told
    assert "process 1 of 2 could not join the others" in told.splitlines()[-1]
    assert not list(tmp_path.iterdir())
