"""Which trackers and flow estimators there are, by the name that a user gives.

Looking one up imports what it needs and no more: `lk_dis` runs in processes that never import JAX.
"""

from __future__ import annotations

import functools
import importlib.metadata
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
        `gmflow`: GMFlow, and tracks along its flow; `gmflow_x2`: on pictures enlarged by 2, which
        finds small motion, for four times the computing. `tapir`: TAPIR or BootsTAPIR, and DIS.
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


def _gmflow(weights: str, upsample: int | None = None) -> Estimators:
    if not weights:
        raise UserError("gmflow needs its weights: give the file that nuwa_jax.convert made")
    from nuwa_jax.estimation.gmflow import FlowTracker, GMFlowEstimator

    flow = GMFlowEstimator(weights, upsample=upsample)
    return Estimators(FlowTracker(flow), flow)


def _tapir(weights: str) -> Estimators:
    if not weights:
        raise UserError("tapir needs its weights: give the checkpoint (.npy) that tapnet publishes")
    from nuwa_jax.estimation.tapir import TapirTracker

    return Estimators(TapirTracker(weights), DISFlow())


BACKENDS: dict[str, Callable[[str], Estimators]] = {
    "lk_dis": _lk_dis,
    "gmflow": _gmflow,
    "gmflow_x2": functools.partial(_gmflow, upsample=2),
    "tapir": _tapir,
}

# Packages, besides OpenCV, on whose versions the numbers of a backend depend.
_JAX = ("jax", "jaxlib", "flax")
PACKAGES: dict[str, tuple[str, ...]] = {
    "lk_dis": (),
    "gmflow": _JAX,
    "gmflow_x2": _JAX,
    "tapir": (*_JAX, "tapnet"),
}


def package_versions(name: str) -> dict[str, str]:
    """The installed versions of a backend's `PACKAGES`; nothing is imported."""
    versions = {}
    for package in PACKAGES.get(name, ()):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "from source"  # a checkout on the path has no metadata
    return versions
