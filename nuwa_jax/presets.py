"""The configs of the repository, for programs that start from one without being given it."""

from __future__ import annotations

import importlib

import ml_collections

from nuwa_jax.errors import UserError


def load_preset(name: str, variant: str | None = None) -> ml_collections.ConfigDict:
    """The config of configs/NAME.py.

    Raises:
      UserError: the folder `configs` is not there: it belongs to the repository, not the package.
    """
    try:
        return importlib.import_module(f"configs.{name}").get_config(variant)
    except ModuleNotFoundError as error:
        raise UserError(f"configs/{name}.py is not found: run this from the repository") from error
