"""Errors that a user can mend, and how the command-line programs show them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class UserError(ValueError):
    """Bad input: the message says what was expected, what came and what to do, in one line."""


def run_main(main: Callable[[Sequence[str]], object]) -> None:
    """Runs `main` under absl; a `UserError` becomes one line on stderr and exit code 2."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
        try:
            main(argv)
        except UserError as error:
            sys.exit(report(error))

    app.run(guarded)


def report(error: BaseException) -> int:
    """Tells an error that ends the program on stderr; returns its exit code."""
    if isinstance(error, UserError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    traceback.print_exception(error)
    sys.stderr.flush()
    return 1
