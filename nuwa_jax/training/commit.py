"""Which source a run was made with."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import nuwa_jax


@functools.cache
def source_commit() -> str:
    """The Git commit of the package's source, "-dirty" behind it where files were changed.

    Its version where Git is missing or does not know the source, as of an installed package.
    """
    source = Path(nuwa_jax.__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A folder of packages may lie in a repository that is about something else.
        git("ls-files", "--error-unmatch", source.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return nuwa_jax.__version__
