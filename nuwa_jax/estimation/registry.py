"""Which trackers and flow estimators there are, by the name that a user gives.

Looking one up imports what it needs and no more: `lk_dis` runs in processes that never import JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nuwa_jax.errors import UserError
from nuwa_jax.motion.estimators import DISFlow, FlowEstimator, LucasKanadeTracker, PointTracker


class Estimators(NamedTuple):
    """What follows points and what estimates dense flow. Their names tell version and weights."""

    tracker: PointTracker
    flow: FlowEstimator


def load_estimators(name: str = "lk_dis", weights: str = "") -> Estimators:
    """The tracker and the flow estimator of a backend.

    Args:
      name: one of `BACKENDS`. `lk_dis`: OpenCV's Lucas-Kanade and DIS, which need no weights.
        `gmflow`: GMFlow, and tracks along its flow. `tapir`: TAPIR or BootsTAPIR, and DIS.
      weights: path of its weights, where it has any.

    Raises:
      UserError: there is no such backend, or its weights are missing, superfluous or not its own.
    """
    if name not in BACKENDS:
        raise UserError(f"there is no motion estimator {name!r}: choose one of {list(BACKENDS)}")
    return BACKENDS[name](weights)


def _lk_dis(weights: str) -> Estimators:
    if weights:
        raise UserError(f"lk_dis has no weights to read from {weights}: leave them out")
    return Estimators(LucasKanadeTracker(), DISFlow())


def _gmflow(weights: str) -> Estimators:
    if not weights:
        raise UserError("gmflow needs its weights: give the file that nuwa_jax.convert made")
    from nuwa_jax.estimation.gmflow import FlowTracker, GMFlowEstimator

    flow = GMFlowEstimator(weights)
    return Estimators(FlowTracker(flow), flow)


def _tapir(weights: str) -> Estimators:
    if not weights:
        raise UserError("tapir needs its weights: give the checkpoint (.npy) that tapnet publishes")
    from nuwa_jax.estimation.tapir import TapirTracker

    return Estimators(TapirTracker(weights), DISFlow())


BACKENDS: dict[str, Callable[[str], Estimators]] = {
    "lk_dis": _lk_dis,
    "gmflow": _gmflow,
    "tapir": _tapir,
}
