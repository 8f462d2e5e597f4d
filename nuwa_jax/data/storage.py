"""Folders on disks and in buckets: what preparing clips does with files, the same for both.

A bucket is what fsspec reaches by a URL (gs://, s3://, ...; its driver, such as gcsfs, is installed
apart). Files are made on the local disk and appear in the folder complete or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec

from nuwa_jax.errors import UserError

_TEMPORARY = ".tmp"


class Folder:
    """A folder whose files are named by relative paths with `/`.

    Attributes:
      url: as the user gave it.
      local: its path, None if it is in a bucket.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        self.local = None if "://" in self.url else Path(self.url)
        if self.local is None:
            try:
                self._fs, self._root = fsspec.url_to_fs(self.url)
            except (ValueError, ImportError) as error:
                raise UserError(f"{self.url} cannot be reached: {error}") from error

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.url}/{name}")

    def exists(self) -> bool:
        """Whether there is such a folder; one in a bucket is what has files in it."""
        return self.local.is_dir() if self.local else self._fs.isdir(self._root)

    def make(self) -> None:
        """Makes the folder where folders are made; in buckets they come with their files.

        Raises:
          UserError: it cannot be made.
        """
        try:
            if self.local:
                self.local.mkdir(parents=True, exist_ok=True)
            else:
                self._fs.makedirs(self._root, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.url} cannot be made: {error.strerror or error}") from error

    def size(self, name: str) -> int:
        """Bytes of a file, -1 if there is none.

        Raises:
          OSError: the bucket did not say.
        """
        if self.local:
            path = self.local / name
            return path.stat().st_size if _is_file(path) else -1
        try:
            info = self._fs.info(self._path(name))
        except FileNotFoundError:
            return -1
        return info["size"] if info["type"] == "file" else -1

    def changed(self, name: str) -> int | None:
        """Nanoseconds at which a local file was last written; None in a bucket or without it."""
        path = self.local / name if self.local else None
        return path.stat().st_mtime_ns if path and _is_file(path) else None

    def list(self, pattern: str) -> list[str]:
        """Names of the folder's own files that match, in order."""
        if self.local:
            return sorted(path.name for path in self.local.glob(pattern) if _is_file(path))
        found = self._fs.glob(self._path(pattern))
        return sorted(PurePosixPath(path).name for path in found)

    def walk(self) -> Iterator[str]:
        """Names of all files in it and in folders below, in order."""
        if self.local:
            paths = (path for path in self.local.rglob("*") if _is_file(path))
            names = (path.relative_to(self.local).as_posix() for path in paths)
        else:
            root = f"{self._root.rstrip('/')}/"
            names = (path.removeprefix(root) for path in self._fs.find(self._root))
        yield from sorted(names)

    def read_text(self, name: str) -> str | None:
        """What is in a file; None if there is none."""
        try:
            if self.local:
                return (self.local / name).read_text(encoding="utf-8")
            return self._fs.cat_file(self._path(name)).decode()
        except FileNotFoundError:
            return None

    def write_text(self, name: str, text: str) -> None:
        """Writes a file."""
        with self.writing(name) as path:
            path.write_text(text, encoding="utf-8")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        if self.local:
            (self.local / name).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_temporary(self) -> None:
        """Removes what writers left behind that were killed. None may be at work."""
        for name in self.list(f".*{_TEMPORARY}"):
            self.remove(name)

    def move(self, name: str, target: Folder, new_name: str) -> None:
        """Renames a file into another folder of the same kind."""
        if self.local:
            os.replace(self.local / name, target.local / new_name)
        else:
            self._fs.mv(self._path(name), target._path(new_name))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write to; afterwards the file appears under its name, or not at all."""
        temporary = f".{name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}"
        if self.local:
            path = self.local / temporary
            try:
                yield path
                os.replace(path, self.local / name)
            finally:
                path.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="nuwa_jax_") as scratch:
            path = Path(scratch) / name
            yield path
            # Not every store makes a file appear at once, hence the two steps.
            self._fs.put_file(os.fspath(path), self._path(temporary))
            self._fs.mv(self._path(temporary), self._path(name))

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A local path of a file: its own, or that of a copy that is then removed."""
        if self.local:
            yield self.local / name
            return
        with tempfile.TemporaryDirectory(prefix="nuwa_jax_") as scratch:
            path = Path(scratch) / PurePosixPath(name).name
            with self._fs.open(self._path(name), "rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            yield path

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _is_file(path: Path) -> bool:
    """Unlike `Path.is_file`, no error for names that are too long and folders that are closed."""
    return os.path.isfile(path)
