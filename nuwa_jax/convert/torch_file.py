"""PyTorch's own files of weights, for those who have it installed; nothing else here needs it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nuwa_jax.errors import UserError
from nuwa_jax.tensor_files import SafetensorsFile, Spec, TensorSource


class TorchFile:
    """A .pth, .pt, .ckpt or .bin file; needs PyTorch, which loads weights only, never code.

    Raises:
      UserError: PyTorch is not installed, or the file is not one of weights alone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"{path} is a PyTorch file: pip install -e '.[torch]' to read it, or give a "
                ".safetensors file, which needs nothing"
            ) from error
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # torch raises whatever its unpickler meets
            raise UserError(f"{path} is no PyTorch file of weights alone: {error}") from error
        for wrapper in ("state_dict", "module", "model"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
        self._torch = torch
        self._state = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
        self.specs = {k: Spec(tuple(v.shape), self._dtype(v)) for k, v in self._state.items()}

    def read(self, name: str) -> np.ndarray:
        """One array, in its stored type."""
        tensor = self._state[name].detach()
        if tensor.dtype == self._torch.bfloat16:
            return tensor.contiguous().view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def _dtype(self, tensor: Any) -> np.dtype:
        name = str(tensor.dtype).removeprefix("torch.")
        return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def open_tensors(path: str | os.PathLike[str]) -> TensorSource:
    """The arrays of a file, by its ending."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file: give a file of weights")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
