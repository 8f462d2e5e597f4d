"""Where a run is stored: a folder, or a bucket.

Checkpoints go to a bucket directly. Files that grow line by line cannot: they are made in a scratch
folder and copied into the bucket before each checkpoint is committed and when the run ends, so a
checkpoint is never without the lines that lead up to it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import fsspec
from etils import epath

from nuwa_jax.errors import UserError

_BUCKETS = ("gs://", "s3://")  # what Orbax writes to
# Files that a run which goes on adds to.
_KEPT = ("metrics.jsonl", "goodput.json", "non_finite.jsonl")
_PART = ".part"  # ends the names of files that are about to replace another
_PIECE = 1 << 20  # bytes


class Workdir:
    """The folder of a run.

    Attributes:
      url: as the user gave it.
      root: the folder itself, to be read and for checkpoints.
      local: where this process makes files: the folder itself or a scratch folder.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Opens a run's folder, which need not exist.

        Raises:
          UserError: nothing can be stored there, or its driver is missing.
        """
        self.url = os.fspath(url)
        self.root = checkpoint_root(self.url)
        self._scratch: str | None = None
        self._copied: dict[str, tuple[int, int]] = {}
        self._copying = threading.Lock()  # a checkpoint's thread and the run's own end
        if "://" not in self.url:
            self.local = Path(self.url)
            return
        try:
            self._files, self._base = fsspec.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.url} cannot be reached: {error}") from error
        self._scratch = tempfile.mkdtemp(prefix="nuwa_jax_run_")
        self.local = Path(self._scratch) / "run"
        self.local.mkdir()
        self._frozen = Path(self._scratch) / "frozen"  # beside what is copied
        for name in _KEPT:
            if self._files.exists(f"{self._base}/{name}"):
                self._files.get_file(f"{self._base}/{name}", str(self.local / name))
                self._copied[name] = _state(self.local / name)

    def __str__(self) -> str:
        return self.url

    def copy(self) -> None:
        """Copies what has changed since the last time into the bucket, if it is one."""
        if self._scratch is None:
            return
        with self._copying:
            for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
                if path.suffix == _PART:
                    continue
                name = path.relative_to(self.local).as_posix()
                state = self._snapshot(path, self._copied.get(name))
                if state is not None:
                    target = f"{self._base}/{name}"
                    self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self._files.put_file(str(self._frozen), target)
                    self._copied[name] = state

    def _snapshot(self, path: Path, known: tuple[int, int] | None) -> tuple[int, int] | None:
        """Copies a file, as it is now, to `_frozen`: it may grow or be replaced while it is sent.

        Returns:
          Its state; None if that is `known`, or there is no such file any more.
        """
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                state = stat.st_mtime_ns, stat.st_size
                if state == known:
                    return None
                with self._frozen.open("wb") as frozen:
                    left = stat.st_size
                    while left and (piece := file.read(min(left, _PIECE))):
                        frozen.write(piece)
                        left -= len(piece)
        except FileNotFoundError:
            return None
        return state

    def close(self) -> None:
        """Copies what is left and removes the scratch folder."""
        if self._scratch is not None:
            self.copy()
            shutil.rmtree(self._scratch)
            self._scratch = None


def checkpoint_root(url: str | os.PathLike[str]) -> epath.Path:
    """The folder of a run as Orbax takes it, absolute.

    Raises:
      UserError: Orbax cannot write there.
    """
    url = os.fspath(url)
    path = url.removeprefix("file://")
    if "://" in path and not path.startswith(_BUCKETS):
        raise UserError(
            f"{url} cannot hold checkpoints: give a folder, or a bucket that begins with "
            f"{' or '.join(_BUCKETS)}"
        )
    return epath.Path(path if path.startswith(_BUCKETS) else os.path.abspath(path))


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size
