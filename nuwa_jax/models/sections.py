"""Sections of a config to the dataclasses that describe parts of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

from nuwa_jax.errors import UserError
from nuwa_jax.models.clip_text import ClipTextConfig
from nuwa_jax.models.text import TextEncoderConfig


def text_section(config: Any) -> TextEncoderConfig | ClipTextConfig | None:
    """`model.text`, whose `kind` says which encoder it is: one of bytes unless it says "clip"."""
    if config is None:
        return None
    kinds = {"bytes": TextEncoderConfig, "clip": ClipTextConfig}
    kind = config.get("kind", "bytes")
    if kind not in kinds:
        raise UserError(f"model.text.kind must be one of {tuple(kinds)}, got {kind!r}")
    return section(kinds[kind], {k: v for k, v in config.items() if k != "kind"})


def section(cls: type, config: Any) -> Any:
    """A dataclass from a config section; lists become tuples, an unknown key is an error."""
    if config is None:
        return None
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = set(config) - names
    if unknown:
        raise UserError(f"{cls.__name__} has no {sorted(unknown)}: its keys are {sorted(names)}")
    return cls(**{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in config.items()})
