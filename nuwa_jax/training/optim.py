"""The optimizer, its learning rate, and the running average of the weights."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nuwa_jax.training.curriculum import Params, Stage

DECAYS = ("constant", "linear", "cosine")


def make_optimizer(train: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) without its learning rate, which the step multiplies in.

    So the rate may depend on the clock, where a stage has a time budget, and nothing recompiles.
    Weights decay only where they multiply (two axes or more), not biases and norms' scales.
    """
    return optax.chain(
        optax.scale_by_adam(b1=train.adam_b1, b2=train.adam_b2),
        optax.add_decayed_weights(
            train.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        ),
    )


def clip_by_norm(grads: Params, norm: Float[Array, ""], limit: float) -> Params:
    """Scales `grads`, whose global norm is `norm`, down to a norm of at most `limit`; 0: as is."""
    if not limit:
        return grads
    factor = jnp.minimum(1.0, limit / (norm + 1e-12))
    return jax.tree.map(lambda g: g * factor, grads)


def learning_rate(stage: Stage, train: Any, step: int, progress: float) -> float:
    """The rate of one step: linear warm-up, level, and a decay to zero over the last share.

    Args:
      stage: gives the level and the length of the warm-up.
      train: `config.train`; `decay` is one of `DECAYS`, `decay_share` the share
        of the stage that it takes.
      step: from 0.
      progress: share of the stage that is done, in [0, 1].
    """
    rate = stage.learning_rate * min(1.0, (step + 1) / max(1, stage.warmup_steps))
    if train.decay == "constant" or train.decay_share <= 0:
        return rate
    left = min(1.0, max(0.0, 1.0 - progress) / train.decay_share)
    return rate * (left if train.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def ema_update(ema: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
    """Running average of the weights; young ones forget faster: min(decay, (1 + n) / (10 + n))."""
    n = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda e, p: e + (1 - rate) * (p - e), ema, params)
