"""What a run tells while it runs: one line per logged step, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from nuwa_jax.training.curriculum import Stage
from nuwa_jax.training.writers import MetricsFile, TensorBoard
from nuwa_jax.watching.watch import Interval, StageWatch
from nuwa_jax.watching.words import duration


class Progress:
    """Reports one stage.

    Time is measured from the first step that this process has finished: compiling is not training,
    and a time budget should buy as much of it on a slow machine as on a quick one.
    """

    def __init__(
        self,
        workdir: str | Path,
        stages: Sequence[Stage],
        stage: Stage,
        *,
        log_every: int,
        first_step: int,
        elapsed: float,
        window: Sequence[float],
        watch: StageWatch,
        write: bool = True,
    ) -> None:
        """Starts reporting at `first_step`.

        Args:
          workdir: of the run.
          stages: the whole curriculum.
          stage: the one that is running.
          log_every: steps between lines.
          first_step: steps of the stage that are done already.
          elapsed: seconds that the stage has trained before.
          window: losses since the last line, from the checkpoint.
          watch: knows where the time goes.
          write: whether this process is the one that writes.
        """
        self.window = list(window)
        self._stage, self._log_every, self._write = stage, log_every, write
        self._later = [s for s in stages if s.index > stage.index]
        self._before, self._start = elapsed, None
        self._mark: tuple[int, float] | None = None  # step and time of the last line
        self._watch = watch
        if write:
            workdir = Path(workdir)
            self._metrics = MetricsFile(workdir / "metrics.jsonl")
            earlier = [s.name for s in stages if s.index < stage.index]
            self._metrics.cut(earlier, stage.name, first_step)
            self._board = TensorBoard(workdir / "tensorboard" / stage.label, first_step + 1)

    @property
    def elapsed(self) -> float:
        """Seconds that the stage has trained, over all restarts."""
        return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

    def step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes the metrics of a finished step; on every `log_every`-th, reports.

        Returns:
          Whether it was such a step; the same on all processes.
        """
        if np.isfinite(metrics["loss"]):
            self.window.append(float(metrics["loss"]))
        now = time.monotonic()
        if self._mark is None:
            self._mark, self._start = (step, now), now
            self._watch.mark()
        if step % self._log_every and step != self._stage.steps:
            return False
        steps, seconds = step - self._mark[0], now - self._mark[1]
        rate = steps / seconds if steps and seconds > 0 else float("nan")
        loss = float(np.mean(self.window)) if self.window else float("nan")
        self.window, self._mark = [], (step, now)
        interval = self._watch.interval(steps)
        if self._write:
            self._report(step, loss, rate, interval, metrics)
        return True

    def video(self, tag: str, video: UInt8[np.ndarray, "b t h w 3"], fps: float, step: int) -> None:
        """Shows clips on TensorBoard."""
        if self._write:
            self._board.video(tag, video, fps, step)

    def close(self) -> None:
        """Writes what is buffered."""
        if self._write:
            self._board.close()

    def _report(
        self, step: int, loss: float, rate: float, interval: Interval, metrics: Mapping[str, float]
    ) -> None:
        stage = self._stage
        extra = {k: float(v) for k, v in metrics.items() if k not in ("loss", "skipped")}
        extra["skipped"] = int(metrics["skipped"])
        pace = {
            "steps_per_second": rate,
            "data_wait": interval.data_wait,
            "goodput": interval.goodput,
        }
        if interval.mfu is not None:
            pace["mfu"] = interval.mfu
        row = {"stage": stage.name, "step": step, "loss": loss, **extra, **pace}
        self._metrics.write(row | {"elapsed": self.elapsed})
        scalars = {"loss": loss, **extra, **pace}
        self._board.scalars({k: v for k, v in scalars.items() if np.isfinite(v)}, step)
        left = self._left(stage, stage.steps - step, rate, self.elapsed)
        # Later stages are taken to cost as much per sample as this one, for want of better.
        rest = sum(
            self._left(s, s.steps, rate * stage.batch_size / s.batch_size, 0.0) for s in self._later
        )
        known = np.isfinite(left + rest)
        times = (
            f"{duration(left)} left, all {duration(left + rest)}"
            if known
            else "time left not known yet"
        )
        speed = f"{rate:.3g} steps/s" if np.isfinite(rate) else "compiled"
        mfu = "" if interval.mfu is None else f" | MFU {interval.mfu:.1%}"
        skipped = f" | {extra['skipped']} steps skipped" if extra["skipped"] else ""
        print(
            f"{stage.name} {step}/{stage.steps} | loss {loss:.4g} | {speed} | {times} | "
            f"data wait {interval.data_wait:.0%}{mfu} | goodput {interval.goodput:.0%}{skipped}",
            flush=True,
        )

    @staticmethod
    def _left(stage: Stage, steps: int, rate: float, elapsed: float) -> float:
        by_steps = steps / rate
        if not stage.time_budget_minutes:
            return by_steps
        by_clock = 60 * stage.time_budget_minutes - elapsed
        return min(by_steps, by_clock) if np.isfinite(by_steps) else by_clock
