"""Functions for worker processes that fail in the ways decoders fail in."""

import functools
import os
import signal
import time
from pathlib import Path

from nuwa_jax.data.shards import ClipTask
from nuwa_jax.errors import UserError


def adder(number):
    """A setup that is a plain function: what it returns is called on tasks."""

    def add(task):
        if task == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if task == "hang":
            time.sleep(3600)
        if isinstance(task, Path):  # crashes the first time only
            if not task.exists():
                task.touch()
                os._exit(3)
            return "second try"
        return task + number

    return functools.partial(add)


def refuse():
    raise UserError("these weights are not there")


def cannot_start():
    os._exit(7)


class FaultyClips(ClipTask):
    """Like the real one, but for inputs whose id says otherwise."""

    def __call__(self):
        make = super().__call__()

        def faulty(input):
            if "crash" in input.id:
                os.kill(os.getpid(), signal.SIGKILL)
            if "hang" in input.id:
                time.sleep(3600)
            return make(input)

        return faulty
