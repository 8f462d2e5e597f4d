"""Config entries that change with the training step.

Any number in the config of drag synthesis may be a schedule, in a config file a mapping such as
`{"start": 64, "end": 8, "steps": 10000}`. `at_step` puts numbers in their places. What it returns
depends on the config and the step alone, so that a run that goes on at a step sees what one that
was never stopped saw there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from nuwa_jax.errors import UserError

_Config = TypeVar("_Config")

_KEYS = {"start", "end", "steps"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end`, linearly, in the first `steps` steps.

    Raises:
      ValueError: it takes less than a step.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a schedule takes 1 step or more, got {self.steps}")

    def at(self, step: int) -> float:
        """Its value at a step, counted from 0."""
        share = min(max(step, 0) / self.steps, 1.0)
        return self.start + (self.end - self.start) * share


def at_step(config: _Config, step: int) -> _Config:
    """The config with the value at `step` in the place of every schedule in it.

    Configs within configs are resolved too. Entries whose default is an integer are rounded.
    """
    if not schedules_of(config):
        return config
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Schedule):
            number = value.at(step)
            value = round(number) if type(field.default) is int else number
        elif dataclasses.is_dataclass(value):
            value = at_step(value, step)
        elif isinstance(value, tuple):
            value = tuple(_within_pair(each, step) for each in value)
        values[field.name] = value
    return type(config)(**values)


def at_end(config: _Config) -> _Config:
    """The config as it is once all of its schedules have come to their ends."""
    return at_step(config, max((each.steps for each in schedules_of(config)), default=0))


def schedules_of(config: Any) -> list[Schedule]:
    """Every schedule in a config, those of the configs within it included."""
    if isinstance(config, Schedule):
        return [config]
    if isinstance(config, tuple):
        return [found for each in config for found in schedules_of(each)]
    if dataclasses.is_dataclass(config):
        values = (getattr(config, field.name) for field in dataclasses.fields(config))
        return [found for value in values for found in schedules_of(value)]
    return []


def check_ends(config: Any) -> bool:
    """Whether a config has schedules; if so, makes sure that it holds at all of their ends.

    A config that calls this first in `__post_init__`, and returns if it is true, checks its entries
    as numbers only. As schedules are linear, bounds on entries and on their order that hold where a
    schedule begins and ends hold in between.

    Raises:
      ValueError: the config does not hold at one of those steps.
    """
    schedules = schedules_of(config)
    for step in sorted({0, *(schedule.steps for schedule in schedules)} if schedules else ()):
        try:
            at_step(config, step)
        except ValueError as error:
            raise ValueError(f"{error} (at step {step} of its schedules)") from error
    return bool(schedules)


def build_config(
    cls: type[_Config], values: Mapping[str, Any], where: str, *, schedules: bool = True
) -> _Config:
    """A config dataclass from plain values, as config files and JSON have them.

    Args:
      cls: of which a config is made.
      values: its entries. What they do not name keeps its default.
      where: what comes before an entry's name in messages.
      schedules: whether a mapping in the place of a number is a schedule.

    Raises:
      UserError: an entry is unknown or its value makes no sense.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    entries = {}
    for name, value in dict(values).items():
        if name not in defaults:
            raise UserError(
                f"{where}.{name} is not a known entry: use one of {', '.join(defaults)}"
            )
        if schedules and hasattr(value, "items"):
            value = _from_mapping(dict(value), defaults[name], f"{where}.{name}")
        entries[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**entries)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _from_mapping(given: dict[str, Any], default: Any, where: str) -> Any:
    if default == ():  # of configs by name
        return given
    if type(default) not in (int, float):
        raise UserError(f"{where} is not a number: it cannot be a schedule, got {given}")
    if set(given) != _KEYS or any(type(each) not in (int, float) for each in given.values()):
        raise UserError(
            f"{where} is a number, or a schedule with the numbers start, end and steps, got {given}"
        )
    try:
        return Schedule(**given)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _within_pair(value: Any, step: int) -> Any:
    """A named config in a tuple of (name, config) pairs, resolved; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_within_pair(each, step) for each in value)
    return at_step(value, step) if dataclasses.is_dataclass(value) else value
