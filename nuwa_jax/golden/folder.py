"""Reading a folder of goldens; whatever it should have and does not is named, never a traceback."""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nuwa_jax.convert.lora import fold_lora
from nuwa_jax.errors import UserError
from nuwa_jax.golden.compare import Item, Missing, Unusable
from nuwa_jax.tensor_files import SafetensorsFile

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
FLOW_WEIGHTS = "flow_encoder_weights.safetensors"
ARRAYS = (
    "scalars",
    "lora",
    "drag",
    "resblock",
    "transformer",
    "flow_encoder",
    "unet",
    "unet_taps",
    "vae",
    "clip",
    "sampler",
    "e2e",
)
FILES = (CONFIG, WEIGHTS, FLOW_WEIGHTS, *(f"{name}.npz" for name in ARRAYS))


class Arrays(Mapping):
    """Named arrays of which an absent one raises `Missing`, and which knows those never read.

    `place|array` groups arrays: `arrays.at("place")` are those of one place, without the prefix.
    """

    def __init__(
        self, file: str, arrays: Mapping[str, np.ndarray], prefix: str = "", read: set | None = None
    ) -> None:
        self.file, self._arrays, self._prefix = file, arrays, prefix
        self._read: set[str] = set() if read is None else read

    def __getitem__(self, key: str) -> np.ndarray:
        name = self._prefix + key
        if name not in self._arrays:
            raise Missing(self.name(key))
        self._read.add(name)
        return self._arrays[name]

    def __contains__(self, key: object) -> bool:  # Mapping's own would count as reading
        return f"{self._prefix}{key}" in self._arrays

    def __iter__(self) -> Iterator[str]:
        for name in self._arrays:
            if name.startswith(self._prefix):
                yield name.removeprefix(self._prefix)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def name(self, key: str) -> str:
        """What an array is called in the report."""
        return f"{self.file}/{self._prefix}{key}"

    def at(self, place: str) -> Arrays:
        """The arrays `place|...`."""
        return Arrays(self.file, self._arrays, f"{self._prefix}{place}|", self._read)

    def places(self) -> list[str]:
        """Every `place` of names `place|...`, in the order of the file."""
        return list(dict.fromkeys(key.rsplit("|", 1)[0] for key in self if "|" in key))

    def matching(self, pattern: str) -> dict[str, re.Match[str]]:
        """The names that a regular expression matches in full, with the matches."""
        found = ((key, re.fullmatch(pattern, key)) for key in self)
        return {key: match for key, match in found if match}

    def require(self, names: Iterable[str]) -> Iterator[Item]:
        """An item for each name that is absent."""
        for name in names:
            if name not in self:
                yield Missing(self.name(name)).item()

    def require_some(self, patterns: Mapping[str, str]) -> Iterator[Item]:
        """An item for each pattern (readable form: regular expression) that no name matches."""
        for readable, pattern in patterns.items():
            if not self.matching(pattern):
                yield Missing(self.name(readable)).item()

    def unread(self) -> list[str]:
        """Names in the report of the arrays that nothing has read."""
        return [self.name(key) for key in self if self._prefix + key not in self._read]


class Folder:
    """The files of one folder of goldens, read when first asked for.

    Raises:
      UserError: there is no such folder, or it has none of the files of such a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is no folder: name one with the reference's arrays")
        if not any((self.path / name).is_file() for name in FILES):
            raise UserError(
                f"{path} is no folder of goldens: it has neither {CONFIG} nor any other file "
                "that `nuwa_jax.golden` reads"
            )
        self._arrays = functools.cache(self._read_arrays)

    def missing_files(self) -> list[str]:
        """Names of the files that the folder lacks."""
        return [name for name in FILES if not (self.path / name).is_file()]

    @functools.cached_property
    def config(self) -> Any:
        """The parsed config; `setting` reads single entries."""
        try:
            return json.loads(self._existing(CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise Unusable(CONFIG, f"no JSON: {error}") from error

    def setting(self, path: str, default: Any = None) -> Any:
        """The entry at `a.b.c` of the config, which without a default must be there."""
        value = self.config
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                if default is None:
                    raise Missing(f"{CONFIG}/{path}")
                return default
            value = value[key]
        return value

    def floor(self, name: str) -> str:
        """The reference's own rounding as the config states it, to print beside an error."""
        found = self.setting(f"float32_noise_floor_vs_float64.{name}.rel_l2", "")
        return f"reference's own rounding {found:.1e}" if found else ""

    def arrays(self, name: str) -> Arrays:
        """The arrays of `name`.npz."""
        return self._arrays(name)

    @functools.cached_property
    def weights(self) -> Arrays:
        """The weights as stored: LoRA unfolded, mostly float16."""
        return self._read_weights(WEIGHTS)

    @functools.cached_property
    def state(self) -> Arrays:
        """The weights in float32 with LoRA folded."""
        return Arrays(WEIGHTS, fold_lora(self.weights, float(self.setting("lora_scale"))))

    @functools.cached_property
    def flow_state(self) -> Arrays:
        """The weights of the flow encoder that stands alone."""
        return Arrays(FLOW_WEIGHTS, fold_lora(self._read_weights(FLOW_WEIGHTS)))

    def _read_weights(self, name: str) -> Arrays:
        try:
            file = SafetensorsFile(self._existing(name))
        except UserError as error:
            raise Unusable(name, str(error)) from error
        return Arrays(name, {key: file.read(key) for key in file.specs})

    def _read_arrays(self, name: str) -> Arrays:
        try:
            with np.load(self._existing(f"{name}.npz")) as file:
                return Arrays(name, dict(file))
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise Unusable(f"{name}.npz", str(error)) from error

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise Missing(name)
        return path
