"""Which hosts hold the others up: every host's times, gathered now and then.

All hosts take the same time per step, as they wait for each other in every collective. A host that
is slow is one that waits less for its devices than the others do: because it has no batch, or takes
longer for its own part.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

_NAME_BYTES = 64


class HostTimes(NamedTuple):
    """Seconds per step of one host: all of it, of that without a batch, of that the host's own."""

    step: float
    data: float
    own: float


def gather(times: HostTimes) -> tuple[list[str], Float[np.ndarray, "hosts 3"]]:
    """Names and times of all hosts, on every host; all must call it at the same step."""
    name = socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    rows = np.array(times, np.float32), np.frombuffer(name, np.uint8)
    with jax.transfer_guard("allow"):
        values, names = multihost_utils.process_allgather(rows)
    values = np.reshape(values, (-1, len(HostTimes._fields)))
    names = np.reshape(names, (-1, _NAME_BYTES))
    return [bytes(row).rstrip(b"\0").decode() for row in names], values


def report(names: list[str], times: Float[np.ndarray, "hosts 3"], ratio: float) -> str | None:
    """Names the hosts that are slow, None if there are none.

    A host is slow if what it does itself (waiting for data, preparing steps) takes longer than the
    median host's by more than `ratio` - 1 of the median step, or its steps take `ratio` times that.

    Args:
      names: of the hosts, by process.
      times: of each, the fields of `HostTimes`.
      ratio: greater than 1.
    """
    step, data, own = np.asarray(times, np.float64).T
    usual_step, usual_data, usual_own = (float(np.median(x)) for x in (step, data, own))
    excess = (data + own) - float(np.median(data + own))
    slow = np.flatnonzero((excess > (ratio - 1) * usual_step) | (step > ratio * usual_step))
    if not len(slow):
        return None
    told = "; ".join(
        f"process {i} on {names[i]}: step {step[i]:.3g} s, without a batch {data[i]:.3g} s, own "
        f"work {own[i]:.3g} s"
        for i in slow
    )
    return (
        f"slow hosts: {told}; median of {len(names)} processes: step {usual_step:.3g} s, without a "
        f"batch {usual_data:.3g} s, own work {usual_own:.3g} s"
    )
