"""What is stored of a run, when it is said to be stored, and what is done where it is damaged."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fake_model import FakeModel
from micro_config import get_config
from running import die_after, losses

import nuwa_jax
from nuwa_jax.data.pipeline import Batches
from nuwa_jax.errors import UserError
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.training.checkpoint import DamagedCheckpoint, Meta, StageCheckpoints, load_final
from nuwa_jax.training.curriculum import stages_from_config
from nuwa_jax.training.loop import train
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import init_state
from nuwa_jax.training.workdir import Workdir

DEADLINE = 300


@pytest.fixture(autouse=True, scope="module")
def fake_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoLDM, "from_config", lambda config: FakeModel())
        yield


def drag_config(**train_keys):
    config = get_config()
    config.curriculum = ("drag",)
    config.train.update(log_every=1, checkpoint_every=2, keep=3, **train_keys)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run of six steps, and one that died in the fifth with checkpoints of 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    train(drag_config(), folder / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 4)
        train(drag_config(), folder / "dead")
    return folder


@pytest.fixture
def dead(runs, tmp_path):
    """A copy of the run that died."""
    return shutil.copytree(runs / "dead", tmp_path / "dead")


def values_file(checkpoint, item="training"):
    """The file in which most of an item's values are."""
    return max(
        (checkpoint / item).rglob("*"), key=lambda path: path.is_file() * path.stat().st_size
    )


def truncate(checkpoint):
    path = values_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-1])


def flip(checkpoint):
    path = values_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (truncate, r"training/\S+ has \d+ bytes instead of \d+"),
    "flipped bit": (flip, r"training/\S+ has other contents"),
    "missing file": (lambda c: values_file(c, "model").unlink(), r"model/\S+ is missing"),
    "missing item": (lambda c: shutil.rmtree(c / "meta"), r"meta/\S+ is missing"),
    "damaged meta": (lambda c: values_file(c, "meta").write_text("{"), r"meta/\S+ has 1 bytes"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), r"manifest.json is missing"),
    "damaged manifest": (lambda c: (c / "manifest.json").write_text("[1]"), "cannot be read"),
    "no mark": (lambda c: (c / "commit_success.txt").unlink(), "commit_success.txt is missing"),
    "empty": (lambda c: (shutil.rmtree(c), c.mkdir()), "half-written"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_neither_used_nor_passed_over(dead, how):
    damage, message = DAMAGE[how]
    damage(dead / "stages/00_drag/4")
    with pytest.raises(
        UserError, match=f"stages/00_drag/4 is damaged: .*{message}.*that of step 2"
    ):
        train(drag_config(), dead)
    assert (dead / "stages/00_drag/4").exists()


def test_the_checkpoint_before_a_damaged_one_is_used_if_that_is_asked_for(dead, runs, capsys):
    flip(dead / "stages/00_drag/4")
    train(drag_config(use_previous_checkpoint=True), dead)
    assert "drag: going on at step 2 of 6" in capsys.readouterr().out
    assert losses(dead) == losses(runs / "whole")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_final(dead).params,
        load_final(runs / "whole").params,
    )


def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_not_deleted_as_damaged(
    dead, monkeypatch
):
    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("nuwa_jax.training.manifest._digest", fail)
    with pytest.raises(OSError, match="Input/output error"):
        train(drag_config(use_previous_checkpoint=True), dead)
    assert (dead / "stages/00_drag/4").exists()


def test_a_stage_whose_checkpoints_are_all_damaged_begins_anew_if_that_is_asked_for(dead, runs):
    for step in (2, 4):
        truncate(dead / f"stages/00_drag/{step}")
    with pytest.raises(DamagedCheckpoint):
        train(drag_config(), dead)
    train(drag_config(use_previous_checkpoint=True), dead)
    assert losses(dead) == losses(runs / "whole")


def test_a_stage_does_not_begin_on_a_damaged_end_of_the_one_before(runs, tmp_path):
    config = drag_config()
    config.curriculum = ("drag", "flow")
    workdir = shutil.copytree(runs / "whole", tmp_path / "run")
    shutil.copy(
        values_file(workdir / "stages/00_drag/4", "model"),
        values_file(workdir / "stages/00_drag/6", "model"),
    )
    with pytest.raises(DamagedCheckpoint, match="00_drag/6 is damaged: model/"):
        train(config, workdir)
    with pytest.raises(DamagedCheckpoint, match="00_drag/6 is damaged: model/"):
        load_final(workdir)
    config.train.use_previous_checkpoint = True
    with pytest.raises(UserError, match="run again to go on"):
        train(config, workdir)
    assert train(config, workdir).stage == "flow"
    assert losses(workdir)[:6] == losses(runs / "whole")


def test_a_checkpoint_that_a_later_stage_went_on_from_is_never_deleted(runs, tmp_path):
    workdir = shutil.copytree(runs / "whole", tmp_path / "run")
    shutil.copytree(workdir / "stages/00_drag/4", workdir / "stages/01_flow/4")
    config = drag_config(use_previous_checkpoint=True)
    config.curriculum = ("drag", "flow")
    end = workdir / "stages/00_drag/6"
    for item in ("model", "meta"):  # found when the next stage needs it; when the stage is opened
        path = values_file(end, item)
        path.write_bytes(path.read_bytes()[:-1])
        told = f"00_drag/6 is damaged: {item}/.*not deleted.* 01_flow went on from it"
        with StageCheckpoints(workdir, "01_flow") as checkpoints:
            assert checkpoints.steps() == [4]
        with pytest.raises(DamagedCheckpoint, match=told):
            train(config, workdir)
        assert end.exists()


def test_what_a_killed_run_was_writing_is_cleared_away(dead, runs):
    half = dead / "stages/00_drag/6.orbax-checkpoint-tmp"
    (half / "model").mkdir(parents=True)
    (half / "model/part").write_bytes(b"1")
    train(drag_config(), dead)
    assert not half.exists()
    assert losses(dead) == losses(runs / "whole")


def test_a_checkpoint_tells_what_made_it(runs):
    with StageCheckpoints(runs / "whole", "00_drag") as checkpoints:
        meta = checkpoints.last()
    assert (meta.step, meta.position, meta.done, meta.processes) == (6, 12, True, 1)
    assert meta.mesh == {"data": 1, "fsdp": 1, "frame": 1, "tensor": 1}
    assert meta.versions["jax"] == jax.__version__
    head = subprocess.run(
        ["git", "-C", Path(nuwa_jax.__file__).parent, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    expected = nuwa_jax.__version__ if head.returncode else head.stdout.strip()
    assert meta.commit.removesuffix("-dirty") == expected


def test_the_newest_checkpoints_are_kept_and_every_nth(tmp_path):
    config = drag_config(keep_every=4)
    config.train.update(checkpoint_every=1, keep=1)
    config.stages.drag.steps = 11
    train(config, tmp_path)
    kept = [path.name for path in (tmp_path / "stages/00_drag").iterdir()]
    assert sorted(kept, key=int) == ["4", "8", "11"]


def large_state():
    """A state of 48 MB, a step that doubles its values and takes over its buffers, and a stage."""
    config = drag_config()
    (stage,) = stages_from_config(config)
    params = FakeModel().init(jax.random.key(0), height=16, width=24, frames=3)
    params["unet"]["drag_bias"] = jnp.ones(3 << 20)
    state = init_state(params, stage, make_optimizer(config.train))
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 2, s), donate_argnums=0)
    return step(state), step, stage


def meta_of(step):
    return Meta({}, "drag", 0, step, 0, 0.0, False, [])


def test_a_checkpoint_holds_the_values_of_its_step_though_later_steps_run_meanwhile(tmp_path):
    state, step, stage = large_state()
    expected = jax.device_get(state)
    stepped = threading.Event()
    with StageCheckpoints(
        tmp_path, "00_drag", keep=1, before_commit=lambda: stepped.wait(DEADLINE)
    ) as checkpoints:
        checkpoints.save(state, meta_of(1))
        for _ in range(20):
            state = step(state)
        jax.block_until_ready(state)
        stepped.set()
        checkpoints.close()
    with StageCheckpoints(tmp_path, "00_drag") as checkpoints:
        checkpoints.verify(1)
        found = checkpoints.restore(1, state, stage)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


def test_what_is_written_in_the_background_shares_no_memory_with_the_state(tmp_path, monkeypatch):
    state, _, _ = large_state()
    written, save = [], ocp.CheckpointManager.save

    def spy(manager, step, args, **options):
        written.extend(jax.tree.leaves((args["model"].item, args["training"].item)))
        return save(manager, step, args=args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", spy)
    with StageCheckpoints(tmp_path, "00_drag", keep=1) as checkpoints:
        checkpoints.save(state, meta_of(1))
    addresses = [{a.unsafe_buffer_pointer() for a in t} for t in (jax.tree.leaves(state), written)]
    assert addresses[1] and addresses[0].isdisjoint(addresses[1])


def test_a_checkpoint_is_reported_when_it_is_committed_and_not_before(tmp_path):
    state, _, _ = large_state()
    release, reported = threading.Event(), []
    with StageCheckpoints(
        tmp_path,
        "00_drag",
        keep=1,
        before_commit=lambda: release.wait(DEADLINE),
        saved=lambda step: reported.append((step, load_final(tmp_path).step)),
    ) as checkpoints:
        checkpoints.save(state, meta_of(1))
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            load_final(tmp_path)
        assert not reported
        release.set()
    assert reported == [(1, 1)]


def test_a_checkpoint_that_could_not_be_written_ends_the_run_and_is_not_reported(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    state, _, _ = large_state()
    reported = []
    checkpoints = StageCheckpoints(
        tmp_path, "00_drag", keep=1, before_commit=full, saved=reported.append
    )
    checkpoints.save(state, meta_of(1))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.close()
    assert not reported
    with StageCheckpoints(tmp_path, "00_drag", keep=1) as checkpoints:
        assert checkpoints.last() is None


def test_a_commit_that_fails_is_known_before_the_other_hosts_learn_of_it(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    finalize, release = ocp.CheckpointManager._finalize, threading.Event()

    def wait_for_others(manager, *args):
        try:
            finalize(manager, *args)
        finally:
            release.wait(DEADLINE)

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", wait_for_others)
    state, _, _ = large_state()
    checkpoints = StageCheckpoints(tmp_path, "00_drag", keep=1, before_commit=full)
    try:
        checkpoints.save(state, meta_of(1))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(state, meta_of(2))  # which waits for the first
    finally:
        release.set()
    with monkeypatch.context() as patch:  # nor does it wait for them in the end
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(checkpoints._manager, "close", pytest.fail)
        checkpoints.close()
    with pytest.raises(OSError, match="No space left"):  # Orbax tells each thread once
        checkpoints.close()


def test_a_save_may_take_hours(tmp_path):
    with StageCheckpoints(tmp_path, "00_drag", keep=1) as checkpoints:
        assert checkpoints._manager._options.async_options.timeout_secs == 4 * 3600


def test_another_batch_size_goes_on_at_the_next_clip_if_it_is_allowed(dead, monkeypatch):
    config = drag_config()
    config.stages.drag.batch_size = 3
    with pytest.raises(UserError, match="batch_size: checkpoint 2, config 3.*allow_changed_batch"):
        train(config, dead)
    config.train.allow_changed_batch_size = True
    config.stages.drag.learning_rate = 1.0
    with pytest.raises(UserError, match="learning_rate"):
        train(config, dead)
    config.stages.drag.learning_rate = get_config().stages.drag.learning_rate
    seen, draw = [], Batches.__next__

    def watched(batches):
        batch = draw(batches)
        seen.append((batches.next_index, np.asarray(batch.video)))
        return batch

    monkeypatch.setattr(Batches, "__next__", watched)
    train(config, dead)
    assert [index for index, _ in seen] == [11, 14]  # after eight clips
    found = np.concatenate([video for _, video in seen])
    seen.clear()
    train(drag_config(), dead.parent / "again")
    np.testing.assert_array_equal(found[:4], np.concatenate([video for _, video in seen])[8:])


def test_schedules_of_the_data_go_on_where_they_were_with_another_batch_size(dead, monkeypatch):
    starts = []

    def spy(config, **kwargs):
        starts.append((kwargs["start_index"], kwargs["schedule_start"], kwargs["batch_size"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("nuwa_jax.training.loop.make_batches", spy)
    config = drag_config(allow_changed_batch_size=True)
    config.stages.drag.batch_size = 3
    with pytest.raises(KeyboardInterrupt):
        train(config, dead)
    ((index, start, size),) = starts
    assert (index - start) / size == 4  # steps


def test_a_workdir_by_url_gets_all_files_and_a_run_goes_on_there(tmp_path, runs, monkeypatch):
    workdir = tmp_path / "bucket"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(patch, 5)
        patch.setattr(Workdir, "close", lambda self: None)  # as after a kill
        train(drag_config(), f"file://{workdir}")
    assert [row[1] for row in losses(workdir)][:4] == [1, 2, 3, 4]
    assert json.loads((workdir / "config.json").read_text())["preset"] == "nuwa"
    train(drag_config(), f"file://{workdir}")
    assert losses(workdir) == losses(runs / "whole")
    assert any((workdir / "tensorboard/00_drag").iterdir())
    assert load_final(f"file://{workdir}").step == 6


def test_files_of_a_bucket_are_copied_when_they_have_changed(monkeypatch):
    monkeypatch.setattr("nuwa_jax.training.workdir.checkpoint_root", lambda url: None)
    workdir = Workdir("memory://run/1")
    workdir.copy()
    (workdir.local / "metrics.jsonl").write_text("1\n")
    (workdir.local / "samples").mkdir()
    (workdir.local / "samples/a.mp4").write_bytes(b"video")
    workdir.copy()
    with (workdir.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    workdir.close()
    assert not workdir.local.exists()
    again = Workdir("memory://run/1")
    assert (again.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert again._files.cat_file(f"{again._base}/samples/a.mp4") == b"video"
    again.close()


def test_a_url_that_cannot_hold_checkpoints_is_refused():
    with pytest.raises(UserError, match="http://host/run cannot hold checkpoints"):
        train(drag_config(), "http://host/run")


def run_hosts(hosts, workdir, die_after=0):
    """What each host told, and its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).with_name("hosts_run.py")
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, (program, host, hosts, port, workdir, die_after))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(hosts)
    ]
    told = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    return list(zip(told, (process.returncode for process in processes), strict=True))


@pytest.mark.slow
def test_a_run_of_two_hosts_goes_on_with_one_and_each_learns_of_damage_that_one_found(tmp_path):
    ((told, code),) = run_hosts(1, tmp_path / "whole")
    assert code == 0, told
    ended = run_hosts(2, tmp_path / "moved", die_after=5)
    # Whoever is last may be ended by the other's death.
    assert any(code == 9 for _, code in ended) and all(code for _, code in ended), ended
    checkpoint = tmp_path / "moved/stages/00_drag/4"
    with StageCheckpoints(tmp_path / "moved", "00_drag") as checkpoints:
        meta = checkpoints.last()
    assert (meta.processes, meta.mesh["data"], meta.mesh["fsdp"], meta.position) == (2, 2, 2, 16)
    damaged = max((checkpoint / "training").glob("ocdbt.process_1/d/*"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    for told, code in run_hosts(2, tmp_path / "moved"):
        assert code and "stages/00_drag/4 is damaged" in told, told
    damaged.write_bytes(whole)
    ((told, code),) = run_hosts(1, tmp_path / "moved")
    assert code == 0 and "drag: going on at step 4 of 6" in told, told
    found, expected = (np.array([r[2] for r in losses(tmp_path / w)]) for w in ("moved", "whole"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
