"""Whose encoders made the latents and text embeddings of prepared clips, and whether they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from flax import traverse_util

from nuwa_jax.errors import UserError
from nuwa_jax.training.curriculum import LATENTS, Params

AUTOENCODER, TEXT = "autoencoder", "text"


def encoder_hashes(params: Params) -> dict[str, str]:
    """SHA-256 of the parameters that latents, and text embeddings, are made with.

    The key "text" is absent where the model has no text encoder.
    """
    parts = {AUTOENCODER: {"encoder": params["autoencoder"]["encoder"], LATENTS: params[LATENTS]}}
    if TEXT in params:
        parts[TEXT] = params[TEXT]
    return {name: _hash(part) for name, part in parts.items()}


def check_encoders(params: Params, made_with: Sequence[Mapping[str, str]]) -> None:
    """Refuses latents and text embeddings of other encoders than the model's.

    Args:
      params: of the model that is to be trained.
      made_with: the `encoders` of each prepared folder's manifest.

    Raises:
      UserError: some were made with others.
    """
    ours = encoder_hashes(params)
    for theirs in made_with:
        differing = sorted(name for name, made in theirs.items() if ours.get(name) != made)
        if differing:
            raise UserError(
                f"the prepared clips were encoded with another {' and '.join(differing)} than the "
                "model's: set train.init_from to the model that "
                "`python -m nuwa_jax.generation.precompute` was given, or run it again"
            )


def _hash(part: Params) -> str:
    digest = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(part, sep="/").items()):
        array = np.ascontiguousarray(np.asarray(leaf, np.float32))
        digest.update(f"{path} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()
