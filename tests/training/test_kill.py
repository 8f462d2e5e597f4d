"""Runs of train.py that are killed with SIGKILL and started again."""

import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from running import losses

from nuwa_jax.training.checkpoint import StageCheckpoints, load_final

HERE = Path(__file__).parent
STAGES = ("autoencoder", "text_to_video", "flow", "drag")


def command(program, workdir, steps):
    overrides = [f"--config.stages.{name}.steps={steps}" for name in STAGES]
    return [
        sys.executable,
        str(program),
        f"--config={HERE / 'micro_config.py'}",
        f"--workdir={workdir}",
        "--config.train.log_every=1",
        "--config.train.checkpoint_every=4",
        *overrides,
    ]


def run(program, workdir, steps, kill_after=None):
    """Runs to the end, or kills the run once it has logged (stage, step) or something later."""
    process = subprocess.Popen(
        command(program, workdir, steps),
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if kill_after is not None:
        place = (STAGES.index(kill_after[0]), kill_after[1])
        while process.poll() is None:
            if any((STAGES.index(stage), step) >= place for stage, step, _ in losses(workdir)):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
    output, _ = process.communicate()
    expected = 0 if kill_after is None else -signal.SIGKILL
    assert process.returncode == expected, output[-3000:]


def assert_equal_runs(first, second):
    assert losses(first) == losses(second)
    for stage in STAGES:
        jax.tree.map(
            np.testing.assert_array_equal,
            load_final(first, stage).params,
            load_final(second, stage).params,
        )


def test_a_run_killed_once_ends_as_if_it_had_not_been(tmp_path):
    program = HERE / "fake_model.py"
    run(program, tmp_path / "whole", 10)
    assert len(losses(tmp_path / "whole")) == 4 * 10
    run(program, tmp_path / "killed", 10, kill_after=("text_to_video", 6))
    run(program, tmp_path / "killed", 10)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_the_real_model_killed_three_times_in_each_stage_ends_as_if_it_had_not_been(tmp_path):
    program, steps = HERE.parents[1] / "train.py", 30
    run(program, tmp_path / "whole", steps)
    chosen = random.Random(0)
    for stage in STAGES:
        for step in sorted(chosen.sample(range(1, steps - 2), 3)):
            run(program, tmp_path / "killed", steps, kill_after=(stage, step))
    run(program, tmp_path / "killed", steps)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


class KilledRun:
    """A run with the fake model, 50 ms a batch, that is killed; what it has told until then."""

    def __init__(self, workdir, steps):
        program = HERE / "slow_run.py"
        flags = command("batches", workdir, steps)[2:]
        self._process = subprocess.Popen(
            [sys.executable, str(program), "batches", *flags],
            cwd=HERE.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.told = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        self.told.extend(self._process.stdout)

    def wait_for(self, condition):
        """False if the run has ended before."""
        while not condition():
            if self._process.poll() is not None:
                return False
            time.sleep(0.001)
        return True

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.returncode == -signal.SIGKILL, "".join(self.told)[-3000:]

    def places(self, pattern):
        """(stage, step) of every line that matches."""
        found = re.findall(pattern, "".join(list(self.told)), re.MULTILINE)
        return [(STAGES.index(stage), int(step)) for stage, step in found]


def being_written(workdir):
    return list((workdir / "stages").glob("*/*.orbax-checkpoint-tmp*"))


@pytest.mark.slow
def test_twenty_kills_during_training_and_writing_lose_nothing_that_was_reported_as_saved(tmp_path):
    """Every other kill waits for a checkpoint that is being written."""
    steps, chosen, killed = 100, random.Random(1), tmp_path / "killed"
    run(HERE / "fake_model.py", tmp_path / "whole", steps)
    reported, in_writes, mid_stage = (-1, 0), 0, 0
    for number in range(20):
        process = KilledRun(killed, steps)
        assert process.wait_for(lambda p=process: p.places(r"^(\w+) (\d+)/\d+ \| loss"))
        count = len(process.places(r"^(\w+) (\d+)/\d+ \| loss")) + chosen.randint(1, 30)
        assert process.wait_for(
            lambda p=process, c=count: len(p.places(r"^(\w+) (\d+)/\d+ \| loss")) >= c
        )
        if number % 2:
            assert process.wait_for(lambda: being_written(killed))
        time.sleep(chosen.uniform(0, 0.1))
        process.kill()
        in_writes += bool(being_written(killed))
        went_on = process.places(r"^(\w+): going on at step (\d+)")
        assert not went_on or went_on[0] >= reported
        mid_stage += bool(went_on)
        reported = max([reported, *process.places(r"^(\w+): saved step (\d+)")])
        if reported[0] >= 0:
            label = f"{reported[0]:02d}_{STAGES[reported[0]]}"
            with StageCheckpoints(killed, label) as checkpoints:
                assert checkpoints.last().step >= reported[1]
                checkpoints.verify(checkpoints.latest())
    run(HERE / "fake_model.py", killed, steps)
    assert_equal_runs(tmp_path / "whole", killed)
    print(
        f"\n20 kills, {in_writes} of them within a write; went on within a stage {mid_stage} times"
    )
    assert in_writes >= 5 and mid_stage >= 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/none.py", "--workdir=x"], "configs/none.py: there is no such file"),
        (["--config=configs/tiny.py:big", "--workdir=x"], "has no variant 'big'"),
        (["--config=configs/tiny.py", "--config.sead=1"], 'Did you mean "seed"'),
        (["--config=configs/tiny.py"], "give --workdir=DIR"),
        (["--workdir=x"], "give --config=FILE"),
    ],
)
def test_wrong_flags_are_told_in_one_line(flags, message):
    done = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_print_config_shows_the_overrides():
    done = subprocess.run(
        [sys.executable, "train.py", "--config=configs/tiny.py", "--config.seed=5"]
        + ["--print_config"],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "seed: 5" in done.stdout
