"""A model as one file of weights with its config beside it: what is shipped and passed on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from nuwa_jax.errors import UserError
from nuwa_jax.tensor_files import SafetensorsFile, Spec, write_safetensors

Params = dict[str, Any]
ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = ASSETS / "tiny"
EXAMPLE = ASSETS / "example"  # picture.png and drags.json to try a model on
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FLOAT32_PARTS = ("latents/",)  # a handful of numbers that everything is multiplied with


@dataclasses.dataclass(frozen=True)
class Model:
    """Averaged parameters, the config they were trained with, and where they are from."""

    params: Params
    config: ml_collections.ConfigDict
    source: str


def load_model(
    checkpoint: str | Path | None,
    stage: str | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> Model:
    """The model of a training run, of an exported folder, or (None) the one the package ships.

    Args:
      checkpoint: a `--workdir` of train.py, also in a bucket, or a folder that `save_model` wrote.
      stage: of a training run: the model as it was at the end of this stage.
      param_dtype: of the weights in memory; bfloat16 halves what they take.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if "://" in str(checkpoint):
        return _of_run(str(checkpoint), stage, param_dtype)
    folder = SHIPPED if checkpoint is None else Path(checkpoint)
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {folder} is not a folder: give the --workdir of train.py, or nothing for "
            "the model that the package ships"
        )
    if (folder / WEIGHTS).exists():
        if stage is not None:
            raise UserError(f"{folder} holds one finished model: leave out --stage={stage}")
        return _load_folder(folder, param_dtype)
    return _of_run(str(folder), stage, param_dtype)


def save_model(model: Model, folder: str | Path, dtype: DTypeLike = jnp.bfloat16) -> Path:
    """Writes a model's weights, rounded to `dtype`, and its config; returns the weights' path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(model.params, sep="/")
    arrays = {
        name: np.asarray(leaf, np.float32 if name.startswith(FLOAT32_PARTS) else jnp.dtype(dtype))
        for name, leaf in flat.items()
    }
    specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(folder / WEIGHTS, specs, arrays.items())
    (folder / CONFIG).write_text(model.config.to_json(indent=1) + "\n")
    return folder / WEIGHTS


def _of_run(workdir: str, stage: str | None, param_dtype: DTypeLike) -> Model:
    from nuwa_jax.training.checkpoint import load_final

    loaded = load_final(workdir, stage)
    flat = traverse_util.flatten_dict(loaded.params, sep="/")
    params = {name: _placed(name, leaf, param_dtype) for name, leaf in flat.items()}
    return Model(traverse_util.unflatten_dict(params, sep="/"), loaded.config, workdir)


def _load_folder(folder: Path, param_dtype: DTypeLike) -> Model:
    try:
        config = ml_collections.ConfigDict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no whole model ({error}): export or copy it again"
        ) from error
    file = SafetensorsFile(folder / WEIGHTS)
    # One at a time: a large model must not be in memory twice.
    flat = {name: _placed(name, file.read(name), param_dtype) for name in file.specs}
    return Model(traverse_util.unflatten_dict(flat, sep="/"), config, str(folder))


def _placed(name: str, array: ArrayLike, dtype: DTypeLike) -> Array:
    return jnp.asarray(array, jnp.float32 if name.startswith(FLOAT32_PARTS) else dtype)
