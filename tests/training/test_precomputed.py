"""Training on latents and text embeddings that were made beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import FakeModel
from micro_config import get_config
from prepared_clips import make_clips

from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.data.tokenizer import encode_text
from nuwa_jax.data.video import read_video
from nuwa_jax.errors import UserError
from nuwa_jax.models.video_ldm import VideoLDM, to_float
from nuwa_jax.parallel.sharding import place
from nuwa_jax.training import loop
from nuwa_jax.training.curriculum import stages_from_config
from nuwa_jax.training.loop import train
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import init_state
from nuwa_jax.training.step import draw, make_loss, make_train_step, stage_key

CONFIG = get_config()
CONFIG.stages.drag.rules = (("^(unet|flow_encoder|drag)/", "train"), ("^[atl]", "freeze"))
CONFIG.stages.drag.drop.update(text=0.4, image=0.4, drag=0.2)
STAGES = {stage.name: stage for stage in stages_from_config(CONFIG)}
MODEL = VideoLDM.from_config(CONFIG.model)


@pytest.fixture(scope="module")
def params():
    """No part of it is zero, so that every condition counts."""
    fresh = MODEL.init(jax.random.key(0), height=16, width=24, frames=3)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + rng.normal(scale=0.1, size=a.shape).astype(a.dtype), fresh)
    scale = {"mean": jnp.array([0.1, -0.2, 0.3, 0.0]), "scale": jnp.array([1.0, 2.0, 0.5, 1.5])}
    return params | {"latents": scale}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, params):
    """Prepared with videos and latents, and with latents alone."""
    encode = jax.jit(MODEL.encode)
    encode_texts = jax.jit(MODEL.encode_text)

    def change(record, scene):
        del scene
        video, _ = read_video(record.video)
        latents = np.concatenate([encode(params, to_float(v)[None, None])[0] for v in video])
        text = encode_text(record.caption, CONFIG.data.text_length)
        return dataclasses.replace(
            record,
            latents=latents.astype(np.float16),
            text_embedding=np.asarray(encode_texts(params, text[None])[0], np.float16),
        )

    def bare(record, scene):
        return dataclasses.replace(change(record, scene), video=b"", content_hash="")

    make = lambda name, change: make_clips(  # noqa: E731
        tmp_path_factory.mktemp(name), count=3, frames=5, height=16, width=24, change=change
    )
    return {"both": make("both", change), "bare": make("bare", bare)}


def data_config(folder, **entries):
    entries = {"format": "latents", **entries}
    config = get_config().data
    config.update(clips=folder, clips_weight=1.0, scenes_weight=0.0, threads=0, **entries)
    return DataConfig.from_config(config)


def batch_of(folder, b=2, *, with_flow=True, with_picture=False, **entries):
    batches = make_batches(
        data_config(folder, **entries),
        seed=5,
        batch_size=b,
        with_flow=with_flow,
        with_picture=with_picture,
    )
    batch = next(batches)
    batches.close()
    return batch


@pytest.mark.parametrize("name", ["flow", "drag"])
def test_loss_on_precomputed_latents_equals_that_of_encoding(params, folders, name):
    stage = STAGES[name]
    loss_fn = jax.jit(make_loss(MODEL, CONFIG, stage))
    video = batch_of(folders["both"], 2, format="video")
    latents = batch_of(folders["both"], 2)
    assert video.latents is None and latents.video is None
    draws = draw(stage_key(0, 3), MODEL, stage, video, CONFIG.diffusion)
    expected, _ = loss_fn(params, video, draws, 0.0)
    # Neither encoder is needed any more but for the empty caption.
    without = {**params, "autoencoder": {}}
    loss, _ = loss_fn(without, latents, draws, 0.0)
    np.testing.assert_allclose(loss, expected, rtol=2e-3)
    for field in ("latents", "text_embedding"):
        other = latents._replace(**{field: getattr(latents, field)[::-1]})
        changed, _ = loss_fn(without, other, draws, 0.0)
        assert abs(changed - expected) > 10 * abs(loss - expected), field


def test_draws_are_those_of_encoding(folders):
    stage = STAGES["drag"]
    draws = [
        draw(stage_key(0, 3), MODEL, stage, batch, CONFIG.diffusion)
        for batch in (batch_of(folders["both"], 1, format="video"), batch_of(folders["both"], 1))
    ]
    jax.tree.map(np.testing.assert_array_equal, *draws)


def test_folders_with_and_without_videos_give_the_same_latents(folders):
    both, bare = (batch_of(folders[name]) for name in ("both", "bare"))
    jax.tree.map(np.testing.assert_array_equal, both, bare)
    assert both.latents.shape == (2, 3, 4, 6, 4) and both.latents.dtype == np.float16
    assert both.text_embedding.shape == (2, 2, 8)
    pictured = batch_of(folders["both"], with_picture=True)
    video = batch_of(folders["both"], format="video")
    assert pictured.video.shape == (2, 1, 16, 24, 3)
    np.testing.assert_array_equal(pictured.video, video.video[:, :1])


def test_what_does_not_fit_is_told(folders, params, tmp_path):
    plain = make_clips(tmp_path / "plain", count=2, frames=5, height=16, width=24)
    small = get_config()
    small.data.height = small.data.width = 16
    for message, folder, entries in (
        ("has no latents", plain, {}),
        ("latents of 16x24, data is 24x24", folders["both"], {"height": 24}),
        ("latents without videos", folders["bare"], {"format": "video"}),
        ("latents without videos", folders["bare"], {"with_picture": True}),
    ):
        with pytest.raises(UserError, match=message):
            batch_of(folder, **entries)

    batch = batch_of(folders["bare"])
    stage = STAGES["text_to_video"]

    def step(batch):
        state = init_state(params, stage, make_optimizer(CONFIG.train))
        make_train_step(MODEL, CONFIG, stage)(state, batch, 1e-3, 0.0)

    with pytest.raises(UserError, match="text_to_video trains the text encoder"):
        step(batch)
    with pytest.raises(UserError, match=r"latents have shape \(3, 2, 6, 4\), .*\(3, 4, 6, 4\)"):
        step(batch._replace(latents=batch.latents[:, :, ::2]))


def test_a_run_trains_on_latents_and_refuses_to_train_an_autoencoder_on_them(tmp_path, monkeypatch):
    def change(record, scene):
        del scene
        latents = np.full((5, 4, 6, 2), int(record.source_id), np.float16)
        return dataclasses.replace(record, video=b"", latents=latents, content_hash="")

    folder = make_clips(tmp_path / "clips", count=3, frames=5, height=16, width=24, change=change)
    monkeypatch.setattr(VideoLDM, "from_config", lambda config: FakeModel())
    config = get_config()
    config.data.update(clips=folder, clips_weight=1.0, scenes_weight=0.0, format="latents")
    with pytest.raises(UserError, match="stages.autoencoder trains the autoencoder"):
        train(config, tmp_path / "refused")
    config.curriculum = ("text_to_video", "flow", "drag")
    checked, placed = [], []

    def place_and_note(tree, mesh):
        tree = place(tree, mesh)
        placed.extend(jax.tree.leaves(tree))
        return tree

    monkeypatch.setattr(loop, "place", place_and_note)
    monkeypatch.setattr(loop, "check_encoders", lambda params, made: checked.append(params))
    result = train(config, tmp_path / "run")
    assert (result.stage, result.step) == ("drag", 6)
    # Placed parameters need not be whole on a host: none of them is looked at.
    (params,) = checked
    assert placed and not {id(a) for a in placed} & {id(a) for a in jax.tree.leaves(params)}
