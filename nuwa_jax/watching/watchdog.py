"""Tells when a step takes too long: every thread's stack, and on request the end of the process.

What hangs cannot tell so itself: a collective that waits for another host, a read that never
returns. A process that is ended has exit code `EXIT_STALLED`, so that whatever started it can
start it again. A thread of C code that never gives up Python's lock also stops the watchdog.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import jax

from nuwa_jax.errors import UserError
from nuwa_jax.leaving import leave

EXIT_STALLED = 124  # as of timeout(1)
# By default a step may take this many times the median of those before it, but not less than:
SLACK = 10.0
FLOOR_SECONDS = 300.0
_REMEMBERED = 64  # steps of which the median is taken
WRITE_SECONDS = 5.0  # that the file of stacks may take


class Watchdog:
    """A thread that looks at the clock between `beat`s; used as a context.

    It watches from the first beat on, and not within `off`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seconds: float = 0.0,
        abort: bool = False,
    ) -> None:
        """Nothing runs before the context is entered.

        Args:
          folder: where stacks are written, beside stderr.
          seconds: that a step may take; 0: `SLACK` times the median, at least `FLOOR_SECONDS`.
          abort: end the process, with `EXIT_STALLED`, after the stacks are told.

        Raises:
          UserError: `seconds` is negative.
        """
        if seconds < 0:
            raise UserError(
                f"train.watchdog_seconds is at least 0 (0: {SLACK:g} times the usual), got "
                f"{seconds}"
            )
        self._folder, self._given, self._abort = Path(folder), seconds, abort
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._changed = threading.Condition()
        self._ended = False
        self._paused = 0
        self._since: float | None = None  # of the step that is watched; None: none is
        self._told = 0.0  # seconds into this step at which its stacks were told last
        self._doing = ""
        self._thread: threading.Thread | None = None

    @property
    def limit(self) -> float:
        """Seconds that the next step may take."""
        if self._given:
            return self._given
        usual = statistics.median(self._durations) if self._durations else 0.0
        return max(FLOOR_SECONDS, SLACK * usual)

    def beat(self, doing: str) -> None:
        """A step has ended and the next begins; `doing` names it in what is told."""
        went_on = ""
        with self._changed:
            now = time.monotonic()
            if self._since is not None:
                taken = now - self._since
                self._durations.append(taken)
                if self._told:
                    went_on = f"watchdog: {self._doing} went on after {taken:.0f} s"
            self._doing, self._since, self._told = doing, now, 0.0
            self._changed.notify()
        if went_on:
            _say(went_on)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """What happens within takes as long as it takes, and counts for no step."""
        with self._changed:
            self._paused += 1
            paused_at = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._paused -= 1
                if self._since is not None and not self._paused:
                    self._since += time.monotonic() - paused_at
                self._changed.notify()

    def rest(self) -> None:
        """Watches nothing until the next beat."""
        with self._changed:
            self._since = None
            self._changed.notify()

    def __enter__(self) -> Watchdog:
        self._process = jax.process_index()
        self._who = (
            f"process {self._process} of {jax.process_count()} on host {socket.gethostname()}"
        )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        while (late := self._wait_for_late()) is not None:
            since, what = late
            # Without the lock: what is written to may hang, and a step that goes on must not.
            self._tell(what)
            if self._abort and self._still(since):
                _say(f"watchdog: {self._who} ends, exit code {EXIT_STALLED}")
                leave(EXIT_STALLED)  # nothing else ends a process whose main thread hangs

    def _wait_for_late(self) -> tuple[float, str] | None:
        """When the step began that takes too long, and what to tell of it; None at the end."""
        with self._changed:
            while not self._ended:
                if self._since is None or self._paused:
                    self._changed.wait()
                    continue
                # Twice as long before it is told again, or a night's hang would fill the disk.
                due = max(self.limit, 2 * self._told)
                taken = time.monotonic() - self._since
                if taken < due:
                    self._changed.wait(due - taken)
                    continue
                self._told = taken
                return self._since, (
                    f"watchdog: {self._who}: {self._doing} has taken {taken:.0f} s, it may take "
                    f"{self.limit:.0f} s"
                )
            return None

    def _still(self, since: float) -> bool:
        """Whether the step that began then is still the one that is watched."""
        with self._changed:
            return not (self._ended or self._paused) and self._since == since

    def _tell(self, what: str) -> None:
        """Writes all threads' stacks to stderr, then to the file, which may be on what hangs."""
        path = self._folder / f"stacks_{self._process}.txt"
        _say(f"{what}; stacks of all threads, also in {path}:")
        faulthandler.dump_traceback(2)
        failure: list[str] = []
        writer = threading.Thread(
            target=_write_stacks, args=(path, what, failure), name="stacks", daemon=True
        )
        writer.start()
        writer.join(WRITE_SECONDS)
        if writer.is_alive():
            failure = [f"its disk has not answered for {WRITE_SECONDS:g} s"]
        if failure:
            _say(f"watchdog: the stacks are not in {path}: {failure[0]}")


def _write_stacks(path: Path, what: str, failure: list[str]) -> None:
    """Adds all threads' stacks to a file; an error is put into `failure`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n")
            file.flush()
            faulthandler.dump_traceback(file)
    except OSError as error:
        failure.append(str(error))


def _say(text: str) -> None:
    # Not through sys.stderr: its lock may be held by what hangs.
    os.write(2, f"{text}\n".encode())
