"""Errors that a user can mend, and how the command-line programs show them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class UserError(ValueError):
    """Bad input: the message says what was expected, what came and what to do, in one line."""


class StoppedBySignal(Exception):
    """A signal ends a process of several at once, as the others may not have had it."""

    def __init__(self, signal: int, text: str) -> None:
        """Takes the signal's number, and what to tell the user."""
        super().__init__(text)
        self.signal = signal


def run_main(main: Callable[[Sequence[str]], object]) -> None:
    """Runs `main` under absl; errors that a user can mend become one line on stderr."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
        try:
            main(argv)
        except (UserError, StoppedBySignal) as error:
            sys.exit(report(error))

    app.run(guarded)


def report(error: BaseException) -> int:
    """Tells an error that ends the program on stderr; returns its exit code."""
    if isinstance(error, UserError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    if isinstance(error, StoppedBySignal):
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 128 + error.signal
    traceback.print_exception(error)
    sys.stderr.flush()
    return 1
