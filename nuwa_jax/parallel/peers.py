"""The other processes of a job: whether they still live, and what to say when one does not.

A collective whose peer has died waits for ever, or fails with an error that names nobody. So every
process leaves a sign of life in the store of JAX's coordination service, process 0 reads them, and
whoever learns that a process was lost or failed says which and ends: the job is then started again
and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from jax._src import distributed

from nuwa_jax.leaving import kill_workers, leave

# Exit code of a process that ended because another one was lost or failed: "try again" of
# sysexits.h, so that a launcher can tell it from an error of the program's own.
LOST = 75

_BEATS, _ENDED = "nuwa/beat/", "nuwa/ended/"
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Peers:
    """Watches the processes of the job that `jax.distributed` has joined."""

    def __init__(self, timeout: float) -> None:
        """Takes a process as lost after `timeout` seconds without a sign of life."""
        state = distributed.global_state
        self._client, self._coordinator = state.client, state.coordinator_address
        # Not those of the backend, which would start here, unwatched.
        self._index, self._count = state.process_id, state.num_processes
        self._timeout, self._period = timeout, min(2.0, timeout / 5)
        self._name = f"process {self._index} ({platform.node()})"
        self._hosts: dict[int, str] = {}
        self._seen: dict[int, tuple[str, float]] = {}  # last beat, and when it was new
        self._stop = threading.Event()
        self._verdict: str | None = None  # why all end, once this process knows

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Gives signs of life and looks for those of others until the block ends."""
        self._beat(0)
        first = self._client.blocking_key_value_get(f"{_BEATS}0", 1000 * round(self._timeout))
        self._hosts[0] = first.partition(" ")[2]
        thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        with last_words(self._why_aborted):
            thread.start()
            try:
                yield
            finally:
                self._stop.set()
                thread.join(2 * self._period)

    def wait_for_verdict(self, error: Exception) -> None:
        """Gives `_watch` the time to say who was lost, if that may be why a collective failed."""
        if str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")):
            return
        first_line = str(error).partition("\n")[0][:300]
        seconds = self._timeout + 5 * self._period
        _tell(f"{self._name}: {first_line}; looking which process was lost, up to {seconds:.0f} s")
        time.sleep(seconds)

    def failed(self, error: BaseException) -> None:
        """Tells the others that this process ends with an error, and gives them time to hear."""
        self._stop.set()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self._end_all(f"{self._name} failed with {text}")

    def ending(self) -> None:
        """Waits until all are done; what the others do no longer matters then."""
        self._client.wait_at_barrier("nuwa/end", 24 * 3600 * 1000)
        self._stop.set()

    def _watch(self) -> None:
        beat, answered = 0, time.monotonic()
        self._seen = {other: ("", answered) for other in range(1, self._count)}
        while not self._stop.wait(self._period):
            beat += 1
            try:
                self._beat(beat)
                ended = self._client.key_value_dir_get(_ENDED)
                beats = self._client.key_value_dir_get(_BEATS) if self._index == 0 else []
                answered = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                if time.monotonic() - answered > self._timeout:
                    self._leave(f"{self._called(0)} was lost: {error}")
                continue
            # Wait, as this process may be about to tell of the same error itself.
            if ended and not self._stop.wait(2 * self._period):
                self._leave(sorted(ended)[0][1])
            if self._index == 0 and (silent := self._silent(beats)):
                text = ", ".join(f"{self._called(other)} was lost" for other in silent[:8])
                text += f" and {len(silent) - 8} more" if len(silent) > 8 else ""
                self._verdict = f"{text}: no sign of life for {self._timeout:.0f} s"
                self._end_all(self._verdict)
                self._leave(self._verdict)

    def _silent(self, beats: Sequence[tuple[str, str]]) -> list[int]:
        """The processes whose beat has not changed for too long, by this process' clock."""
        now = time.monotonic()
        for key, value in beats:
            other, host = int(key.rpartition("/")[2]), value.partition(" ")[2]
            self._hosts[other] = host
            if other and self._seen[other][0] != value:
                self._seen[other] = value, now
        return [other for other, (_, at) in self._seen.items() if now - at > self._timeout]

    def _beat(self, beat: int) -> None:
        value = f"{beat} {platform.node()}"
        self._client.key_value_set(f"{_BEATS}{self._index}", value, allow_overwrite=True)

    def _end_all(self, text: str) -> None:
        try:
            self._client.key_value_set(f"{_ENDED}{self._index}", text, allow_overwrite=True)
        except jax.errors.JaxRuntimeError as error:
            _tell(f"{self._name} could not tell the others that it ends: {error}")
        if self._index == 0:
            time.sleep(4 * self._period)  # the store ends with this process

    def _leave(self, text: str) -> None:
        kill_workers()
        faulthandler.dump_traceback(all_threads=True)
        _tell(self._farewell(text))
        leave(LOST)

    def _farewell(self, text: str) -> str:
        return f"{self._name} ends because {text}; start the job again to go on"

    def _called(self, other: int) -> str:
        return f"process {other} ({self._hosts.get(other, 'its host is not known')})"

    def _why_aborted(self) -> tuple[str, int] | None:
        """Whether process 0 is gone: then JAX ends this process before `_watch` can learn of it."""
        if self._verdict is not None:
            return self._farewell(self._verdict), LOST
        if self._index == 0 or self._stop.is_set():
            return None
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            text = f"{self._called(0)} was lost: its coordinator does not answer ({error})"
            return self._farewell(text), LOST
        return None


@contextlib.contextmanager
def last_words(words: Callable[[], tuple[str, int] | None]) -> Iterator[None]:
    """Says why the process ends, should JAX's coordination client abort it within the block.

    That client knows one answer to a lost connection, C's abort(), after a stack of its own code.

    Args:
      words: called at an abort; what to say and the exit code, or None to abort as ever.
    """

    @_HANDLER
    def handler(number: int) -> None:
        libc.alarm(30)  # if the interpreter's lock is never free
        told = words()
        if told is None:
            libc.signal(number, None)  # SIG_DFL
            kill_workers()
            return
        _tell(told[0])
        leave(told[1])

    # Python's own handlers run in the main thread and after the abort, that is never.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)


def _tell(text: str) -> None:
    os.write(sys.stderr.fileno(), f"error: {text}\n".encode())
