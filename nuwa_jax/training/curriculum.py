"""The curriculum as data: what each stage trains, freezes, sees and drops."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from nuwa_jax.errors import UserError

Params = dict[str, Any]
Rules = Sequence[tuple[str, str]]

OBJECTIVES = ("reconstruct", "denoise")
CONDITIONS = ("none", "flow", "drag")
ACTIONS = ("train", "freeze")
# Per-channel statistics of the latents; measured after a "reconstruct" stage, never trained.
LATENTS = "latents"


@dataclasses.dataclass(frozen=True)
class DropRates:
    """Probabilities with which each condition is withheld from a sample, independently."""

    text: float = 0.0
    image: float = 0.0
    drag: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the curriculum.

    Attributes:
      name: unique within the curriculum; names the checkpoint directory.
      index: its place in the curriculum, from 0; enters the random keys.
      objective: "reconstruct" trains the autoencoder, "denoise" the diffusion model.
      condition: motion that the model is shown: "none", "flow" (the clip's dense flow) or "drag"
        (the synthesised drags, as points and drawn as a flow map).
      steps: length of the stage.
      batch_size: samples per step over all hosts.
      learning_rate: after warm-up and before decay.
      warmup_steps: steps of linear warm-up.
      rules: (regex, "train" | "freeze"); `re.search` over the parameter's path "a/b/c". Every
        parameter is matched by exactly one of them.
      drop: how often each condition is withheld.
      time_budget_minutes: the stage ends here if its steps have not ended it before; 0: no limit.
      dense_to_sparse: probability at the start and at the end of the stage, linear between, that
        a sample of a "drag" stage is shown its dense flow in place of the drawn one.
    """

    name: str
    index: int
    objective: str
    condition: str
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    rules: tuple[tuple[str, str], ...]
    drop: DropRates = DropRates()
    time_budget_minutes: float = 0.0
    dense_to_sparse: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        def check(ok: bool, key: str, expected: str) -> None:
            if not ok:
                came = getattr(self, key)
                raise UserError(f"stages.{self.name}.{key} must be {expected}, got {came!r}")

        check(self.objective in OBJECTIVES, "objective", f"one of {OBJECTIVES}")
        check(self.condition in CONDITIONS, "condition", f"one of {CONDITIONS}")
        check(self.steps > 0, "steps", "at least 1")
        check(self.batch_size > 0, "batch_size", "at least 1")
        check(self.learning_rate > 0, "learning_rate", "greater than 0")
        check(self.warmup_steps >= 0, "warmup_steps", "0 or more")
        check(self.time_budget_minutes >= 0, "time_budget_minutes", "0 (no limit) or more")
        rates = dataclasses.astuple(self.drop)
        check(all(0 <= r <= 1 for r in rates), "drop", "probabilities in [0, 1]")
        dense = self.dense_to_sparse
        check(
            len(dense) == 2 and all(0 <= p <= 1 for p in dense),
            "dense_to_sparse",
            "two probabilities in [0, 1], at the stage's start and end",
        )
        if any(dense) and self.condition != "drag":
            check(False, "dense_to_sparse", 'zeros unless condition is "drag"')
        for rule in self.rules:
            if len(rule) != 2 or rule[1] not in ACTIONS:
                check(False, "rules", f"pairs of a regex and one of {ACTIONS}")

    @property
    def label(self) -> str:
        """Name of the stage's directory; sorts in the curriculum's order."""
        return f"{self.index:02d}_{self.name}"

    @property
    def needs_flow(self) -> bool:
        """Whether batches must carry dense flow."""
        return self.condition == "flow" or any(self.dense_to_sparse)


def stages_from_config(config: Any) -> list[Stage]:
    """The stages named by `config.curriculum`, in order.

    Raises:
      UserError: an unknown or repeated stage, a missing or unknown key, a value out of range.
    """
    names = list(config.curriculum)
    if not names or len(set(names)) != len(names):
        raise UserError(f"curriculum must name at least one stage, each once, got {names}")
    unknown = [name for name in names if name not in config.stages]
    if unknown:
        raise UserError(
            f"curriculum names {unknown}, but config.stages has only {sorted(config.stages)}"
        )
    return [_stage(name, index, config.stages[name]) for index, name in enumerate(names)]


def partition(params: Params, rules: Rules) -> tuple[Params, Params]:
    """Splits nested params into (trainable, frozen), both nested as `params`.

    Raises:
      UserError: a parameter matched by no rule or by several, named with those rules.
    """
    parts: dict[str, dict[str, Any]] = {"train": {}, "freeze": {}}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        matched = [rule for rule in rules if re.search(rule[0], path)]
        if len(matched) != 1:
            found = "no rule" if not matched else f"several rules, {[r[0] for r in matched]}"
            raise UserError(
                f"parameter {path} is matched by {found}: exactly one of {[r[0] for r in rules]} "
                "must match it; change the stage's rules"
            )
        parts[matched[0][1]][path] = leaf
    return tuple(traverse_util.unflatten_dict(parts[a], sep="/") for a in ACTIONS)


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `partition`."""
    flat = traverse_util.flatten_dict(trainable, sep="/")
    flat |= traverse_util.flatten_dict(frozen, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")


def overlay(params: Params, given: Params) -> Params:
    """`params` with those of `given` in their places.

    Raises:
      UserError: one that is given has no place, or another shape.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in traverse_util.flatten_dict(given, sep="/").items():
        wanted = flat[path].shape if path in flat else None
        if wanted != leaf.shape:
            raise UserError(
                f"the initial weights have {path} {leaf.shape}, the config's model has "
                f"{wanted or 'no such parameter'}: give a config with the model section of the "
                "weights' config.json"
            )
        flat[path] = leaf
    return traverse_util.unflatten_dict(flat, sep="/")


def partition_for(stage: Stage, params: Params) -> tuple[Params, Params]:
    """`partition` by the stage's rules, with the checks that only a stage can make."""
    try:
        trainable, frozen = partition(params, stage.rules)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
    if not trainable:
        raise UserError(f"stage {stage.name}: its rules train no parameter; change its rules")
    if LATENTS in trainable:
        raise UserError(
            f"stage {stage.name}: {LATENTS}/ holds measured statistics and must be frozen"
        )
    return trainable, frozen


def _stage(name: str, index: int, section: Any) -> Stage:
    given = {key: section[key] for key in section}
    fields = {f.name: f for f in dataclasses.fields(Stage) if f.name not in ("name", "index")}
    unknown = sorted(set(given) - set(fields))
    missing = sorted(
        key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in given
    )
    if unknown or missing:
        raise UserError(
            f"stages.{name} lacks {missing} and has unknown {unknown}: its keys are "
            f"{sorted(fields)}"
        )
    if "drop" in given:
        drop = given["drop"]
        if not isinstance(drop, Mapping) and not hasattr(drop, "items"):
            raise UserError(f"stages.{name}.drop must have the keys text, image, drag, got {drop}")
        extra = sorted(set(drop) - {"text", "image", "drag"})
        if extra:
            raise UserError(f"stages.{name}.drop has unknown keys {extra}: text, image, drag")
        given["drop"] = DropRates(**{key: float(drop[key]) for key in drop})
    given["rules"] = tuple(tuple(rule) for rule in given["rules"])
    if "dense_to_sparse" in given:
        given["dense_to_sparse"] = tuple(given["dense_to_sparse"])
    return Stage(name=name, index=index, **given)
