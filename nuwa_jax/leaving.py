"""How a process ends that cannot end in order, and takes along what it started."""

from __future__ import annotations

import multiprocessing
import os
from typing import NoReturn


def kill_workers() -> None:
    """Kills the worker processes that `multiprocessing` has started from this one."""
    for worker in multiprocessing.active_children():
        worker.kill()


def leave(code: int) -> NoReturn:
    """Ends the process at once with exit code `code`, from any thread, and its workers with it.

    Nothing that would run at an orderly end runs, as what hangs could hang that, too.
    """
    try:
        kill_workers()
    finally:
        os._exit(code)
