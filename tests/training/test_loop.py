import gc
import json
import os
import signal
import types
import weakref

import jax
import numpy as np
import pytest
from fake_model import FakeModel
from loop_runs import Watched, short_config, watch
from micro_config import get_config
from running import die_after, losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.data.video import read_video
from nuwa_jax.errors import UserError
from nuwa_jax.generation.stage_samples import StageSamples
from nuwa_jax.models.video_ldm import VideoLDM, to_float
from nuwa_jax.training.checkpoint import StageCheckpoints, load_final
from nuwa_jax.training.loop import _Run, train
from nuwa_jax.watching.non_finite import NonFiniteError


@pytest.fixture(autouse=True)
def fake_model(monkeypatch):
    monkeypatch.setattr(VideoLDM, "from_config", lambda config: FakeModel())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run through every stage."""
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoLDM, "from_config", lambda config: FakeModel())
        result = train(get_config(), workdir)
    assert (result.stage, result.step, result.signal) == ("drag", 6, None)
    return workdir


def assert_same_params(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_run_leaves_a_checkpoint_per_stage_and_a_line_per_logged_step(finished):
    labels = ["00_autoencoder", "01_text_to_video", "02_flow", "03_drag"]
    assert sorted(p.name for p in (finished / "stages").iterdir()) == labels
    assert [(s, n) for s, n, _ in losses(finished)] == [
        (label[3:], n) for label in labels for n in (2, 4, 6)
    ]
    assert np.isfinite([loss for _, _, loss in losses(finished)]).all()
    for label in labels:
        board = EventAccumulator(str(finished / "tensorboard" / label)).Reload()
        assert [e.step for e in board.Scalars("loss")] == [2, 4, 6]
    assert json.loads((finished / "config.json").read_text())["preset"] == "nuwa"


def test_progress_lines_tell_stage_loss_speed_and_time_left(tmp_path, capsys):
    train(short_config(), tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert len(lines) == 12
    for part in ("text_to_video 5/6", "loss ", "steps/s", " left, all ", "data wait "):
        assert part in lines[4]


def test_a_run_may_start_from_given_params(tmp_path):
    """The first stage starts from them where they are given, from the seed's own elsewhere."""
    config = short_config("flow")  # trains the flow encoder alone
    config.stages.flow.steps = 1
    given = {"text": {"table": np.full((257, 8), 0.25, np.float32)}}
    train(config, tmp_path / "given", initial=lambda: given)
    train(config, tmp_path / "random")
    found, usual = (load_final(tmp_path / name).params for name in ("given", "random"))
    np.testing.assert_array_equal(found["text"]["table"], given["text"]["table"])
    np.testing.assert_array_equal(found["unet"]["in"], usual["unet"]["in"])
    # What is there is gone on with: nothing is loaded again.
    train(config, tmp_path / "given", initial=lambda: pytest.fail("loaded for a finished run"))


def test_captions_without_the_vocabulary_they_need_are_refused(tmp_path):
    config = short_config("flow")
    config.data.tokenizer = "vocabulary"
    with pytest.raises(UserError, match="the model does not read it"):
        train(config, tmp_path)


def test_frozen_parts_are_bit_identical_through_their_stage(finished):
    before, after = (load_final(finished, stage).params for stage in ("text_to_video", "flow"))
    for part in before:
        if part != "flow_encoder":
            assert_same_params(before[part], after[part])
    assert np.any(before["flow_encoder"]["kernel"] != after["flow_encoder"]["kernel"]), (
        "the stage trained nothing"
    )


def test_latents_are_normalised_once_the_autoencoder_is_trained(finished):
    config, model = get_config(), FakeModel()
    batches = make_batches_from(config, batch_size=2)
    videos = np.concatenate([next(batches).video for _ in range(2)])
    batches.close()
    latents = np.asarray(model.encode(load_final(finished, "flow").params, to_float(videos)))
    latents = latents.reshape(-1, latents.shape[-1])
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std(0), 1, atol=1e-4)


def make_batches_from(config, *, batch_size):
    data = DataConfig.from_config(config.data)
    return make_batches(data, seed=config.seed, batch_size=batch_size)


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert train(get_config(), finished).stage == "drag"
    assert (finished / "metrics.jsonl").read_text() == before
    assert "steps/s" not in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 4, 7, 11])
def test_dying_anywhere_and_going_on_equals_never_dying(tmp_path, monkeypatch, steps):
    config = short_config()
    config.train.log_every = 4  # neither of checkpoints nor of the stage's length
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, steps)
        train(config, tmp_path / "dead")
    train(config, tmp_path / "dead")
    assert losses(tmp_path / "dead") == losses(tmp_path / "whole")
    for stage in config.curriculum:
        whole, dead = (load_final(tmp_path / w, stage).params for w in ("whole", "dead"))
        assert_same_params(whole, dead)


def test_a_line_cut_in_half_by_a_kill_is_written_again(tmp_path, monkeypatch):
    config = short_config()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 5)
        train(config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "text_to_vi')
    train(config, tmp_path)
    assert [(s, n) for s, n, _ in losses(tmp_path)] == [
        (s, n) for s in config.curriculum for n in range(1, 7)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_running_step_and_the_next_run_goes_on(
    tmp_path, monkeypatch, number
):
    config = short_config()
    train(config, tmp_path / "whole")

    def draw(batches, count):
        if count == 4:  # neither a checkpoint's step nor the last
            os.kill(os.getpid(), number)
        return next(batches)

    handlers = signal.getsignal(number)
    with monkeypatch.context() as patch:
        watch(patch, draw)
        result = train(config, tmp_path / "stopped")
    assert (result.stage, result.step, result.signal) == ("text_to_video", 4, number)
    assert load_final(tmp_path / "stopped").step == 4
    assert signal.getsignal(number) == handlers
    train(config, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_elements_are_never_seen_twice_in_a_run(tmp_path, monkeypatch):
    starts = []

    def spy(config, **kwargs):
        starts.append((kwargs["start_index"], kwargs["batch_size"]))
        return make_batches(config, **kwargs)

    config = short_config("text_to_video", "flow", "drag")
    config.stages.flow.batch_size = 3
    monkeypatch.setattr("nuwa_jax.training.loop.make_batches", spy)
    train(config, tmp_path)
    assert starts == [(0, 2), (12, 3), (30, 2)]


def test_a_stage_lets_go_of_what_it_started_from(tmp_path, monkeypatch):
    given, alive, run_stage = [], [], _Run.run_stage

    def spy(run, stage, *args):
        given[:] = [weakref.ref(leaf) for leaf in jax.tree.leaves(run.params)]
        return run_stage(run, stage, *args)

    def draw(batches, _):
        gc.collect()
        alive.append(sum(ref() is not None for ref in given))
        return next(batches)

    monkeypatch.setattr(_Run, "run_stage", spy)
    watch(monkeypatch, draw)
    train(short_config(), tmp_path)
    assert given and not any(alive)
    assert len(alive) == 12


def test_hosts_that_see_other_checkpoints_are_refused_before_any_is_read(finished, monkeypatch):
    asked = []

    def differ(what, mine, mend):
        asked.append((what, mine))
        if "checkpoints" in what:
            raise UserError(mend)

    monkeypatch.setattr("nuwa_jax.training.loop.check_same", differ)
    monkeypatch.setattr(StageCheckpoints, "last", lambda *args: pytest.fail())
    with pytest.raises(UserError, match="wait until all hosts see the same files"):
        train(get_config(), finished)
    assert asked == [("the checkpoints of stage autoencoder", {"steps": [6, 3]})]


def test_schedules_begin_with_their_stage_also_where_a_run_goes_on(tmp_path, monkeypatch):
    starts = []

    def spy(config, **kwargs):
        starts.append((kwargs["start_index"], kwargs["schedule_start"]))

        def draw(batches, count):
            if len(starts) == 2 and count == 5:
                raise KeyboardInterrupt
            return next(batches)

        return Watched(make_batches(config, **kwargs), draw)

    config = short_config("text_to_video", "drag")
    monkeypatch.setattr("nuwa_jax.training.loop.make_batches", spy)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    train(config, tmp_path)
    assert starts == [(0, 0), (12, 12), (18, 12)]


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_step(tmp_path, monkeypatch):
    def draw(batches, _):
        batch = next(batches)
        return batch._replace(points=jax.device_put(np.full(batch.points.shape, np.nan, "f4")))

    config = short_config("drag")
    config.train.max_skipped = 2
    watch(monkeypatch, draw)
    with pytest.raises(NonFiniteError, match="stage drag: 3 steps in a row up to step 3"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("preset", "other", "preset: checkpoint nuwa, config other"),
        ("seed", 7, "seed: checkpoint 0, config 7"),
        ("data.fps", 4.0, "data.fps: checkpoint 8.0, config 4.0"),
        ("model.dtype", "bfloat16", "model.dtype"),
        ("stages.flow.learning_rate", 1.0, "stages.flow.learning_rate"),
        ("train.ema_decay", 0.5, "train.ema_decay"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_with_the_keys(finished, key, value, message):
    config = get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"{message}.*another --workdir"):
        train(config, finished)


def test_the_preset_is_named_first_among_many_differences(finished):
    config = get_config()
    config.preset, config.seed, config.data.fps = "other", 3, 2.0
    with pytest.raises(UserError, match=r"another config \(preset: .*seed: .*data.fps: "):
        train(config, finished)


def test_stages_not_reached_yet_may_still_be_changed(tmp_path):
    config = short_config("text_to_video")
    train(config, tmp_path)
    config = short_config("text_to_video", "drag")
    config.stages.drag.steps = 2
    config.train.log_every, config.train.checkpoint_every = 2, 5
    assert train(config, tmp_path).step == 2


def test_a_time_budget_ends_a_stage_and_is_not_begun_again_by_a_restart(tmp_path, monkeypatch):
    config = short_config("text_to_video")
    config.stages.text_to_video.steps = 10**6
    config.stages.text_to_video.time_budget_minutes = 2 / 60
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 8)
        train(config, tmp_path)
    result = train(config, tmp_path)
    assert 6 < result.step < 10**6
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["elapsed"] < 10
    assert train(config, tmp_path).step == result.step
    assert load_final(tmp_path).done


@pytest.mark.parametrize("name", ["autoencoder", "text_to_video", "drag"])
def test_samples_are_shown_on_tensorboard_and_written_as_videos(tmp_path, name):
    config = short_config(name)
    config.train.sample_every, config.sampling.steps = 4, 2
    train(config, tmp_path, StageSamples(config))
    video, _ = read_video(tmp_path / "samples" / f"00_{name}_0000004.mp4")
    assert video.shape == (3, 32, 4 * 24, 3)
    board = EventAccumulator(str(tmp_path / "tensorboard" / f"00_{name}")).Reload()
    (image,) = board.Images("samples")
    assert image.step == 4 and image.encoded_image_string[:4] == b"GIF8"


def test_a_caller_may_make_the_samples(tmp_path):
    seen = []

    def sample(params, stage):
        seen.append((stage.name, sorted(params)))
        return np.zeros((1, 3, 16, 24, 3), np.uint8)

    config = short_config()
    config.train.sample_every = 6
    train(config, tmp_path, sample_fn=sample)
    parts = ["autoencoder", "drag", "flow_encoder", "latents", "text", "unet"]
    assert seen == [("text_to_video", parts), ("drag", parts)]


def test_a_workdir_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load_final(tmp_path)


def test_a_stage_that_was_not_trained_is_named_with_those_that_were(finished):
    with pytest.raises(UserError, match="of stage 'dream'.*02_flow"):
        load_final(finished, "dream")


def test_a_batch_that_does_not_divide_is_refused_before_anything_runs(tmp_path):
    config = short_config()
    config.train.accumulate = 3
    with pytest.raises(UserError, match="batch_size=2 must be a multiple of train.accumulate=3"):
        train(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_stage_that_does_not_divide_over_the_mesh_is_refused_before_the_first_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("nuwa_jax.training.loop.reading_hosts", lambda mesh: 1)
    monkeypatch.setattr(
        "nuwa_jax.training.loop.make_mesh",
        lambda config: types.SimpleNamespace(
            shape={"data": 2, "fsdp": 1, "frame": 1, "tensor": 1}, size=2
        ),
    )
    config = short_config("autoencoder", "drag")
    config.stages.drag.batch_size = 3
    with pytest.raises(UserError, match="batch of 3 does not divide"):
        train(config, tmp_path)
    assert not (tmp_path / "stages").exists()
