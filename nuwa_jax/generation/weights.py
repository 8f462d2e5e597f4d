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
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nuwa_jax.errors import UserError

Params = dict[str, Any]
ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = ASSETS / "tiny"
EXAMPLE = ASSETS / "example"  # picture.png and drags.json to try a model on
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """Averaged float32 parameters, the config they were trained with, and where they are from."""

    params: Params
    config: ml_collections.ConfigDict
    source: str


def load_model(checkpoint: str | Path | None, stage: str | None = None) -> Model:
    """The model of a training run, of an exported folder, or (None) the one the package ships.

    Args:
      checkpoint: a `--workdir` of train.py or a folder that `save_model` wrote.
      stage: of a training run: the model as it was at the end of this stage.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = SHIPPED if checkpoint is None else Path(checkpoint)
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {folder} is not a folder: give the --workdir of train.py, or nothing for "
            "the model that the package ships"
        )
    if (folder / WEIGHTS).exists():
        if stage is not None:
            raise UserError(f"{folder} holds one finished model: leave out --stage={stage}")
        return _load_folder(folder)
    from nuwa_jax.training.checkpoint import load_final

    loaded = load_final(folder, stage)
    return Model(loaded.params, loaded.config, str(folder))


def save_model(model: Model, folder: str | Path, dtype: DTypeLike = jnp.bfloat16) -> Path:
    """Writes a model's weights, rounded to `dtype`, and its config; returns the weights' path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(model.params, sep="/")
    arrays = {name: np.asarray(jnp.asarray(leaf, dtype)) for name, leaf in flat.items()}
    save_file(arrays, folder / WEIGHTS)
    (folder / CONFIG).write_text(model.config.to_json(indent=1) + "\n")
    return folder / WEIGHTS


def _load_folder(folder: Path) -> Model:
    try:
        arrays = load_file(folder / WEIGHTS)
        config = ml_collections.ConfigDict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no whole model ({error}): export or copy it again"
        ) from error
    flat = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    return Model(traverse_util.unflatten_dict(flat, sep="/"), config, str(folder))
