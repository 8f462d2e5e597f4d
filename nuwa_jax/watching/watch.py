"""All that watches a training run, as the loop uses it: one object per run, one per stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from nuwa_jax.errors import UserError
from nuwa_jax.watching.goodput import Goodput, Place
from nuwa_jax.watching.mfu import Mfu, peak_of
from nuwa_jax.watching.non_finite import check_policy
from nuwa_jax.watching.profile import ProfileWindow
from nuwa_jax.watching.slow_hosts import HostTimes, gather, report
from nuwa_jax.watching.watchdog import Watchdog

Say = Callable[[str], None]


class Interval(NamedTuple):
    """What happened since the last logged step.

    Attributes:
      data_wait: share of the time in which the device had no batch.
      mfu: of the steps and the waiting for data; None where it is not known.
      goodput: of the whole run so far.
    """

    data_wait: float
    mfu: float | None
    goodput: float


class RunWatch:
    """Goodput and watchdog of a run; a context that tells the goodput at its end."""

    def __init__(self, train: Any, workdir: str | Path, say: Say, *, write: bool) -> None:
        """Nothing is written before a stage begins.

        Args:
          train: `config.train`.
          workdir: of the run; gets goodput.json, stacks/ and profile/.
          say: prints a line.
          write: whether this process is the one that writes what all share.

        Raises:
          UserError: an entry of the config makes no sense.
        """
        self.train, self.workdir, self.say, self.write = train, Path(workdir), say, write
        if train.slow_hosts_every < 0 or not train.slow_host_ratio > 1:
            raise UserError(
                "train.slow_hosts_every is at least 0 (logged lines; 0: never) and "
                f"train.slow_host_ratio greater than 1, got {train.slow_hosts_every} and "
                f"{train.slow_host_ratio}"
            )
        check_policy(train.non_finite)
        peak_of("", train.peak_flops)
        ProfileWindow("", train.profile_steps)
        self.goodput = Goodput(self.workdir / "goodput.json" if write else None)
        self.watchdog = Watchdog(
            self.workdir / "stacks", seconds=train.watchdog_seconds, abort=train.watchdog_abort
        )
        self._ran = False

    def __enter__(self) -> RunWatch:
        self.watchdog.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.__exit__()
        if self._ran:
            self.goodput.note()
            self.say(str(self.goodput))

    def stage(self, name: str, label: str, mesh: Mesh, place: Place | None) -> StageWatch:
        """Begins a stage, or goes on with it.

        Args:
          name: of the stage.
          label: of its folder.
          mesh: that its steps run on.
          place: of the checkpoint that it begins from; None: of none.
        """
        self._ran = True
        self.goodput.resume(place)
        return StageWatch(self, name, label, mesh)


class StageWatch:
    """Watches the steps of one stage."""

    def __init__(self, run: RunWatch, name: str, label: str, mesh: Mesh) -> None:
        self._run, self._name, self._mesh = run, name, mesh
        self._profile = ProfileWindow(
            run.workdir / "profile" / label, run.train.profile_steps if run.write else (0, 0)
        )
        self._mfu: Mfu | None = None
        self._lines = 0
        self._on_device = 0.0  # seconds in which the host waited for its devices
        self._mark = self._now()
        self._gathered = (0, self._mark)  # step and times when hosts were compared last

    @contextlib.contextmanager
    def loop(self) -> Iterator[None]:
        """Around the loop: time counts as steps, and transfers that nobody wrote are errors."""
        try:
            with self._run.goodput.phase("step"), jax.transfer_guard("disallow"):
                yield
        finally:
            self._run.watchdog.rest()
            self._say(self._profile.close())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something other than a step (see `goodput.PHASES`), which may transfer as it likes."""
        run = self._run
        with run.goodput.phase(name), run.watchdog.off(), jax.transfer_guard("allow"):
            yield

    @contextlib.contextmanager
    def waiting(self, metrics: Any) -> Iterator[None]:
        """Waiting for a batch; `metrics` are of the last step given to the device, if any."""

        def busy() -> bool:
            return metrics is not None and not metrics["loss"].is_ready()

        with self._run.goodput.waiting(busy):
            yield

    def call(self, step: Callable[..., Any], number: int, *args: Any) -> Any:
        """`step(*args)`, the step `number` (from 0) of the stage; the first one is compiled."""
        with self._profile.step(number):
            if self._mfu is not None:
                return step(*args)
            # In the mesh that the step itself enters, so that it is traced once for both.
            with self.phase("compile"), jax.set_mesh(self._mesh):
                devices = list(self._mesh.devices.flat)
                given = self._run.train.peak_flops
                self._mfu = Mfu.of_step(step, *args, devices=devices, given=given)
                self._say(str(self._mfu))
                out = step(*args)
            self._beat(number + 1)
            return out

    def fetch(self, metrics: Any) -> Any:
        """The metrics on the host; waits until their step has ended."""
        start = time.monotonic()
        metrics = jax.device_get(metrics)
        self._on_device += time.monotonic() - start
        return metrics

    def finished(self, step: int) -> None:
        """Step `step` (from 1) has ended."""
        self._beat(step + 1)
        self._say(self._profile.finished())

    def mark(self) -> None:
        """The next `interval` begins here."""
        self._mark = self._now()

    def interval(self, steps: int) -> Interval:
        """What happened since the last one, or `mark`, in which `steps` steps ended."""
        since, self._mark = self._mark, self._now()
        gone = {name: value - since[name] for name, value in self._mark.items()}
        seconds = sum(gone.values()) - gone["on_device"]
        worked = gone["step"] + gone["data"]
        return Interval(
            data_wait=gone["data"] / seconds if seconds > 0 else 0.0,
            mfu=self._mfu.of(worked / steps) if steps and self._mfu else None,
            goodput=self._run.goodput.share,
        )

    def logged(self, step: int) -> None:
        """A line of step `step` was logged: all processes are here, and each calls this."""
        run = self._run
        run.goodput.note()
        self._lines += 1
        every = run.train.slow_hosts_every
        if jax.process_count() == 1 or not every or self._lines % every:
            return
        (last, since), now = self._gathered, self._now()
        self._gathered = (step, now)
        each = {name: (now[name] - since[name]) / max(1, step - last) for name in now}
        times = HostTimes(
            each["step"] + each["data"], each["data"], max(0.0, each["step"] - each["on_device"])
        )
        self._say(report(*gather(times), run.train.slow_host_ratio))

    def saving(self, place: Place) -> contextlib.AbstractContextManager:
        """Around the writing of the checkpoint of `place`."""
        self._run.goodput.saving(place)
        return self.phase("checkpoint")

    def _now(self) -> dict[str, float]:
        return self._run.goodput.seconds | {"on_device": self._on_device}

    def _beat(self, number: int) -> None:
        self._run.watchdog.beat(f"step {number} of stage {self._name}")

    def _say(self, text: str | None) -> None:
        if text is not None:
            self._run.say(text)
