"""Runs of train.py as two real processes: joining, stopping, dying, going on."""

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import losses

from nuwa_jax.errors import UserError
from nuwa_jax.parallel.agreement import Agreement
from nuwa_jax.parallel.distributed import Launch, Plan, plan
from nuwa_jax.parallel.mesh import local_rows
from nuwa_jax.parallel.peers import LOST
from nuwa_jax.training.checkpoint import StageCheckpoints

PROGRAM = Path(__file__).with_name("hosts_run.py")
ROOT = PROGRAM.parents[2]
DEADLINE = 400  # seconds; a machine may be busy, but nothing may hang
DEADLINE_REAL = 3000  # to compile the real model, too
MESH = {"data": 2, "fsdp": -1}


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


class Job:
    """The `count` processes of one run in `workdir`."""

    def __init__(self, workdir, count, steps, *flags, model="fake", pace=0.1, mesh=MESH, devices=4):
        self.workdir = workdir
        self.deadline = DEADLINE if model == "fake" else DEADLINE_REAL
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
            "--peer_timeout=5",
            *flags,
        ]
        if count > 1:
            common += [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
        commands = [common + [f"--process_id={i}"] * (count > 1) for i in range(count)]
        self.processes = [start(command, devices) for command in commands]

    def after(self, step, index, number):
        """Sends a signal to a process once `step` is logged."""
        deadline = time.monotonic() + self.deadline
        while not any(at >= step for _, at, _ in losses(self.workdir)):
            assert all(p.poll() is None for p in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.processes[index].send_signal(number)
        return self

    def end(self):
        """(exit code, stdout, stderr) of every process."""
        try:
            told = [process.communicate(timeout=self.deadline) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, *texts) for p, texts in zip(self.processes, told, strict=True)]


def start(command, devices=4):
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environ, **pipes)


def saved(workdir):
    with StageCheckpoints(workdir, "00_drag") as checkpoints:
        return checkpoints.latest()


def codes(ends):
    return [code for code, _, _ in ends]


def assert_same_losses(workdir, alone):
    """Of every step that was logged, none left out."""
    mine, others = losses(workdir), losses(alone)
    assert [step for _, step, _ in mine] == list(range(1, len(mine) + 1))
    expected = np.array([loss for _, _, loss in others[: len(mine)]])
    np.testing.assert_allclose([loss for _, _, loss in mine], expected, rtol=1e-5)
    assert np.ptp(expected) > 0.1  # they are of different batches


def test_a_run_goes_on_with_another_number_of_hosts(tmp_path):
    """On two hosts of which one is killed, one that is told to stop, two of which one is told."""
    steps, run = 30, tmp_path / "run"
    flags = ["--config.train.checkpoint_every=1000"]
    [(code, _, told)] = Job(tmp_path / "alone", 1, steps, *flags, pace=0).end()
    assert code == 0, told

    ends = Job(run, 2, steps).after(5, 1, signal.SIGKILL).end()
    assert codes(ends) == [LOST, -signal.SIGKILL], ends
    assert "4 clips read per host" in ends[0][1]
    assert told_last(ends[0]).startswith("error: process 0")
    assert f"process 1 ({platform.node()}) was lost" in told_last(ends[0])
    killed = saved(run)
    assert killed >= 4

    ends = Job(run, 1, steps).after(len(losses(run)) + 2, 0, signal.SIGTERM).end()
    assert codes(ends) == [128 + signal.SIGTERM], ends
    assert f"going on at step {killed}" in ends[0][1]

    # Each clip is split over the hosts now, so that both read all of them.
    stopped = saved(run)
    mesh = {"data": 1, "frame": -1}
    ends = Job(run, 2, steps, mesh=mesh).after(len(losses(run)) + 2, 1, signal.SIGTERM).end()
    assert codes(ends) == [128 + signal.SIGTERM] * 2, ends
    assert f"going on at step {stopped}" in ends[0][1]
    assert f"stopped in drag after step {saved(run)}: run again" in ends[0][1]
    assert "drag" not in ends[1][1]  # process 0 alone reports

    assert stopped + 2 <= len(losses(run)) < steps
    assert_same_losses(run, tmp_path / "alone")


def test_process_1_says_that_process_0_was_killed():
    both = two_peers(0, 1000)
    both[0].kill()
    _, told = both[1].communicate(timeout=DEADLINE)
    assert both[1].returncode == LOST, told
    assert f"process 0 ({platform.node()}) was lost" in told.splitlines()[-1]
    assert "start the job again" in told.splitlines()[-1]
    both[0].communicate()


def test_the_others_say_which_process_failed():
    both = two_peers(1, 0)
    ends = [process.communicate(timeout=DEADLINE) for process in both]
    assert [process.returncode for process in both] == [LOST, 2], ends
    assert ends[1][1].splitlines()[-1] == "error: my disk is full"
    expected = f"process 1 ({platform.node()}) failed with UserError: my disk is full"
    assert expected in ends[0][1].splitlines()[-1]


def two_peers(failing, seconds):
    """Two processes, both of which have come; `failing` fails after `seconds`."""
    port = free_port()
    program = PROGRAM.with_name("peers_run.py")
    commands = [
        [str(part) for part in (sys.executable, program, port, i, seconds if i == failing else 1e3)]
        for i in range(2)
    ]
    both = [start(command) for command in commands]
    for index, process in enumerate(both):
        assert process.stdout.readline() == f"process {index} has come\n"
    return both


def told_last(end):
    return end[2].splitlines()[-1]


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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESH, {"data": 1, "frame": 2, "tensor": -1}], ids=json.dumps)
def test_two_hosts_have_the_losses_of_one_device(mesh, tmp_path):
    """With the real model, on one device and on eight of two hosts."""
    # Compiling on a busy machine may keep signs of life waiting.
    flags = ["--config.train.sample_every=10", "--peer_timeout=600"]
    alone = Job(tmp_path / "alone", 1, 20, *flags, model="real", pace=0, mesh={}, devices=1)
    together = Job(tmp_path / "together", 2, 20, *flags, model="real", pace=0, mesh=mesh)
    for job in (alone, together):
        for code, _, told in job.end():
            assert code == 0, told
    assert len(losses(tmp_path / "together")) == 20
    assert_same_losses(tmp_path / "together", tmp_path / "alone")
    for run in ("alone", "together"):
        assert len(list((tmp_path / run / "samples").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_killing_either_host_ends_the_other_and_the_run_goes_on_exactly(lost, tmp_path):
    """With the peer timeout that users have; the other one ends within a minute."""
    steps, run, flags = 16, tmp_path / "run", ["--peer_timeout=30"]
    for code, _, told in Job(tmp_path / "whole", 2, steps, pace=0).end():
        assert code == 0, told
    job = Job(run, 2, steps, *flags).after(6, lost, signal.SIGKILL)
    killed = time.monotonic()
    code, _, told = job.end()[1 - lost]
    assert code == LOST and f"process {lost} ({platform.node()}) was lost" in told, told
    assert time.monotonic() - killed < 60
    for code, _, told in Job(run, 2, steps, *flags, pace=0).end():
        assert code == 0, told
    assert losses(run) == losses(tmp_path / "whole")  # bit for bit


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_ID": "7"}
ADDRESS = "host:99"
JOINED = dict(coordinator_address=ADDRESS, num_processes=4, process_id=2)


@pytest.mark.parametrize(
    ("launch", "environ", "expected"),
    [
        (Launch(), {}, Plan({}, None, "")),  # JAX may find a pod
        (Launch(num_processes=1), SLURM, None),
        (Launch(), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (Launch(), {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (Launch(), SLURM, Plan({}, 4, "SLURM_NTASKS")),
        (Launch(num_processes=64), {}, Plan({}, 64, "--num_processes")),
        (Launch(ADDRESS, 4, 2), {}, Plan(JOINED, 4, f"--coordinator={ADDRESS}")),
        (Launch(ADDRESS), SLURM, Plan(JOINED, 4, f"--coordinator={ADDRESS}")),
        (
            Launch(ADDRESS),
            {"PMI_SIZE": "4", "PMI_RANK": "2"},
            Plan(JOINED, 4, f"--coordinator={ADDRESS}"),
        ),
        (
            Launch(),
            {"NUWA_COORDINATOR": ADDRESS, "NUWA_NUM_PROCESSES": "4", "NUWA_PROCESS_ID": "2"},
            Plan(JOINED, 4, f"--coordinator={ADDRESS}"),
        ),
        (
            Launch(),
            {"JAX_COORDINATOR_ADDRESS": ADDRESS, "NNODES": "4", "NODE_RANK": "2"},
            Plan(JOINED, 4, f"--coordinator={ADDRESS}"),
        ),
        (
            Launch(),
            {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"},
            Plan({}, 4, "TPU_WORKER_HOSTNAMES"),
        ),
    ],
)
def test_how_to_join_is_read_from_flags_and_environment(launch, environ, expected):
    assert plan(launch, environ) == expected


@pytest.mark.parametrize(
    ("launch", "environ", "message"),
    [
        (dict(coordinator=ADDRESS), {}, "give --num_processes=N and --process_id=I"),
        (dict(process_id=1, num_processes=2), {}, "give --coordinator=HOST:PORT"),
        (dict(coordinator="host"), {}, "coordinator is HOST:PORT"),
        (dict(process_id=2, num_processes=2), {}, "process_id is in 0 .. 1, got 2"),
        (dict(num_processes=0), {}, "num_processes is at least 1"),
        ({}, {"NUWA_PROCESS_ID": "one"}, "NUWA_PROCESS_ID is a number, got 'one'"),
        ({}, {"PMI_SIZE": "2", "PMI_RANK": "1"}, "not where process 0 is"),
    ],
)
def test_what_does_not_say_how_to_join_is_refused(launch, environ, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan(Launch(**launch), environ)


def test_rows_of_a_batch_may_lie_scattered_over_the_devices_of_a_host():
    class Torus:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(0, 2),), 1: (slice(4, 6),), 2: (slice(0, 2),)}

    assert local_rows(Torus(), 8) == (0, 1, 4, 5)


def test_a_process_alone_decides_at_once():
    agreement = Agreement(3.0, None)
    assert agreement.cast(signal.SIGTERM, 4.0) == {}
    assert agreement.settled(signal.SIGTERM, 4.0) == (signal.SIGTERM, 4.0)
