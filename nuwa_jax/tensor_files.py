"""Files of named arrays, read and written one array at a time.

A checkpoint of ten gigabytes must pass through a machine that holds half of it, so neither side is
ever mapped or loaded whole: memory maps count as resident once they are read, and libraries that
return a dict hold all of it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from nuwa_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Spec(NamedTuple):
    """Shape and type of an array that is still in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named arrays of a checkpoint."""

    specs: Mapping[str, Spec]

    def read(self, name: str) -> np.ndarray:
        """One array, in its stored type."""
        ...


class SafetensorsFile:
    """A .safetensors file; https://huggingface.co/docs/safetensors describes the format.

    Raises:
      UserError: the file cannot be read, is cut short or is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                start = file.read(8)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
                if length > min(MAX_HEADER, size):
                    raise self._fault("it does not begin with the length of its header")
                header = json.loads(file.read(length))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise self._fault(f"its header is not JSON ({error})") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        for name, entry in header.items():
            try:
                spec = Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                begin, end = entry["data_offsets"]
            except (KeyError, TypeError, ValueError) as error:
                raise self._fault(f"its entry for {name} is {entry!r}") from error
            if end - begin != spec.nbytes:
                raise self._fault(f"{name} {spec} has {end - begin} bytes")
            if 8 + length + end > size:
                raise self._fault(f"it is cut short: {name} ends beyond its {size:,} bytes")
            self.specs[name], self._offsets[name] = spec, 8 + length + begin

    def read(self, name: str) -> np.ndarray:
        """One array, in its stored type."""
        spec = self.specs[name]
        with self.path.open("rb") as file:
            file.seek(self._offsets[name])
            values = np.fromfile(file, spec.dtype, math.prod(spec.shape))
        return values.reshape(spec.shape)

    def _fault(self, what: str) -> UserError:
        return UserError(f"{self.path} is no whole .safetensors file: {what}; copy it again")


class MemorySource:
    """Arrays that are in memory already."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """One array."""
        return self._arrays[name]


class JoinedSource:
    """Several sources as one; each name is preceded by its source's prefix."""

    def __init__(self, sources: Iterable[tuple[str, TensorSource]]) -> None:
        self._places: dict[str, tuple[TensorSource, str]] = {}
        self.specs: dict[str, Spec] = {}
        for prefix, source in sources:
            for name, spec in source.specs.items():
                if prefix + name in self._places:
                    raise UserError(f"two files hold {prefix + name}: leave one of them out")
                self._places[prefix + name] = (source, name)
                self.specs[prefix + name] = spec

    def read(self, name: str) -> np.ndarray:
        """One array, in its stored type."""
        source, inner = self._places[name]
        return source.read(inner)


def write_safetensors(
    path: str | os.PathLike[str],
    specs: Mapping[str, Spec],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays as they come, in the order of `specs`; the file appears when it is whole.

    Raises:
      ValueError: an array is not the next one of `specs`, or there are too few.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8 bytes
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            _write_arrays(file, specs, arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_arrays(
    file: BinaryIO, specs: Mapping[str, Spec], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    expected = iter(specs.items())
    for name, array in arrays:
        wanted, spec = next(expected, (None, None))
        if name != wanted or (array.shape, array.dtype) != spec:
            raise ValueError(
                f"expected {wanted} {spec}, got {name} {Spec(array.shape, array.dtype)}"
            )
        np.ascontiguousarray(array).tofile(file)
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"{missing[0]} and perhaps more were not given")
