"""What a run tells of itself, and what it does when something is wrong with it."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from fake_model import FakeModel
from micro_config import get_config
from prepared_clips import make_clips

from nuwa_jax.data.pipeline import Batches
from nuwa_jax.errors import UserError
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.training.checkpoint import load_final
from nuwa_jax.training.loop import train
from nuwa_jax.watching.non_finite import NonFiniteError


@pytest.fixture(autouse=True)
def fake_model(monkeypatch):
    monkeypatch.setattr(VideoLDM, "from_config", lambda config: FakeModel())


def short_config(stage="drag", **options):
    config = get_config()
    config.curriculum = (stage,)
    config.train.log_every = 1
    config.train.update(options)
    return config


def rows(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def on_draw(monkeypatch, change):
    """Every batch goes through `change(batch, number of the draw)`."""
    draw, drawn = Batches.__next__, []

    def changed(batches):
        drawn.append(0)
        return change(draw(batches), len(drawn))

    monkeypatch.setattr(Batches, "__next__", changed)


def spoil(*draws):
    def change(batch, number):
        if number not in draws:
            return batch
        points = np.full(batch.points.shape, np.nan, np.float32)
        return batch._replace(points=jax.device_put(points, batch.points.sharding))

    return change


def params_of(workdir):
    return load_final(workdir).params


def test_mfu_and_goodput_are_told_with_every_line(tmp_path, capsys):
    train(short_config(peak_flops=1e9), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (formula,) = [line for line in lines if line.startswith("MFU = model FLOPs per step / (")]
    assert "1 x cpu at 1 GFLOP/s (train.peak_flops)" in formula
    logged = [line for line in lines if line.startswith("drag ") and "/6 |" in line]
    assert len(logged) == 6
    assert all(" | MFU " in line and " | goodput " in line for line in logged[1:])
    assert lines[-1].startswith("goodput ") and " step 0:0" in lines[-1]
    found = rows(tmp_path)
    assert "mfu" not in found[0]  # no step has ended before it
    for row in found[1:]:
        assert 0 < row["mfu"] < 1 and 0 < row["goodput"] < 1


def test_counting_flops_costs_no_second_trace_and_no_second_compilation(tmp_path, monkeypatch):
    traced, compiled = [], []
    denoise = FakeModel.denoise

    def counted(self, *args):
        traced.append(0)
        return denoise(self, *args)

    def listen(event, seconds, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    monkeypatch.setattr(FakeModel, "denoise", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    train(short_config(), tmp_path)
    assert len(traced) == 1
    assert [name for name in compiled if "placed" in name] == ["jit(placed)"], compiled


def test_where_the_peak_is_not_known_there_is_no_mfu_and_the_reason_is_told(tmp_path, capsys):
    train(short_config(), tmp_path)
    told = capsys.readouterr().out
    assert "MFU is not reported: no peak is known of 'cpu'" in told
    assert "| MFU" not in told and all("mfu" not in row for row in rows(tmp_path))


def test_goodput_goes_on_over_restarts_and_counts_what_a_kill_cost(tmp_path, monkeypatch, capsys):
    def die(batch, number):
        if number == 6:  # after the checkpoint of step 3, and steps 4 and 5
            raise KeyboardInterrupt
        return batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_draw(patch, die)
        train(short_config(), tmp_path)
    before = json.loads((tmp_path / "goodput.json").read_text())
    ((index, step, kept),) = before["checkpoints"]
    assert (index, step) == (0, 3) and 0 < kept < before["seconds"]["step"]
    capsys.readouterr()
    train(short_config(), tmp_path)
    after = json.loads((tmp_path / "goodput.json").read_text())
    assert after["starts"] == 2 and after["down"] > 0
    assert after["seconds"]["lost"] == pytest.approx(before["seconds"]["step"] - kept, abs=0.01)
    assert after["seconds"]["compile"] > before["seconds"]["compile"] > 0
    assert "2 starts, down " in capsys.readouterr().out.splitlines()[-1]
    # A run that is done is not touched.
    text = (tmp_path / "goodput.json").read_text()
    train(short_config(), tmp_path)
    assert (tmp_path / "goodput.json").read_text() == text


def test_a_step_that_is_left_out_changes_nothing_and_its_clips_are_named(
    tmp_path, monkeypatch, capsys
):
    config = short_config(ema_decay=0.0, checkpoint_every=1, keep=6)  # EMA: the params themselves
    config.data.clips = make_clips(tmp_path / "clips", count=3, frames=4, height=20, width=24)
    config.data.update(clips_weight=1.0, scenes_weight=0.0)
    on_draw(monkeypatch, spoil(3))
    train(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert "drag 3: left out, loss nan" in told and "data positions 4 to 5 (record " in told
    (row,) = rows(tmp_path / "run", "non_finite.jsonl")
    assert (row["stage"], row["step"], row["positions"]) == ("drag", 3, [4, 5])
    assert len(row["clips"]) == 2 and all("clips (" in name for name in row["clips"])
    saved = {step: state_of(config, tmp_path / "run", step) for step in (2, 3, 4)}
    jax.tree.map(np.testing.assert_array_equal, saved[3], saved[2])
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(saved[4]), jax.tree.leaves(saved[3]), strict=True)
    )


def state_of(config, workdir, step):
    """Parameters in training, their averages and the optimizer's state, as saved."""
    import orbax.checkpoint as ocp

    folder = workdir / "stages" / "00_drag" / str(step)
    training = ocp.StandardCheckpointer().restore(folder / "training")
    model = ocp.StandardCheckpointer().restore(folder / "model")
    return jax.device_get([training["params"], training["opt_state"], model])


def test_a_run_may_stop_at_the_first_such_step_and_go_on_without_it(tmp_path, monkeypatch):
    config = short_config(non_finite="stop")
    with monkeypatch.context() as patch:
        on_draw(patch, spoil(5))
        with pytest.raises(
            NonFiniteError,
            match=r"stage drag, step 5: loss nan .* data positions 8 to 9 \(scene 8, scene 9\); "
            r"the checkpoint of step 3 is from before it: .*train.non_finite=skip",
        ):
            train(config, tmp_path / "run")
    assert load_final(tmp_path / "run").step == 3
    # As if it had been left out from the first: the second draw of this process is step 5.
    config.train.non_finite = "skip"
    with monkeypatch.context() as patch:
        on_draw(patch, spoil(2))
        train(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        on_draw(patch, spoil(5))
        train(config, tmp_path / "whole")
    jax.tree.map(
        np.testing.assert_array_equal, params_of(tmp_path / "run"), params_of(tmp_path / "whole")
    )
    assert [r["step"] for r in rows(tmp_path / "run", "non_finite.jsonl")] == [5]


def test_before_the_first_checkpoint_there_is_none_to_name(tmp_path, monkeypatch):
    on_draw(monkeypatch, spoil(1))
    with pytest.raises(NonFiniteError, match="step 1: .*no checkpoint is from before it"):
        train(short_config(non_finite="stop"), tmp_path)


def test_a_transfer_that_nobody_wrote_is_an_error(tmp_path, monkeypatch):
    """A host array among the step's arguments, which jit would send to the device in silence."""

    def change(batch, number):
        return batch._replace(points=np.asarray(batch.points)) if number == 2 else batch

    on_draw(monkeypatch, change)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(short_config(), tmp_path)
    assert len(jax.device_put(np.zeros(3)) + 1) == 3  # and nowhere but in the loop


def test_a_window_of_steps_is_profiled(tmp_path, capsys):
    train(short_config(profile_steps=(1, 2)), tmp_path)
    (trace,) = (tmp_path / "profile" / "00_drag").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert "profile of 2 steps: " in capsys.readouterr().out


def test_a_window_beyond_the_end_is_closed_with_the_stage(tmp_path, capsys):
    train(short_config(profile_steps=(4, 100)), tmp_path)
    assert list((tmp_path / "profile" / "00_drag").rglob("*.xplane.pb"))
    assert "profile of 2 steps: " in capsys.readouterr().out


def test_a_batch_that_does_not_come_is_told_with_the_stacks(tmp_path, monkeypatch, capfd):
    stacks = tmp_path / "stacks" / "stacks_0.txt"

    def change(batch, number):
        if number == 4:
            end = time.monotonic() + 60
            while not stacks.exists() or "test_watched_run" not in stacks.read_text():
                assert time.monotonic() < end, "nothing was told"
                threading.Event().wait(0.01)
        return batch

    on_draw(monkeypatch, change)
    assert train(short_config(watchdog_seconds=1.0), tmp_path).step == 6
    assert "of stage drag has taken" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("non_finite", "ignore"),
        ("profile_steps", (1, 2, 3)),
        ("profile_steps", (-1, 2)),
        ("peak_flops", -1.0),
        ("watchdog_seconds", -1.0),
        ("slow_host_ratio", 1.0),
        ("slow_hosts_every", -1),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_runs(tmp_path, key, value):
    with pytest.raises(UserError, match=f"train.{key}"):
        train(short_config(**{key: value}), tmp_path)
    assert not any(tmp_path.iterdir())
