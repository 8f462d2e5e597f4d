import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from micro_config import get_config

from nuwa_jax.training.curriculum import stages_from_config
from nuwa_jax.training.optim import clip_by_norm, ema_update, learning_rate, make_optimizer

TRAIN = get_config().train
STAGE = dataclasses.replace(
    stages_from_config(get_config())[0], steps=100, warmup_steps=10, learning_rate=2.0
)


def test_rate_warms_up_stays_and_decays_to_zero():
    rates = [learning_rate(STAGE, TRAIN, step, step / 100) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(rates[10:80], 2.0)
    np.testing.assert_allclose(rates[80:], np.linspace(2.0, 0.1, 20), rtol=1e-6)
    assert learning_rate(STAGE, TRAIN, 100, 1.0) == 0


def test_cosine_decays_over_its_share_and_constant_does_not_decay():
    train = TRAIN.copy_and_resolve_references()
    train.decay, train.decay_share = "cosine", 1.0
    assert learning_rate(STAGE, train, 50, 0.5) == pytest.approx(1.0)
    train.decay = "constant"
    assert learning_rate(STAGE, train, 99, 0.99) == 2.0


def test_the_clock_may_end_a_stage_before_its_steps_do():
    assert learning_rate(STAGE, TRAIN, 20, 0.9) == pytest.approx(1.0)


def test_young_averages_follow_fast():
    ema, params = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    assert ema_update(ema, params, jnp.int32(0), 0.999)["w"][0] == pytest.approx(0.9)
    assert ema_update(ema, params, jnp.int32(10**6), 0.999)["w"][0] == pytest.approx(
        0.001, rel=1e-3
    )


def test_gradients_are_clipped_to_the_norm_and_not_lengthened():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped = clip_by_norm(grads, optax.tree.norm(grads), 1.0)
    assert float(optax.tree.norm(clipped)) == pytest.approx(1.0)
    assert clip_by_norm(grads, optax.tree.norm(grads), 10.0)["a"][0] == 3.0
    assert clip_by_norm(grads, optax.tree.norm(grads), 0.0) is grads


def test_only_matrices_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(TRAIN)
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], TRAIN.weight_decay, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
