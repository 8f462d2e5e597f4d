import dataclasses

import pytest
from ml_collections import ConfigDict

from nuwa_jax.errors import UserError
from nuwa_jax.motion.camera_motion import CameraConfig
from nuwa_jax.motion.drag_synthesis import DragsOn, DragSynthesis
from nuwa_jax.motion.perturbation import PerturbConfig
from nuwa_jax.motion.schedules import Schedule, at_end, at_step, schedules_of
from nuwa_jax.motion.trajectory_samplers import SamplerConfig


def test_a_schedule_goes_straight_from_start_to_end_and_stays_there():
    schedule = Schedule(10.0, 2.0, 4)
    assert [schedule.at(step) for step in (0, 1, 2, 4, 5, 1000)] == [10, 8, 6, 2, 2, 2]


def test_counts_are_whole_and_everything_else_is_kept():
    config = SamplerConfig(kind="grid", max_count=Schedule(64, 8, 10), spacing=Schedule(4, 5, 2))
    for step, count, spacing in ((0, 64, 4.0), (1, 58, 4.5), (5, 36, 5.0), (99, 8, 5.0)):
        now = at_step(config, step)
        assert (now.max_count, now.spacing) == (count, spacing)
        assert type(now.max_count) is int
        assert dataclasses.replace(now, max_count=8, spacing=16.0) == SamplerConfig(kind="grid")
    assert config.most_drags == 64


def test_schedules_are_found_at_any_depth():
    config = DragSynthesis(
        sampler=SamplerConfig(
            kind="mixture",
            mixture={
                "dense": {"kind": "dense", "weight": {"start": 1.0, "end": 0.0, "steps": 100}},
                "few": {"max_count": 4},
            },
        ),
        perturb=PerturbConfig(jitter=Schedule(0, 2, 10), tail_dropout=Schedule(0.0, 0.2, 20)),
        drags_on=DragsOn(camera=Schedule(0.0, 0.5, 10)),
    )
    assert len(schedules_of(config)) == 4
    later = at_step(config, 10)
    assert not schedules_of(later)
    assert dict(later.sampler.mixture)["dense"].weight == pytest.approx(0.9)
    assert dict(later.sampler.mixture)["few"] == SamplerConfig(max_count=4)
    assert (later.perturb.jitter, later.perturb.tail_dropout) == (2.0, pytest.approx(0.1))
    assert later.drags_on.camera == 0.5


def test_the_end_is_that_of_the_last_schedule():
    config = SamplerConfig(max_count=Schedule(64, 8, 10), spacing=Schedule(4.0, 5.0, 20))
    assert at_end(config) == SamplerConfig(spacing=5.0)
    assert at_end(SamplerConfig()) == SamplerConfig()


def test_a_config_without_schedules_is_the_same_at_every_step():
    config = DragSynthesis()
    assert at_step(config, 7) is config


def test_what_does_not_hold_at_an_end_is_refused_at_once():
    with pytest.raises(ValueError, match=r"min_count.*at step 50"):
        SamplerConfig(min_count=4, max_count=Schedule(8, 3, 50))
    with pytest.raises(ValueError, match=r"tail_dropout.*at step 10"):
        PerturbConfig(tail_dropout=Schedule(0.0, 1.5, 10))
    with pytest.raises(ValueError, match=r"drags_on.*at step 5"):
        DragsOn(Schedule(1, 0, 5), 0.0, 0.0)
    with pytest.raises(ValueError, match="tolerance"):
        CameraConfig(tolerance=Schedule(0.0, 1.0, 5))
    with pytest.raises(ValueError, match="1 step or more"):
        Schedule(0, 1, 0)


def test_config_files_have_schedules_as_mappings():
    config = ConfigDict()
    config.sampler = ConfigDict({"kind": "mixture", "mixture": {"a": {"mask_ratio": [0.5, 0.9]}}})
    config.sampler.mixture.a.max_count = ConfigDict({"start": 8, "end": 2, "steps": 10})
    config.perturb = ConfigDict({"jitter": {"start": 0, "end": 1.5, "steps": 10}})
    config.drags_on = ConfigDict({"camera": 0.5})
    config.camera = ConfigDict({"min_tracks": 9})
    config.height = 3  # not ours
    made = DragSynthesis.from_config(config)
    part = dict(made.sampler.mixture)["a"]
    assert part.max_count == Schedule(8, 2, 10) and part.mask_ratio == (0.5, 0.9)
    assert made.perturb.jitter == Schedule(0, 1.5, 10)
    assert made.drags_on.camera == 0.5 and made.camera.min_tracks == 9
    assert DragSynthesis.from_config({}) == DragSynthesis()


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"sampler": {"count": 3}}, "data.sampler.count is not a known entry"),
        ({"sampler": {"max_count": {"start": 3, "end": 1}}}, "data.sampler.max_count is a number"),
        (
            {"perturb": {"jitter": {"start": "a", "end": 1, "steps": 1}}},
            "data.perturb.jitter is a number, or a schedule",
        ),
        (
            {"perturb": {"subsample": {"start": 1, "end": 1, "steps": 1}}},
            "data.perturb.subsample is not a number",
        ),
        ({"sampler": {"kind": {"start": 1, "end": 1, "steps": 1}}}, "data.sampler.kind is not a"),
        ({"perturb": {"jitter": {"start": 0, "end": 1, "steps": 0}}}, "jitter: .*1 step or more"),
        ({"sampler": {"kind": "mixture", "mixture": {"a": {"b": 1}}}}, "mixture.a.b is not a"),
        ({"drags_on": {"object": -1}}, "data.drags_on"),
        ({"camera": {"min_tracks": 2}}, "data.camera.*at least 3"),
        ({"camera": {"min_share": 2}}, "data.camera.*min_share"),
        ({"camera": {"min_object_tracks": 0}}, "data.camera.*min_object_tracks"),
        ({"sampler": {"max_count": "many"}}, "data.sampler"),
    ],
)
def test_mistakes_in_configs_are_named(entries, message):
    with pytest.raises(UserError, match=message):
        DragSynthesis.from_config(entries)
