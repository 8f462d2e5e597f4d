"""What is done about a step whose loss or gradient is not finite: left out and told, or the end.

The step itself changes nothing then (`nuwa_jax.training.step`); here is what the loop does when it
learns of it, which is up to a few steps later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nuwa_jax.errors import UserError

POLICIES = ("skip", "stop")
_SHOWN = 16


class NonFiniteError(RuntimeError):
    """A step, or too many of them in a row, had a loss or a gradient that was not finite."""


def check_policy(policy: str) -> None:
    """Refuses what is not one of `POLICIES`.

    Raises:
      UserError: there is no such policy.
    """
    if policy not in POLICIES:
        raise UserError(f"train.non_finite must be one of {POLICIES}, got {policy!r}")


class NonFinite:
    """Looks at the metrics of every step of a stage."""

    def __init__(
        self,
        stage: str,
        *,
        policy: str,
        max_skipped: int,
        batch_size: int,
        names: Callable[[int, int], Sequence[str]],
        write: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """`POLICIES` says what may be done.

        Args:
          stage: its name.
          policy: "skip" leaves such steps out, up to `max_skipped` in a row; "stop" ends the run.
          max_skipped: see above.
          batch_size: samples per step over all hosts.
          names: of so many elements of the data, from a position on: which clips they are.
          write: keeps a row for every such step.
        """
        self._stage, self._policy, self._max = stage, policy, max_skipped
        self._batch_size, self._names, self._write = batch_size, names, write

    def look(
        self, step: int, position: int, metrics: Mapping[str, float], saved: int | None
    ) -> str | None:
        """Takes the metrics of a finished step.

        Args:
          step: from 1.
          position: in the data, of the first sample of its batch.
          metrics: `loss`, `grad_norm` and `skipped`, on the host.
          saved: step of the stage's newest checkpoint; None: it has none.

        Returns:
          What is to be told if the step was left out, else None.

        Raises:
          NonFiniteError: the run is to end.
        """
        skipped = int(metrics["skipped"])
        if not skipped:
            return None
        last = position + self._batch_size - 1
        names = list(self._names(position, min(self._batch_size, _SHOWN)))
        loss, norm = (float(metrics[name]) for name in ("loss", "grad_norm"))
        row = {"stage": self._stage, "step": step, "positions": [position, last], "clips": names}
        self._write(row | {"loss": str(loss), "grad_norm": str(norm), "in_a_row": skipped})
        unnamed = self._batch_size - len(names)
        more = f", and {unnamed} more" if unnamed else ""
        what = (
            f"loss {loss:g} and gradient norm {norm:g} on the batch of data positions {position} "
            f"to {last} ({', '.join(names)}{more})"
        )
        where = "no checkpoint" if saved is None else f"the checkpoint of step {saved}"
        if self._policy == "stop":
            raise NonFiniteError(
                f"stage {self._stage}, step {step}: {what}; {where} is from before it: look at "
                "these clips, lower the learning rate, or leave such steps out with "
                "--config.train.non_finite=skip"
            )
        if skipped > self._max:
            raise NonFiniteError(
                f"stage {self._stage}: {skipped} steps in a row up to step {step} had a loss or "
                f"gradient that is not finite and were left out, the last one with {what}; {where} "
                "was saved last: lower the learning rate or look at the data"
            )
        return f"{self._stage} {step}: left out, {what}"
