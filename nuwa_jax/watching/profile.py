"""A window of steps of which JAX's profiler keeps a trace, for TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import jax

from nuwa_jax.errors import UserError


class ProfileWindow:
    """Traces steps `start` .. `start + count - 1`, counted from 0 in this process and stage.

    So it is of no matter where a run goes on, and compiling (step 0) is left out by `start` >= 1.
    """

    def __init__(self, folder: str | Path, window: Sequence[int]) -> None:
        """`window` is (start, count); a count of 0 traces nothing.

        Raises:
          UserError: they are no such numbers.
        """
        window = tuple(window)
        if len(window) != 2 or any(n != int(n) or n < 0 for n in window):
            raise UserError(
                "train.profile_steps must be (first step, number of steps), (0, 0) for none, got "
                f"{window}"
            )
        self._folder = Path(folder)
        self._start, self._count = (int(n) for n in window)
        self._begun, self._ended = 0, 0
        self._tracing = False

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Around the call of a step; `number` is told in the trace."""
        begun, self._begun = self._begun, self._begun + 1
        if self._count and begun == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def finished(self) -> str | None:
        """A step has ended on the device; says where the trace is if it was the window's last."""
        self._ended += 1
        if self._tracing and self._ended >= self._start + self._count:
            return self.close()
        return None

    def close(self) -> str | None:
        """Ends the trace, also of a window that is not over."""
        if not self._tracing:
            return None
        self._tracing = False
        jax.profiler.stop_trace()
        steps = self._ended - self._start
        return f"profile of {steps} steps: {self._folder} (tensorboard, or perfetto.dev)"
