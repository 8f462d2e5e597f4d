import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from prepared_clips import EXACT, SMALL, assert_equal, captions, joined, make_clips, take

from nuwa_jax.data import mixture
from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import held_out_scene, make_batches
from nuwa_jax.data.records import shard_name
from nuwa_jax.data.scenes import HELD_OUT_SEED, SceneConfig, render_scene
from nuwa_jax.data.tokenizer import encode_text
from nuwa_jax.errors import UserError
from nuwa_jax.motion.drag_synthesis import DragsOn
from nuwa_jax.motion.perturbation import PerturbConfig
from nuwa_jax.motion.schedules import Schedule, at_step
from nuwa_jax.motion.tracks import TrackState
from nuwa_jax.motion.trajectory_samplers import SamplerConfig


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def mixed(clips):
    return dataclasses.replace(SMALL, clips=clips, clips_weight=1.0, scenes_weight=2.0)


@pytest.mark.parametrize("batch_size,with_flow", [(1, False), (2, True)])
def test_batches_have_the_promised_shapes_and_types(mixed, batch_size, with_flow):
    b = batch_size
    batch = take(mixed, 1, batch_size=b, with_flow=with_flow)[0]
    assert batch.video.shape == (b, 5, 24, 32, 3) and batch.video.dtype == np.uint8
    assert batch.points.shape == (b, 4, 5, 2) and batch.points.dtype == np.float32
    assert batch.state.shape == (b, 4, 5) and batch.state.dtype == np.uint8
    assert batch.text.shape == (b, 20) and batch.text.dtype == np.int32
    assert batch.fps.shape == (b,) and batch.fps.dtype == np.float32
    if with_flow:
        assert batch.flow.shape == (b, 5, 24, 32, 2) and batch.flow.dtype == np.float16
        assert not batch.flow[:, 0].any()
    else:
        assert batch.flow is None


def test_element_is_a_function_of_seed_and_index_alone(mixed):
    reference = joined(take(mixed, 6, batch_size=2, with_flow=True))
    for threads in (1, 3):
        config = dataclasses.replace(mixed, threads=threads)
        assert_equal(joined(take(config, 6, batch_size=2, with_flow=True)), reference)
    for batch_size in (1, 3, 4, 12):
        again = joined(take(mixed, 12 // batch_size, batch_size=batch_size, with_flow=True))
        assert_equal(again, reference)
    without = joined(take(mixed, 6, batch_size=2))
    assert_equal(without, reference._replace(flow=None))


@pytest.mark.parametrize("num_shards", [2, 3, 6])
def test_shards_joined_are_the_batch_of_one(mixed, num_shards):
    whole = take(mixed, 2, batch_size=6)
    parts = [
        take(mixed, 2, batch_size=6, shard=shard, num_shards=num_shards)
        for shard in range(num_shards)
    ]
    for n in range(2):
        assert_equal(joined([part[n] for part in parts]), whole[n])


def test_one_integer_resumes_with_other_threads_and_batches(mixed):
    reference = joined(take(mixed, 12, batch_size=1))
    batches = make_batches(dataclasses.replace(mixed, threads=2), seed=7, batch_size=3)
    start = [next(batches) for _ in range(2)]
    assert batches.next_index == 6  # what was made ahead does not count
    batches.close()
    rest = take(mixed, 3, batch_size=2, start_index=batches.next_index)
    assert_equal(joined([*start, *rest]), reference)


def test_schedules_follow_the_step_and_resume_exactly(mixed):
    sampler = SamplerConfig(kind="grid", spacing=4.0, min_count=Schedule(4, 1, 4), max_count=4)
    config = dataclasses.replace(
        mixed, sampler=sampler, perturb=PerturbConfig(jitter=Schedule(0.0, 3.0, 4))
    )
    whole = take(config, 6, start_index=10, schedule_start=10)
    for n in (1, 3, 5):
        rest = take(config, 6 - n, start_index=10 + 2 * n, schedule_start=10)
        assert_equal(joined(rest), joined(whole[n:]))
    # Two elements a step: the numbers are those of the step, also after the last of the schedule.
    for step, batch in enumerate(whole):
        fixed = dataclasses.replace(
            config, sampler=at_step(sampler, step), perturb=at_step(config.perturb, step)
        )
        assert_equal(take(fixed, 1, start_index=10 + 2 * step)[0], batch)
    assert not np.array_equal(whole[2].points, take(config, 1, start_index=14)[0].points)


def test_other_seeds_give_other_batches(mixed):
    a, b = take(mixed, 1)[0], take(mixed, 1, seed=8)[0]
    assert not np.array_equal(a.video, b.video)


def test_scenes_and_clips_come_in_the_proportion_of_their_weights(mixed):
    names = captions(joined(take(mixed, 12, batch_size=4)))
    assert sum(name.startswith("clip ") for name in names) == 16
    only = dataclasses.replace(mixed, scenes_weight=0.0)
    assert all(name.startswith("clip ") for name in captions(take(only, 1, batch_size=4)[0]))


def test_every_record_is_seen_once_an_epoch_and_in_another_order_the_next(mixed):
    only = dataclasses.replace(mixed, scenes_weight=0.0)
    names = captions(joined(take(only, 3, batch_size=7)))
    epochs = [names[i : i + 7] for i in (0, 7, 14)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


@pytest.fixture
def rendered(monkeypatch):
    """The scenes that the pipeline renders, in order."""
    scenes = []

    def spy(seed, config):
        scenes.append(render_scene(seed, config))
        return scenes[-1]

    monkeypatch.setattr(mixture, "render_scene", spy)
    return scenes


def test_training_never_sees_held_out_scenes(rendered):
    take(SMALL, 10, batch_size=4)
    seeds = [scene.seed for scene in rendered]
    assert len(set(seeds)) == 40 and max(seeds) < HELD_OUT_SEED
    assert held_out_scene(3, SMALL).seed == HELD_OUT_SEED + 3


def test_batch_holds_the_video_flow_and_caption_of_its_scenes(rendered):
    batch = joined(take(SMALL, 2, with_flow=True))
    np.testing.assert_array_equal(batch.video, [scene.video for scene in rendered])
    np.testing.assert_array_equal(batch.flow, [scene.flow.astype(np.float16) for scene in rendered])
    np.testing.assert_array_equal(
        batch.text, [encode_text(scene.caption, 20) for scene in rendered]
    )
    np.testing.assert_array_equal(batch.fps, [8.0] * 4)


def test_exact_drags_of_a_scene_are_tracks_of_it():
    config = dataclasses.replace(SMALL, perturb=EXACT)
    found = 0
    for index in range(20):
        batch = take(config, 1, batch_size=1, start_index=index, with_flow=True)[0]
        used = (batch.state[0] != TrackState.UNSPECIFIED).any(axis=1)
        points, state, flow = batch.points[0], batch.state[0], batch.flow[0]
        assert not points[~used].any()
        for k in np.flatnonzero(used):
            for t in range(1, 5):
                x, y = np.rint(points[k, t - 1]).astype(int)
                if (state[k, t - 1 : t + 1] != TrackState.VISIBLE).any():
                    continue
                if not (1 <= x < 31 and 1 <= y < 23):
                    continue
                # Flow around the point: one of the pixels is of the same surface.
                near = flow[t, y - 1 : y + 2, x - 1 : x + 2].astype(np.float32).reshape(-1, 2)
                step = points[k, t] - points[k, t - 1]
                still = not step.any()  # an anchor, which may lie on something that moves a little
                gap = np.linalg.norm(near - step, axis=-1).min()
                assert still or gap < 0.25
                found += 1
    assert found > 50


def drags_on_background(config, count):
    """How many drags move without any sprite being there to move."""
    moving = 0
    for batch in take(config, count, batch_size=4):
        shift = np.linalg.norm(batch.points - batch.points[:, :, :1], axis=-1)
        moving += int((np.where(batch.state > 0, shift, 0).max(axis=-1) > 1).sum())
    return moving


def test_background_is_dragged_only_where_the_config_allows_it():
    scenes = SceneConfig(min_sprites=0, max_sprites=0, pan_probability=1.0, pan=(0.2, 0.3))
    config = dataclasses.replace(SMALL, scenes=scenes, perturb=EXACT)
    assert drags_on_background(dataclasses.replace(config, drags_on=DragsOn(1.0, 0.0, 0.0)), 5) == 0
    assert drags_on_background(dataclasses.replace(config, drags_on=DragsOn(0.0, 1.0, 0.0)), 5) > 10


def test_drags_are_imprecise_unless_the_config_says_otherwise():
    exact = take(dataclasses.replace(SMALL, perturb=EXACT), 3)
    rough = take(dataclasses.replace(SMALL, perturb=PerturbConfig(jitter=1.0)), 3)
    moved = [not np.array_equal(a.points, b.points) for a, b in zip(exact, rough, strict=True)]
    assert all(moved)
    for a, b in zip(exact, rough, strict=True):
        np.testing.assert_array_equal(a.video, b.video)


def test_clips_of_another_size_bring_their_points_and_flow_along(clips):
    # Half the size, of the same shape: a record's exact tracks must follow its exact flow.
    config = dataclasses.replace(
        SMALL, clips=clips, clips_weight=1.0, scenes_weight=0.0, height=16, width=20, perturb=EXACT
    )
    scenes = [
        render_scene(i, SceneConfig(height=32, width=40, frames=8, supersample=1)) for i in range(7)
    ]
    batch = joined(take(config, 7, batch_size=2, with_flow=True))
    assert list(batch.fps) == [10.0] * 14
    checked = 0
    for row, name in enumerate(captions(batch)):
        scene = scenes[int(name.split()[1])]
        small = scene.video.reshape(8, 16, 2, 20, 2, 3).mean(axis=(2, 4))
        errors = [np.abs(small[i : i + 5] - batch.video[row]).mean() for i in range(4)]
        first = int(np.argmin(errors))
        assert errors[first] < 8
        expected = (scene.tracks.points[:, first : first + 5] + 0.5) / 2 - 0.5
        for k in np.flatnonzero((batch.state[row] > 0).any(axis=1)):
            points = batch.points[row, k]
            if points.std(axis=0).max() == 0:
                continue  # an anchor
            gap = np.abs(expected - points).max(axis=(1, 2)).min()
            assert gap < 0.02
            checked += 1
        flow = scene.flow[first : first + 5].reshape(5, 16, 2, 20, 2, 2).mean(axis=(2, 4)) / 2
        assert np.median(np.abs(flow[1:] - batch.flow[row, 1:])) < 0.02
    assert checked > 10


def test_points_that_the_crop_cuts_off_are_outside(clips):
    config = dataclasses.replace(
        SMALL, clips=clips, clips_weight=1.0, scenes_weight=0.0, height=32, width=16, perturb=EXACT
    )
    batch = joined(take(config, 7, batch_size=2))
    x = batch.points[..., 0]
    assert (batch.state[(x < -0.5) | (x > 15.5)] == TrackState.OUTSIDE).all()
    seen = batch.state == TrackState.VISIBLE
    assert seen.any() and x[seen].min() >= -0.5 and x[seen].max() <= 15.5


def test_flow_of_clips_without_any_is_estimated(tmp_path):
    folder = make_clips(tmp_path / "clips", count=2, height=64, width=64, flow=False)
    config = dataclasses.replace(
        SMALL, clips=folder, clips_weight=1.0, scenes_weight=0.0, height=64, width=64
    )
    batch = take(config, 1, with_flow=True)[0]
    assert not batch.flow[:, 0].any()
    assert np.abs(batch.flow[:, 1:].astype(np.float32)).max() > 0.5


def test_damaged_record_is_replaced_by_its_neighbour_and_counted(tmp_path):
    folder = tmp_path / "clips"
    make_clips(folder, count=5)
    shard = folder / shard_name(0, 1)
    data = bytearray(shard.read_bytes())
    config = dataclasses.replace(SMALL, clips=str(folder), clips_weight=1.0, scenes_weight=0.0)
    data[40000:40064] = bytes(64)
    shard.write_bytes(data)
    batches = make_batches(config, seed=1, batch_size=5)
    names = captions(next(batches))
    assert batches.num_replaced == 1
    counts = sorted(names.count(f"clip {i}") for i in range(5))
    assert counts == [0, 1, 1, 1, 2]
    assert_equal(take(config, 1, seed=1, batch_size=5)[0], take(config, 1, seed=1, batch_size=5)[0])


def test_clips_that_do_not_fit_are_refused_at_once(tmp_path, clips):
    base = dataclasses.replace(SMALL, clips=clips, clips_weight=1.0)

    def check(message, config, **options):
        with pytest.raises(UserError, match=message):
            make_batches(config, **{"seed": 0, "batch_size": 2, **options})

    check("--min_frames=9", dataclasses.replace(base, frames=9))
    check("not a folder of prepared clips", dataclasses.replace(base, clips=str(tmp_path)))
    check("multiple", base, batch_size=3, num_shards=2)
    make_clips(tmp_path / "cut")
    shard = tmp_path / "cut" / shard_name(0, 1)
    shard.write_bytes(shard.read_bytes()[:-1])
    check("bytes", dataclasses.replace(base, clips=str(tmp_path / "cut")))


def test_fingerprint_tells_records_apart(mixed, tmp_path):
    other = dataclasses.replace(mixed, clips=make_clips(tmp_path / "other", count=6))
    prints = [
        make_batches(config, seed=0, batch_size=2).fingerprint for config in (mixed, other, SMALL)
    ]
    assert len(set(prints)) == 3 and prints[2] == ""


def test_config_entries_reach_their_parts_and_unknown_ones_are_named():
    config = ConfigDict({"height": 40, "frames": 3, "scenes": {"max_sprites": 2}})
    config.perturb = ConfigDict({"subsample": [2, 3]})
    data = DataConfig.from_config(config)
    assert (data.height, data.scenes.height, data.scenes.frames) == (40, 40, 3)
    assert data.scenes.max_sprites == 2 and data.perturb.subsample == (2, 3)
    for entries, message in (
        ({"hight": 3}, "data.hight"),
        ({"scenes": {"sprites": 3}}, "data.scenes.sprites"),
        ({"sampler": {"kind": "best"}}, "data.sampler"),
        ({"drags_on": {"objects": 1.0}}, "data.drags_on.objects"),
        ({"sampler": {"max_count": {"start": 9, "end": 1, "steps": 5}}}, "max_count 9 is more"),
        ({"clips_weight": 1.0}, "data.clips"),
        ({"scenes_weight": 0.0}, "nothing to train on"),
        ({"max_drags": 2}, "max_count"),
        ({"frames": 0}, "data.frames is at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig.from_config(ConfigDict(entries))
