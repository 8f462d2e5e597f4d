"""Memory of programs that compute on the host."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from importlib import metadata

# Parameters of glibc's mallopt(3), by their numbers in malloc.h.
_KEEP_ALL = {
    -1: -1,  # M_TRIM_THRESHOLD: nothing free is too much
    -4: 0,  # M_MMAP_MAX: no array has pages of its own, which would go with it
    -8: 1,  # M_ARENA_MAX: threads share one heap, as their own hold only small arrays
}


def keep_host_memory() -> bool:
    """Lets each step have the memory of the one before, where the host's processor computes.

    glibc returns large arrays to the system as soon as they are free, and takes new pages for the
    next ones, which the system must find and clear: 1.7 GB a step for a U-Net of two levels and 64
    channels on 8 frames of 24x40, a tenth of its CPU time on an idle machine and more where memory
    is short (docs/training.md). To be called before the first array is made. What the program took
    at its largest it keeps until it ends.

    Returns:
      Whether it did: with the C library glibc, and no accelerator's plug-in for JAX in use.
    """
    if not computes_on_host():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(name, to) == 1 for name, to in _KEEP_ALL.items()])


def computes_on_host() -> bool:
    """Whether JAX will run on the CPU, as far as can be told without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return importlib.util.find_spec("libtpu") is None and not metadata.entry_points(
        group="jax_plugins"
    )
