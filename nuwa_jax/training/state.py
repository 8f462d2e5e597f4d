"""What a training step carries forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Int

from nuwa_jax.errors import UserError
from nuwa_jax.training.curriculum import Params, Stage, merge, partition_for


class TrainState(NamedTuple):
    """State of a stage after `step` steps; a pytree whose buffers the step takes over.

    `params`, `ema` and `opt_state` hold the stage's trainable part alone. There is no random key:
    each step derives its own from the seed, the stage and `step`.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]  # steps in a row left out because loss or gradient was not finite
    params: Params
    frozen: Params
    ema: Params
    opt_state: Any

    def all_params(self) -> Params:
        """Trainable and frozen parameters, as the model takes them."""
        return merge(self.params, self.frozen)

    def all_ema(self) -> Params:
        """As `all_params`, with the running average in place of what is being trained."""
        return merge(self.ema, self.frozen)


def init_state(params: Params, stage: Stage, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at the start of a stage; the running average starts at `params` itself.

    Raises:
      UserError: the stage's rules do not fit the parameters, or one of these is not finite.
    """
    partition_for(stage, params)  # first, as what it says of wrong rules is the plainer
    _check_finite(stage, params)
    return fresh_state(params, stage, optimizer)


def fresh_state(
    params: Params, stage: Stage, optimizer: optax.GradientTransformation
) -> TrainState:
    """`init_state` without a look at the values, which shapes alone (`jax.eval_shape`) do not have.

    Raises:
      UserError: the stage's rules do not fit the parameters.
    """
    trainable, frozen = partition_for(stage, params)
    copy = lambda tree: jax.tree.map(lambda a: jnp.array(a, copy=True), tree)  # noqa: E731
    # Copies, because the step donates every buffer and none may be given away twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=copy(trainable),
        frozen=copy(frozen),
        ema=copy(trainable),
        opt_state=optimizer.init(trainable),
    )


def _check_finite(stage: Stage, params: Params) -> None:
    # Where a stage freezes such a parameter it may do no harm for hours; a later one trains it.
    flat = traverse_util.flatten_dict(params, sep="/")
    finite = jax.device_get(
        jax.jit(lambda p: {k: jnp.isfinite(v).all() for k, v in p.items()})(flat)
    )
    broken = [path for path, ok in finite.items() if not ok]
    if broken:
        raise UserError(
            f"stage {stage.name} cannot start from parameters that are not finite: {broken[0]} and "
            f"{len(broken) - 1} more; repair the model they come from"
        )
