"""Compiled programs kept on disk, so that a run that is started again need not compile again."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

# Compiling less than this long is not worth a file.
MIN_SECONDS = 2.0


def use_compile_cache(folder: str, below: str | Path = "", min_seconds: float = MIN_SECONDS) -> str:
    """From now on this process keeps compiled programs in `folder`, and takes them from there.

    A folder that JAX was told of already (JAX_COMPILATION_CACHE_DIR) stays the one in use. Programs
    are known by their text, by compiler and device: others never come out of it.

    Args:
      folder: path or URL; "" keeps nothing.
      below: a relative `folder` lies in this one.
      min_seconds: programs that compile more quickly than this are not kept.

    Returns:
      The folder in use, "" for none.
    """
    if jax.config.jax_compilation_cache_dir or not folder:
        return jax.config.jax_compilation_cache_dir or ""
    if "://" in folder:
        place = folder
    elif "://" in str(below):
        place = f"{below}/{folder}"
    else:
        place = str(Path(below).absolute() / folder)
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
    # Whether there is a cache is looked up once, at the first program; there may have been one.
    compilation_cache.reset_cache()
    return place
