"""Which weights made a result."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nuwa_jax.errors import UserError

_DIGITS = 12  # of the hash: enough to tell any two files of weights apart


def file_hash(path: str | Path) -> str:
    """The first digits of a file's SHA-256.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror}") from error
