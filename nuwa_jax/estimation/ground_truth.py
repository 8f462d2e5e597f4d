"""Pairs of pictures with known flow, in the layouts that flow datasets come in."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from nuwa_jax.errors import UserError

_FLO_TAG = b"PIEH"  # 202021.25 as a float32, which begins every .flo file
_PICTURES = (".png", ".ppm", ".jpg", ".jpeg", ".bmp")
_MAX_SIDE = 100_000


@dataclasses.dataclass(frozen=True)
class FlowPair:
    """Two pictures and where their flow is stored."""

    name: str
    before: Path
    after: Path
    flow: Path

    def video(self) -> UInt8[np.ndarray, "2 h w 3"]:
        """Both pictures.

        Raises:
          UserError: one cannot be read, or their sizes differ.
        """
        pictures = [cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) for path in self._paths()]
        for path, picture in zip(self._paths(), pictures, strict=True):
            if picture is None:
                raise UserError(f"{path} cannot be read as a picture: copy it again")
        if pictures[0].shape != pictures[1].shape:
            raise UserError(f"{self.before} and {self.after} differ in size: copy them again")
        return np.stack(pictures)

    def truth(self) -> Float[np.ndarray, "h w 2"]:
        """The flow; unknown where it exceeds 1e9."""
        return read_flo(self.flow)

    def _paths(self) -> tuple[Path, Path]:
        return self.before, self.after


def find_pairs(root: str | Path) -> list[FlowPair]:
    """All .flo files under a folder, each with the two pictures it is between.

    `NAME_flow.flo` lies beside the two pictures `NAME_*` (FlyingChairs). `flow10.flo` or
    `frame_0010.flo` is between those of the same folder that are numbered 10 and 11 (Middlebury),
    or, if it has none, those of a folder of the same name elsewhere under `root` (Sintel).

    Raises:
      UserError: there is no flow, or one without its pictures.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--gt={root} is no folder: give one that holds .flo files and pictures")
    pairs = [_pair(path, root) for path in sorted(root.rglob("*.flo"))]
    if not pairs:
        raise UserError(f"--gt={root} holds no .flo file: give a folder with true flow")
    return pairs


def read_flo(path: str | Path) -> Float[np.ndarray, "h w 2"]:
    """A .flo file (Baker et al., vision.middlebury.edu/flow): tag, width, height, (x, y) floats.

    Raises:
      UserError: it is no whole .flo file.
    """
    data = Path(path).read_bytes()
    width, height = np.frombuffer(data[4:12].ljust(8, b"\0"), "<i4")
    sane = 0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE
    if data[:4] != _FLO_TAG or not sane or len(data) != 12 + 8 * int(width) * int(height):
        raise UserError(f"{path} is no whole .flo file: copy it again")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)


def _pair(flow: Path, root: Path) -> FlowPair:
    name = str(flow.relative_to(root).with_suffix(""))
    if flow.stem.endswith("_flow"):
        prefix = flow.stem.removesuffix("flow")
        found = [path for path in _pictures(flow.parent) if path.stem.startswith(prefix)]
    else:
        found = _numbered(flow, flow.parent)
        if len(found) != 2:
            others = [p for p in sorted(root.rglob(flow.parent.name)) if p.is_dir()]
            found = next((f for f in (_numbered(flow, p) for p in others) if len(f) == 2), found)
    if len(found) != 2:
        raise UserError(
            f"{flow} should have two pictures beside it, NAME_* for NAME_flow.flo or those with "
            f"its number and the next, found {[path.name for path in found]}"
        )
    return FlowPair(name, found[0], found[1], flow)


def _numbered(flow: Path, folder: Path) -> list[Path]:
    """The pictures of a folder with the number of the flow and the next one."""
    digits = re.search(r"(\d+)$", flow.stem)
    if digits is None:
        return []
    number = int(digits[1])
    by_number = {}
    for path in _pictures(folder):
        match = re.search(r"(\d+)$", path.stem)
        if match:
            by_number[int(match[1])] = path
    return [by_number[n] for n in (number, number + 1) if n in by_number]


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
