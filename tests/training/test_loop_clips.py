"""Runs on prepared clips: which ones a run may go on in, and what the loop makes of them."""

import jax
import jax.numpy as jnp
import pytest
from fake_model import FakeModel
from loop_runs import Watched, short_config, watch
from prepared_clips import make_clips
from running import die_after, losses

from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.device import to_device
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.errors import UserError
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.training.curriculum import stages_from_config
from nuwa_jax.training.loop import train
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import init_state
from nuwa_jax.training.step import make_train_step


@pytest.fixture(autouse=True)
def fake_model(monkeypatch):
    monkeypatch.setattr(VideoLDM, "from_config", lambda config: FakeModel())


def test_going_on_with_other_clips_is_refused(tmp_path, monkeypatch):
    config = short_config("text_to_video")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 4)
        train(config, tmp_path)
    watch(monkeypatch, lambda batches, _: next(batches))
    monkeypatch.setattr(Watched, "fingerprint", "of other clips", raising=False)
    with pytest.raises(UserError, match="not those that .* was trained on"):
        train(config, tmp_path)
    config.data.allow_changed_clips = True
    assert train(config, tmp_path).step == 6


def test_clips_may_lie_elsewhere_when_going_on_but_must_be_the_same(tmp_path, monkeypatch):
    def folders(place):
        options = dict(frames=4, height=20, width=24)
        clips = make_clips(tmp_path / place / "clips", count=3, **options)
        return clips, make_clips(tmp_path / place / "more", count=2, name="more", **options)

    def use(clips, more, weight=1.0):
        config.data.update(clips=clips, clips_weight=1.0)
        config.data.sources = ({"kind": "records", "path": more, "weight": weight},)

    config = short_config("text_to_video")
    use(*folders("here"))
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 4)
        train(config, tmp_path / "dead")
    (tmp_path / "here").rename(tmp_path / "there")
    clips, more = (str(tmp_path / "there" / name) for name in ("clips", "more"))
    use(clips, more, weight=2.0)
    with pytest.raises(UserError, match=r"data.sources\[0\].weight: checkpoint 1.0, config 2.0"):
        train(config, tmp_path / "dead")
    use(more, clips)
    with pytest.raises(UserError, match="not those that .* was trained on"):
        train(config, tmp_path / "dead")
    use(clips, more)
    train(config, tmp_path / "dead")
    assert losses(tmp_path / "dead") == losses(tmp_path / "whole")


def test_a_run_goes_on_in_other_clips_if_that_is_allowed(tmp_path, monkeypatch):
    config = short_config("text_to_video")
    options = dict(frames=4, height=20, width=24)
    config.data.update(clips=make_clips(tmp_path / "old", count=3, **options), clips_weight=1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 4)
        train(config, tmp_path / "run")
    config.data.clips = make_clips(tmp_path / "new", count=4, **options)
    with pytest.raises(UserError, match=r"\(.*new\) are not those that .*allow_changed_clips=true"):
        train(config, tmp_path / "run")
    config.data.allow_changed_clips = True
    assert train(config, tmp_path / "run").step == 6


def test_clips_that_change_between_stages_are_refused(tmp_path):
    options = dict(frames=4, height=20, width=24)
    folder = make_clips(tmp_path / "clips", count=3, **options)

    def config_of(*curriculum):
        config = short_config(*curriculum)
        config.data.update(clips=folder, clips_weight=1.0)
        return config

    train(config_of("text_to_video"), tmp_path / "run")
    make_clips(tmp_path / "clips", count=4, **options)
    config = config_of("text_to_video", "drag")
    with pytest.raises(UserError, match="not those that .* was trained on"):
        train(config, tmp_path / "run")
    config.data.allow_changed_clips = True
    assert train(config, tmp_path / "run").stage == "drag"


def test_threads_workers_and_prefetching_may_change_when_going_on(tmp_path, monkeypatch):
    config = short_config("text_to_video")
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 4)
        train(config, tmp_path / "dead")
    config.data.update(threads=3, prefetch=1, prefetch_to_device=0, max_replaced_share=0.5)
    train(config, tmp_path / "dead")
    assert losses(tmp_path / "dead") == losses(tmp_path / "whole")


def test_nothing_is_compiled_again_over_an_epoch_of_mixed_clips(tmp_path):
    config = short_config("drag")
    config.data.clips = make_clips(tmp_path / "clips", count=5, frames=4, height=20, width=20)
    config.data.update(clips_weight=1.0, scenes_weight=1.0, flip_probability=0.5, flow_divisor=2)
    config.stages.drag.dense_to_sparse = (0.5, 0.5)
    (stage,) = stages_from_config(config)
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    params = FakeModel().init(jax.random.key(0), height=16, width=24, frames=3)
    state = init_state(params, stage, make_optimizer(config.train))
    step = make_train_step(FakeModel(), config, stage)
    # Eight batches of two elements, half of them clips: more than an epoch.
    batches = make_batches(
        DataConfig.from_config(config.data),
        seed=0,
        batch_size=2,
        with_flow=True,
        num_batches=8,
        transfer=to_device,
    )
    for number, batch in enumerate(batches):
        state, _ = step(state, batch, jnp.float32(1e-3), jnp.float32(number / 8))
        if number == 0:
            assert compiled
            compiled.clear()
    assert int(state.step) == 8 and not compiled
