"""Signals that end a run: noted, and acted on where nothing is lost by it.

A Python handler runs in the main thread alone and only between bytecodes, so a signal waits for
whatever native call that thread is in. A step takes seconds, and its end is where a run is saved.
Compiling and sampling take minutes, longer than a machine that is taken away leaves: so they run in
a thread of their own, and the main thread, which only waits, leaves them behind.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from nuwa_jax.leaving import leave

# How often a waiting main thread looks whether it is to stop, in seconds.
_POLL = 0.1
_left_behind: list[threading.Thread] = []


class Stopped(Exception):
    """The run is to stop, so what was called is not waited for."""


@dataclasses.dataclass
class Stop:
    """Set by a signal: stop at the next step boundary."""

    signal: int | None = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, unless a signal comes before it has ended.

        It runs in another thread, to which what JAX keeps per thread (`jax.default_device(..)` and
        the like) does not apply. If it is left behind it runs on, and what it was given belongs to
        it.

        Raises:
          Stopped: the run is to stop.
        """
        done = threading.Event()
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["value"] = function(*args)
            except BaseException as error:  # raised again by the caller
                outcome["error"] = error
            finally:
                done.set()

        if self.signal is not None:
            raise Stopped
        # A daemon, so that the interpreter can end without it.
        thread = threading.Thread(target=run, name=f"call {function}", daemon=True)
        thread.start()
        while not done.wait(_POLL):
            if self.signal is not None:
                _left_behind.append(thread)
                raise Stopped
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]


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
        os.write(2, b"stopping: what is not in a checkpoint yet is saved after this step\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_after(number: int) -> NoReturn:
    """Ends the process with 128 + `number`, the exit code of one that a signal ended.

    Where a call was left behind this is at once: to tear the interpreter and JAX down would wait
    for it, or take from under it what it works with.
    """
    if any(thread.is_alive() for thread in _left_behind):
        sys.stdout.flush()
        sys.stderr.flush()
        leave(128 + number)
    sys.exit(128 + number)
