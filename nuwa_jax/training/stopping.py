"""Signals that end a run, noted and acted on at the next step boundary."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@dataclasses.dataclass
class Stop:
    """Set by a signal: stop at the next step boundary."""

    signal: int | None = None


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one acts as usual."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    previous = {}

    def note(number: int, _: object) -> None:
        stop.signal = number
        signal.signal(number, previous[number])
        os.write(2, b"stopping: saving a checkpoint after this step\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
