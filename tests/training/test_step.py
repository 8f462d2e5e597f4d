import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import FakeModel
from micro_config import get_config

from nuwa_jax.data.batch import Batch
from nuwa_jax.errors import UserError
from nuwa_jax.models.lora import merge_lora
from nuwa_jax.training.curriculum import DropRates, stages_from_config
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import init_state
from nuwa_jax.training.step import draw, make_loss, make_train_step, stage_key

MODEL = FakeModel()
CONFIG = get_config()
STAGES = {stage.name: stage for stage in stages_from_config(CONFIG)}
PARAMS = MODEL.init(jax.random.key(0), height=16, width=24, frames=3)


class KernelModel(FakeModel):
    """With a linear layer where the real U-Net's have theirs."""

    def denoise(self, params, x, sigma, condition):
        unet = params["unet"] | {"out": params["unet"]["out"]["kernel"]}
        return super().denoise(params | {"unet": unet}, x, sigma, condition)


def make_batch(b=4, *, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        video=rng.integers(0, 256, (b, 3, 16, 24, 3), np.uint8),
        flow=rng.normal(size=(b, 3, 16, 24, 2)).astype(np.float16),
        points=rng.uniform(0, 16, (b, 2, 3, 2)).astype(np.float32),
        state=np.ones((b, 2, 3), np.uint8),
        text=rng.integers(0, 257, (b, 8)).astype(np.int32),
        fps=np.full(b, 8.0, np.float32),
    )


def run(stage, *, config=CONFIG, batch=None, steps=1, params=PARAMS, rate=1e-2):
    state = init_state(params, stage, make_optimizer(config.train))
    step = make_train_step(MODEL, config, stage)
    losses = []
    for n in range(steps):
        state, metrics = step(state, batch or make_batch(seed=n), jnp.float32(rate), 0.0)
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def leaves(tree):
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_changes_what_it_trains_and_not_one_bit_else(name):
    stage = STAGES[name]
    state, losses, _ = run(stage, steps=2)
    assert np.isfinite(losses).all()
    before, after = leaves(PARAMS), leaves(state.all_params())
    trained = leaves(state.params)
    assert before.keys() == after.keys()
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same != (path in trained), path


@pytest.mark.parametrize("name", STAGES)
def test_frozen_params_have_no_optimizer_state(name):
    stage = STAGES[name]
    state = init_state(PARAMS, stage, make_optimizer(CONFIG.train))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * count + 1


def test_training_lowers_the_loss():
    batch = make_batch()
    _, losses, _ = run(STAGES["autoencoder"], batch=batch, steps=60, rate=3e-3)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["autoencoder", "drag"])
def test_accumulating_micro_batches_equals_the_large_batch(name):
    config = get_config()
    whole, _, m1 = run(STAGES[name], config=config)
    config.train.accumulate = 2
    parts, _, m2 = run(STAGES[name], config=config)
    for key in m1:
        np.testing.assert_allclose(m1[key], m2[key], rtol=2e-5, err_msg=key)
    mu1, mu2 = leaves(whole.opt_state[0].mu), leaves(parts.opt_state[0].mu)
    for path in mu1:
        np.testing.assert_allclose(mu1[path], mu2[path], rtol=1e-4, atol=1e-7, err_msg=path)


def test_low_rank_updates_count_in_the_loss_and_learn():
    """Kept apart or added in: one loss; a stage may train them and leave their matrices."""
    stage, batch = STAGES["text_to_video"], make_batch()
    rng = np.random.default_rng(3)
    inputs, outputs = PARAMS["unet"]["out"].shape
    down, up = (0.3 * rng.normal(size=s).astype(np.float32) for s in ((inputs, 2), (2, outputs)))
    apart = PARAMS | {"unet": {**PARAMS["unet"], "out": {"kernel": PARAMS["unet"]["out"]}}}
    apart["lora"] = {"unet": {"out": {"down": down, "up": up}}}
    model = KernelModel()
    loss_fn = make_loss(model, CONFIG, stage)
    draws = draw(stage_key(0, 1), model, stage, batch, CONFIG.diffusion)
    losses = [loss_fn(params, batch, draws, 0.0)[0] for params in (apart, merge_lora(apart))]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    without = {k: v for k, v in apart.items() if k != "lora"}
    assert abs(loss_fn(without, batch, draws, 0.0)[0] - losses[0]) > 1e-4
    gradient = jax.grad(lambda lora: loss_fn(apart | {"lora": lora}, batch, draws, 0.0)[0])
    for leaf in jax.tree.leaves(gradient(apart["lora"])):
        assert np.abs(leaf).max() > 1e-6


def test_drags_are_drawn_with_every_option_of_the_config(monkeypatch):
    config, seen = get_config(), []
    config.raster.snap = True
    monkeypatch.setattr(
        "nuwa_jax.training.step.rasterize",
        lambda points, *args, **options: seen.append(options) or jnp.zeros((4, 3, 16, 24, 2)),
    )
    batch, stage = make_batch(), STAGES["drag"]
    draws = draw(stage_key(0, 3), MODEL, stage, batch, config.diffusion)
    make_loss(MODEL, config, stage)(PARAMS, batch, draws, 0.0)
    assert seen == [config.raster.to_dict()] and seen[0]["snap"]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # each leaves the update out in its own way
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(platform, monkeypatch):
    monkeypatch.setattr("nuwa_jax.training.step.platform", lambda: platform)
    stage = STAGES["drag"]
    optimizer = make_optimizer(CONFIG.train)
    step = make_train_step(MODEL, CONFIG, stage)
    good, bad = make_batch(), make_batch()
    bad.points[0, 0, 0] = np.nan
    state, _ = step(init_state(PARAMS, stage, optimizer), good, 1e-2, 0.0)
    before = leaves((state.params, state.ema, state.opt_state))
    for n in (1, 2):
        state, metrics = step(state, bad, 1e-2, 0.0)
        assert not np.isfinite(metrics["loss"])
        assert metrics["skipped"] == n
    after = leaves((state.params, state.ema, state.opt_state))
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])
    assert state.step == 3
    _, metrics = step(state, good, 1e-2, 0.0)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


def test_a_stage_refuses_to_start_from_params_that_are_not_finite():
    params = PARAMS | {"drag": {"kernel": PARAMS["drag"]["kernel"].at[0, 0].set(jnp.inf)}}
    with pytest.raises(UserError, match="stage flow cannot start .*drag/kernel"):
        init_state(params, STAGES["flow"], make_optimizer(CONFIG.train))


def test_conditions_are_dropped_independently_at_their_rates():
    stage = dataclasses.replace(STAGES["drag"], drop=DropRates(0.1, 0.3, 0.6))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch(4)))
    batch = jax.tree.map(lambda a: np.zeros((4000, *a.shape[1:]), np.uint8), batch)
    drop = draw(stage_key(0, 3), MODEL, stage, batch, CONFIG.diffusion).drop
    drop = np.stack([drop.text, drop.image, drop.drag]).astype(float)
    np.testing.assert_allclose(drop.mean(1), [0.1, 0.3, 0.6], atol=0.03)
    assert np.abs(np.corrcoef(drop)[np.triu_indices(3, 1)]).max() < 0.06


def test_steps_and_stages_draw_different_noise_and_the_same_one_again():
    batch, stage = make_batch(), STAGES["drag"]
    keys = [
        jax.random.fold_in(stage_key(seed, index), step)
        for seed, index, step in [(0, 1, 5), (0, 1, 6), (0, 2, 5), (1, 1, 5), (0, 1, 5)]
    ]
    noise = [np.asarray(draw(k, MODEL, stage, batch, CONFIG.diffusion).noise) for k in keys]
    assert len({n.tobytes() for n in noise[:4]}) == 4
    np.testing.assert_array_equal(noise[0], noise[4])


def test_dense_to_sparse_shows_dense_flow_first_and_drags_last():
    batch = make_batch()
    losses = {}
    for name, schedule in [("annealed", (1.0, 0.0)), ("dense", (1.0, 1.0)), ("sparse", (0.0, 0.0))]:
        stage = dataclasses.replace(STAGES["drag"], dense_to_sparse=schedule)
        loss_fn = make_loss(MODEL, CONFIG, stage)
        draws = draw(stage_key(0, 3), MODEL, stage, batch, CONFIG.diffusion)
        losses[name] = [float(loss_fn(PARAMS, batch, draws, p)[0]) for p in (0.0, 1.0)]
    assert losses["annealed"] == [losses["dense"][0], losses["sparse"][1]]
    assert losses["dense"][0] != losses["sparse"][0]


def test_each_stage_looks_at_the_conditions_it_names():
    batch, other = make_batch(), make_batch(seed=1)
    sees = {}
    for name in ("text_to_video", "flow", "drag"):
        stage = dataclasses.replace(STAGES[name], drop=DropRates())
        loss_fn = make_loss(MODEL, CONFIG, stage)
        draws = draw(stage_key(0, 1), MODEL, stage, batch, CONFIG.diffusion)
        loss = loss_fn(PARAMS, batch, draws, 0.0)[0]
        sees[name] = {
            field
            for field in ("flow", "points", "text")
            if loss_fn(PARAMS, batch._replace(**{field: getattr(other, field)}), draws, 0.0)[0]
            != loss
        }
    assert sees == {
        "text_to_video": {"text"},
        "flow": {"text", "flow"},
        "drag": {"text", "points"},
    }
