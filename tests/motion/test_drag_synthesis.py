import numpy as np
import pytest
from made_tracks import HEIGHT, WIDTH

from nuwa_jax.motion.drag_synthesis import DragsOn, DragSynthesis, synthesise_drags
from nuwa_jax.motion.drags import DragSet
from nuwa_jax.motion.perturbation import PerturbConfig
from nuwa_jax.motion.schedules import Schedule, at_step
from nuwa_jax.motion.tracks import Tracks, TrackState, inside, net_displacement
from nuwa_jax.motion.trajectory_samplers import SamplerConfig

EXACT = PerturbConfig(jitter=0.0, tail_dropout=0.0, subsample_probability=0.0)


def clip(camera=(1.0, 0.0), own=(0.0, 2.0), frames=5):
    """63 tracks of a background, then 12 of an object in it; and the object of each."""
    x, y = np.meshgrid(np.linspace(2, WIDTH - 8, 9), np.linspace(2, HEIGHT - 2, 7))
    ground = np.stack([x.ravel(), y.ravel()], axis=-1)
    x, y = np.meshgrid(20 + 2.0 * np.arange(4), 12 + 2.0 * np.arange(3))
    thing = np.stack([x.ravel(), y.ravel()], axis=-1)
    time = np.arange(frames)[:, None]
    speed = np.array([camera] * 63 + [np.add(camera, own)] * 12)
    points = np.concatenate([ground, thing])[:, None] + speed[:, None] * time
    state = np.where(inside(points, HEIGHT, WIDTH), TrackState.VISIBLE, TrackState.OUTSIDE)
    return Tracks(points, state), np.array([0] * 63 + [1] * 12)


def synthesise(clip, drags_on, seed=0, known=True, sampler=None, perturb=EXACT):
    tracks, groups = clip
    config = DragSynthesis(sampler or SamplerConfig(max_count=4), perturb, DragsOn(*drags_on))
    rng = np.random.default_rng(seed)
    return synthesise_drags(tracks, rng, config, HEIGHT, WIDTH, groups if known else None)


def owners(drags, clip):
    """The object under each handle."""
    tracks, groups = clip
    gap = np.linalg.norm(drags.tracks.points[:, None, 0] - tracks.points[None, :, 0], axis=-1)
    return groups[gap.argmin(axis=1)]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "drags_on, on, objects", [((1, 0, 0), "object", {1}), ((0, 1, 0), "camera", {0})]
)
def test_drags_lie_on_what_they_are_to_lie_on(known, drags_on, on, objects):
    found = 0
    for seed in range(15):
        drags = synthesise(clip(), drags_on, seed, known)
        assert drags.on == on and set(owners(drags, clip())) == objects
        np.testing.assert_array_equal(drags.camera, owners(drags, clip()) == 0)
        found += drags.tracks.num_tracks
    assert found > 15


def test_both_and_frequencies():
    on = [synthesise(clip(), (2, 1, 1), seed).on for seed in range(400)]
    for part, share in (("object", 0.5), ("camera", 0.25), ("both", 0.25)):
        assert on.count(part) / 400 == pytest.approx(share, abs=0.08)
    everywhere = [set(owners(synthesise(clip(), (0, 0, 1), seed), clip())) for seed in range(30)]
    assert set.union(*everywhere) == {0, 1}


def test_what_a_clip_does_not_have_is_not_drawn():
    still_camera, only_camera = clip(camera=(0.0, 0.0)), clip(own=(0.0, 0.0))
    assert {synthesise(still_camera, (1, 3, 0), seed).on for seed in range(20)} == {"object"}
    points = still_camera[0].points.copy()
    points[3, 2:] += 3.0  # a tracker's error is no motion of the camera
    shaken = Tracks(points, still_camera[0].state), still_camera[1]
    assert {synthesise(shaken, (1, 3, 0), seed).on for seed in range(20)} == {"object"}
    for known in (True, False):
        tracks, groups = only_camera
        alone = (tracks, np.zeros_like(groups))
        assert {synthesise(alone, (3, 1, 0), s, known).on for s in range(20)} == {"camera"}
        drags = synthesise(alone, (1, 0, 0), 0, known)
        assert drags.on == "none" and drags.tracks.num_tracks == 0


def test_a_still_background_can_be_held_by_anchors_of_no_camera():
    sampler = SamplerConfig(min_count=4, max_count=4, anchor_probability=0.6)
    held = 0
    for seed in range(10):
        drags = synthesise(clip(camera=(0.0, 0.0)), (1, 0, 0), seed, sampler=sampler)
        still = net_displacement(drags.tracks) == 0
        assert (owners(drags, clip())[still] == 0).all() and not drags.camera.any()
        held += int(still.sum())
    assert held > 5


@pytest.mark.parametrize("kind", ["motion", "grid", "region", "dense"])
@pytest.mark.parametrize("drags_on", [(1, 0, 0), (0, 0, 1)])
def test_what_a_tracker_errs_on_a_still_background_is_no_camera(kind, drags_on):
    tracks, groups = clip(camera=(0.0, 0.0))
    noise = np.random.default_rng(0).normal(0, 0.05, tracks.points.shape)
    noisy = Tracks(tracks.points + noise, tracks.state), groups
    sampler = SamplerConfig(kind=kind, max_count=64, mask_ratio=(0.0, 0.5))
    count = 0
    for seed in range(5):
        drags = synthesise(noisy, drags_on, seed, sampler=sampler)
        assert not drags.camera.any()
        count += (owners(drags, clip()) == 0).sum()
    assert count > 0


@pytest.mark.parametrize("kind", ["motion", "grid", "region", "dense", "object"])
@pytest.mark.parametrize("known", [True, False])
def test_same_generator_same_drags_with_states_and_inside(kind, known):
    sampler = SamplerConfig(kind=kind, max_count=6, mask_ratio=(0.5, 0.8))
    perturb = PerturbConfig(jitter=3.0, tail_dropout=0.5)
    for seed in range(6):
        first, again = (
            synthesise(clip(), (1, 1, 1), seed, known, sampler, perturb) for _ in range(2)
        )
        np.testing.assert_array_equal(first.tracks.points, again.tracks.points)
        np.testing.assert_array_equal(first.tracks.state, again.tracks.state)
        assert first.on == again.on and first.tracks.num_tracks <= 6
        seen = first.tracks.state == TrackState.VISIBLE
        assert seen[:, 0].all() and inside(first.tracks.points[seen], HEIGHT, WIDTH).all()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["motion", "region", "dense", "object"])
@pytest.mark.parametrize("count, frames", [(0, 5), (75, 1), (0, 1), (1, 2)])
def test_few_tracks_and_frames_are_no_error(known, kind, count, frames):
    tracks, groups = clip(frames=frames)
    few = tracks.select(slice(0, count)), groups[:count]
    drags = synthesise(few, (1, 1, 1), known=known, sampler=SamplerConfig(kind=kind))
    assert drags.tracks.num_frames == frames and len(drags.camera) == drags.tracks.num_tracks


def test_drags_of_the_camera_are_saved_as_such():
    drags = synthesise(clip(), (0, 0, 1), 3, sampler=SamplerConfig(min_count=8, max_count=8))
    assert set(drags.camera) == {True, False}
    saved = DragSet.from_tracks(drags.tracks, WIDTH, HEIGHT, 8.0, drags.camera)
    assert [each.kind == "camera" for each in saved.drags] == drags.camera.tolist()


def test_schedules_change_what_is_made_and_nothing_else_does():
    config = DragSynthesis(
        sampler=SamplerConfig(
            kind="dense", min_count=Schedule(40, 2, 100), max_count=Schedule(60, 2, 100)
        ),
        perturb=EXACT,
        drags_on=DragsOn(0.0, 0.0, 1.0),
    )
    tracks, groups = clip()

    def count(step):
        rng = np.random.default_rng(step)
        made = synthesise_drags(tracks, rng, at_step(config, step), HEIGHT, WIDTH, groups)
        return made.tracks.num_tracks

    assert 40 <= count(0) <= 60
    assert 21 <= count(50) <= 31
    assert count(100) == count(1000) == 2
    with pytest.raises(ValueError, match="at_step"):
        synthesise_drags(tracks, np.random.default_rng(0), config, HEIGHT, WIDTH, groups)
