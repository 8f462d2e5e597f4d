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

import fsspec

NAME = "manifest.json"
# Orbax writes these last: the time of the commit, and the mark that it was made.
_METADATA, _MARK = "_CHECKPOINT_METADATA", "commit_success.txt"
_PART = 1 << 23  # bytes read at once
_THREADS = min(8, os.cpu_count() or 1)  # hashing and reading leave the interpreter to others


def write_manifest(folder: str) -> None:
    """Describes all files below a folder, on a disk or in a bucket, in its `manifest.json`."""
    files, base, found = _list(folder)
    names = sorted(set(found) - {NAME, _METADATA, _MARK})
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(files, f"{base}/{name}"), names))
    described = {
        name: {"size": found[name], "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    text = json.dumps({"version": 1, "files": described}, indent=0) + "\n"
    files.pipe_file(f"{base}/{NAME}", text.encode())


def committed_steps(folder: str) -> list[int]:
    """Names, which are numbers, of the checkpoints in a folder, newest first.

    On a disk one that has no mark of its commit counts: while it is being written it has another
    name, so it was damaged later. In a bucket it may be what a killed run was writing.
    """
    files, base = _open(folder)
    if not files.isdir(base):
        return []
    names = [entry.rstrip("/").rpartition("/")[2] for entry in files.ls(base, detail=False)]
    steps = [int(name) for name in names if name.isdecimal()]
    if "://" in folder:
        steps = [step for step in steps if files.exists(f"{base}/{step}/{_MARK}")]
    return sorted(steps, reverse=True)


def later_folders(folder: str) -> list[str]:
    """Names of the folders beside one that come after it in order and have checkpoints."""
    parent, _, own = folder.rstrip("/").rpartition("/")
    files, base = _open(parent)
    if not files.isdir(base):
        return []
    names = [entry.rstrip("/").rpartition("/")[2] for entry in files.ls(base, detail=False)]
    return [name for name in sorted(names) if name > own and committed_steps(f"{parent}/{name}")]


def find_damage(
    folder: str, items: Sequence[str] = (), shard: int = 0, num_shards: int = 1
) -> str | None:
    """The first thing that is not as it was written, in words; None if all is.

    Args:
      folder: of the checkpoint.
      items: the folders in it that are to be read; all by default.
      shard: which part of the files to read; all hosts together read all.
      num_shards: hosts that share the work.
    """
    files, base, found = _list(folder)
    missing = [name for name in (_MARK, _METADATA, NAME) if name not in found]
    if missing:
        return f"it is half-written: {missing[0]} is missing"
    try:
        json.loads(files.cat_file(f"{base}/{_METADATA}"))
        described = json.loads(files.cat_file(f"{base}/{NAME}"))["files"].items()
        wanted = [(n, f) for n, f in described if not items or n.partition("/")[0] in items]
        wanted = sorted((name, (file["size"], file["sha256"])) for name, file in wanted)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} or {_METADATA} cannot be read ({error})"

    def compare(file: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, digest) = file
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes instead of {size}"
        if _digest(files, f"{base}/{name}") != digest:
            return f"{name} has other contents than were written"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(compare, wanted[shard::num_shards])
        return next((fault for fault in faults if fault), None)


def _open(folder: str) -> tuple[fsspec.AbstractFileSystem, str]:
    files, base = fsspec.url_to_fs(folder)
    files.invalidate_cache()  # others write there, too: Orbax goes its own way
    return files, base.rstrip("/")


def _list(folder: str) -> tuple[fsspec.AbstractFileSystem, str, dict[str, int]]:
    """The files below a folder, their names relative to it, and their sizes in bytes."""
    files, base = _open(folder)
    listed = files.find(base, detail=True)
    sizes = {path.removeprefix(f"{base}/"): entry["size"] for path, entry in listed.items()}
    return files, base, sizes


def _digest(files: fsspec.AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with files.open(path, "rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()
