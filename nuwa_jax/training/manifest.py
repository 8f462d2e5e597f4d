"""What the files of a checkpoint were when it was written, so that damage does not go unnoticed.

`manifest.json` lies in the checkpoint's folder and is written before that is committed: sizes and
SHA-256 of all files. Writing reads the checkpoint once more, in the background; verifying reads it
once before it is restored, several hosts each their share. A core hashes about 1.5 GB/s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

NAME = "manifest.json"
# Orbax writes these last: the time of the commit, and the mark that it was made.
_METADATA, _MARK = "_CHECKPOINT_METADATA", "commit_success.txt"
_THREADS = min(8, os.cpu_count() or 1)  # hashing and reading leave the interpreter to others


def write_manifest(folder: epath.Path) -> None:
    """Describes all files below `folder` in `folder/manifest.json`."""
    names = sorted(
        (root / file).relative_to(folder).as_posix()
        for root, _, files in folder.walk()
        for file in files
    )
    names = [name for name in names if name not in (NAME, _METADATA, _MARK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        described = list(pool.map(lambda name: _describe(folder / name), names))
    files = dict(zip(names, described, strict=True))
    (folder / NAME).write_text(json.dumps({"version": 1, "files": files}, indent=0) + "\n")


def is_committed(folder: epath.Path) -> bool:
    """Whether writing came to its end. In buckets folders appear before that."""
    return (folder / _MARK).exists()


def find_damage(
    folder: epath.Path, items: Sequence[str] = (), shard: int = 0, num_shards: int = 1
) -> str | None:
    """The first thing that is not as it was written, in words; None if all is.

    Args:
      folder: of the checkpoint.
      items: the folders in it that are to be read; all by default.
      shard: which part of the files to read; all hosts together read all.
      num_shards: hosts that share the work.
    """
    if not is_committed(folder):
        return f"it is half-written: {_MARK} is missing"
    try:
        json.loads((folder / _METADATA).read_text())
        files = json.loads((folder / NAME).read_text())["files"].items()
        wanted = [(n, f) for n, f in files if not items or n.partition("/")[0] in items]
        wanted = sorted((name, (file["size"], file["sha256"])) for name, file in wanted)
    except FileNotFoundError as error:
        missing = os.path.basename(str(error.filename or NAME))
        return f"it is half-written: {missing} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} or {_METADATA} cannot be read ({error})"

    def compare(file: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, digest) = file
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        found = path.stat().length
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if _describe(path)["sha256"] != digest:
            return f"{name} has other contents than were written"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(compare, wanted[shard::num_shards])
        return next((fault for fault in found if fault), None)


def _describe(path: epath.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().length, "sha256": digest}
