"""Processes that do one task after the other, and may die of one or never end it.

Decoders read files of strangers: one that crashes on a file, or hangs in it, must cost that file
and nothing else. Each process is a fresh interpreter. It ends when its parent does, however that
ended.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, TypeVar

from nuwa_jax.errors import UserError

_Task = TypeVar("_Task")

# Tasks handed out ahead of the one whose result is asked for, per process.
_AHEAD = 8

# A crash may be the machine's fault, such as memory that others took: a task has two tries.
_TRIES = 2


@dataclasses.dataclass(frozen=True)
class Lost:
    """What became of a task that has no result.

    Attributes:
      reason: `crashed` or `timeout`.
      detail: one line.
    """

    reason: str
    detail: str


class IsolatedPool(Generic[_Task]):
    """Processes that call one function, made by `setup` in each of them, on tasks.

    Args:
      setup: makes the function; it, the tasks and the results are pickled.
      workers: number of processes. They start when there is something to do.
      timeout: seconds that a task may take.
    """

    def __init__(
        self, setup: Callable[[], Callable[[_Task], Any]], workers: int, timeout: float
    ) -> None:
        if workers < 1 or timeout <= 0:
            raise ValueError(f"workers >= 1 and timeout > 0, got {workers} and {timeout}")
        self.workers = workers
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes = [_Process(setup, timeout) for _ in range(workers)]
        for process in self._processes:
            self._idle.put(process)
        # A thread per process waits for it, and does nothing else.
        self._threads = ThreadPoolExecutor(workers)

    def map(self, tasks: Iterable[_Task]) -> Iterator[tuple[_Task, Any | Lost]]:
        """Each task with its result, in their order."""
        pending: collections.deque[tuple[_Task, Future[Any]]] = collections.deque()
        try:
            for task in tasks:
                pending.append((task, self._threads.submit(self._run, task)))
                if len(pending) > _AHEAD * self.workers:
                    task, future = pending.popleft()
                    yield task, future.result()
            while pending:
                task, future = pending.popleft()
                yield task, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.stop()

    def __enter__(self) -> IsolatedPool[_Task]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, task: _Task) -> Any | Lost:
        process = self._idle.get()
        try:
            for _ in range(_TRIES):
                result = process.run(task)
                if not (isinstance(result, Lost) and result.reason == "crashed"):
                    break
            return result
        finally:
            self._idle.put(process)


class _Process:
    def __init__(self, setup: Callable[[], Any], timeout: float) -> None:
        self._setup = setup
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def run(self, task: Any) -> Any | Lost:
        if self._process is None:
            self._start()
        try:
            self._connection.send(task)
            if not self._connection.poll(self._timeout):
                self.stop()
                return Lost("timeout", f"took longer than {self._timeout:g} s")
            return self._connection.recv()
        except (EOFError, OSError):
            code = self.stop()
            return Lost("crashed", f"its process ended with exit code {code}")

    def _start(self) -> None:
        ours, theirs = Pipe()
        program = "from nuwa_jax.data.isolation import serve; serve()"
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self._connection = ours
        try:
            ours.send_bytes(pickle.dumps(self._setup))
            started = ours.recv()
        except (EOFError, OSError) as error:
            code = self.stop()
            raise RuntimeError(
                f"a worker process ended with exit code {code} before its first task"
            ) from error
        if isinstance(started, UserError):
            self.stop()
            raise started

    def stop(self) -> int:
        """Ends the process, if there is one; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        self._connection.close()
        try:
            # An idle or dead process ends by itself when the pipe does.
            return process.wait(0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def serve() -> None:
    """What a process does: sets up, then task after task until the parent is gone."""
    with Connection(int(sys.argv[1])) as connection:
        try:
            function = pickle.loads(connection.recv_bytes())()
        except UserError as error:
            connection.send(error)
            return
        connection.send(None)
        while True:
            try:
                task = connection.recv()
            except (EOFError, OSError):
                return
            connection.send(function(task))
