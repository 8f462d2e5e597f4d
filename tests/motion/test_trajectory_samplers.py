import numpy as np
import pytest
from made_tracks import HEIGHT, WIDTH, moving_tracks

from nuwa_jax.motion.perturbation import PerturbConfig, perturb_tracks
from nuwa_jax.motion.tracks import Tracks, TrackState, net_displacement
from nuwa_jax.motion.trajectory_samplers import SamplerConfig, sample_trajectories


def sample(tracks, seed=0, groups=None, **options):
    config = SamplerConfig(**options)
    return sample_trajectories(tracks, np.random.default_rng(seed), config, HEIGHT, WIDTH, groups)


def test_fast_tracks_are_chosen_more_often_in_proportion():
    tracks = moving_tracks([1, 3])
    counts = np.zeros(2)
    for seed in range(400):
        (track,) = sample(tracks, seed, max_count=1, anchor_probability=0).points
        counts[int(track[0, 0] > 5)] += 1
    assert counts[1] / 400 == pytest.approx(0.75, abs=0.08)


def test_group_of_many_tracks_is_not_chosen_more_often():
    tracks = moving_tracks([2.0] * 16)
    groups = np.array([1] + [2] * 15)
    lonely = 0
    for seed in range(300):
        (track,) = sample(tracks, seed, groups, max_count=1).points
        lonely += bool((track[0] == tracks.points[0, 0]).all())
    assert lonely / 300 == pytest.approx(0.5, abs=0.08)


def test_counts_are_log_uniform_within_bounds():
    tracks = moving_tracks([2.0] * 48)
    counts = [
        sample(tracks, seed, max_count=8, suppression_radius=0).num_tracks for seed in range(300)
    ]
    assert set(counts) == set(range(1, 9))
    # P(n) = log((n + 1) / n) / log(9)
    assert np.mean(np.array(counts) == 1) == pytest.approx(np.log(2) / np.log(9), abs=0.08)
    assert min(sample(tracks, s, min_count=3, max_count=3).num_tracks for s in range(9)) == 3


def test_anchors_are_exactly_still_and_never_alone():
    jitter = np.random.default_rng(0).normal(0, 0.1, (40, 7, 2))
    mixed = moving_tracks([2.0] * 20 + [0.0] * 20)
    mixed = Tracks(mixed.points + jitter, mixed.state)
    seen = 0
    for seed in range(50):
        drags = sample(mixed, seed, max_count=6, anchor_probability=0.5)
        still = net_displacement(drags) < 1
        assert not still.all()
        assert (net_displacement(drags)[still] == 0).all()
        seen += still.sum()
    assert seen > 20


def test_a_still_clip_gives_no_motion_drags():
    assert sample(moving_tracks([0.0] * 9)).num_tracks == 0


def test_handles_are_visible_and_inside():
    tracks = moving_tracks([2.0] * 16)
    points, state = tracks.points.copy(), tracks.state.copy()
    state[:5, 0] = TrackState.OCCLUDED
    points[5:10, :, 0] -= 100
    hidden = Tracks(points, state)
    for kind in ("motion", "grid"):
        for seed in range(20):
            drags = sample(hidden, seed, kind=kind)
            assert (drags.state[:, 0] == TrackState.VISIBLE).all()
            assert (drags.points[:, 0] >= 0).all()
    assert sample(hidden.select(range(10))).num_tracks == 0


def test_handles_keep_their_distance():
    tracks = moving_tracks([2.0] * 48)
    for seed in range(20):
        handles = sample(tracks, seed, min_count=8, suppression_radius=13.0).points[:, 0]
        gaps = np.linalg.norm(handles[:, None] - handles, axis=-1) + 1e3 * np.eye(len(handles))
        assert gaps.min() >= 13


def test_grid_takes_the_tracks_nearest_to_distinct_anchors():
    rng = np.random.default_rng(1)
    start = rng.uniform((0, 0), (WIDTH - 1, HEIGHT - 1), (300, 1, 2))
    tracks = Tracks(np.repeat(start, 5, axis=1), np.ones((300, 5)))
    counts = set()
    for seed in range(40):
        drags = sample(tracks, seed, kind="grid", spacing=10.0)
        counts.add(drags.num_tracks)
        cells = {tuple(cell) for cell in (drags.points[:, 0] // 10).astype(int).tolist()}
        # An anchor stays in its cell, its nearest track is at most a step beyond.
        assert len(cells) >= drags.num_tracks - 2
    assert counts == set(range(1, 9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplerConfig(kind="random"), "motion"),
        (lambda: SamplerConfig(min_count=3, max_count=2), "min_count"),
    ],
)
def test_configs_name_the_value_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_same_generator_same_drags():
    tracks = moving_tracks(np.linspace(0, 3, 30))
    for kind in ("motion", "grid"):
        first, second = (
            perturb_tracks(sample(tracks, 7, kind=kind), np.random.default_rng(1), PerturbConfig())
            for _ in range(2)
        )
        np.testing.assert_array_equal(first.points, second.points)
        np.testing.assert_array_equal(first.state, second.state)
