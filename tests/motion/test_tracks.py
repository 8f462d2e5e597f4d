import numpy as np
import pytest

from nuwa_jax.motion.tracks import (
    PerturbConfig,
    SamplerConfig,
    Tracks,
    TrackState,
    net_displacement,
    pchip,
    perturb_tracks,
    sample_trajectories,
)

HEIGHT, WIDTH = 40, 56


def moving_tracks(speeds, frames=7):
    """One track per speed (pixels per frame) rightwards, handles on a grid, all visible."""
    k = len(speeds)
    start = np.stack([4 + 6 * (np.arange(k) % 8), 4 + 6 * (np.arange(k) // 8)], axis=-1)
    points = np.repeat(start[:, None].astype(float), frames, axis=1)
    points[..., 0] += np.asarray(speeds)[:, None] * np.arange(frames)
    return Tracks(points, np.ones((k, frames)))


def sample(tracks, seed=0, groups=None, **options):
    config = SamplerConfig(**options)
    return sample_trajectories(tracks, np.random.default_rng(seed), config, HEIGHT, WIDTH, groups)


def test_tracks_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match=r"\[k t 2\]"):
        Tracks(np.zeros((2, 3, 2)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="0..3"):
        Tracks(np.zeros((1, 1, 2)), np.full((1, 1), 4))
    with pytest.raises(ValueError, match="track 1 is not finite in frame 2"):
        points = np.zeros((2, 3, 2))
        points[1, 2, 0] = np.nan
        Tracks(points, np.ones((2, 3)))


def test_unspecified_points_tell_nothing():
    tracks = Tracks(np.full((1, 2, 2), 7.0), np.array([[TrackState.VISIBLE, 0]]))
    np.testing.assert_array_equal(tracks.points[0], [[7, 7], [0, 0]])


def test_padding_adds_unspecified_tracks_and_never_drops_any():
    tracks = moving_tracks([1, 2])
    padded = tracks.pad(5)
    assert (padded.num_tracks, padded.num_frames) == (5, 7)
    np.testing.assert_array_equal(padded.select([0, 1]).points, tracks.points)
    assert (padded.state[2:] == TrackState.UNSPECIFIED).all()
    with pytest.raises(ValueError, match="cannot pad 2 tracks to 1"):
        tracks.pad(1)


def test_resizing_keeps_the_corners_of_the_picture():
    corners = np.array([[[-0.5, -0.5]], [[55.5, 39.5]]])
    resized = Tracks(corners, np.ones((2, 1))).resize((40, 56), (20, 84))
    np.testing.assert_allclose(resized.points[:, 0], [[-0.5, -0.5], [83.5, 19.5]])


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
        (lambda: PerturbConfig(jitter=-1), "jitter"),
        (lambda: PerturbConfig(tail_dropout=1.5), "tail_dropout"),
        (lambda: PerturbConfig(subsample=(1,)), "keyframes"),
    ],
)
def test_configs_name_the_value_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


EXACT = PerturbConfig(jitter=0, tail_dropout=0, subsample_probability=0)


def test_no_perturbation_returns_the_tracks():
    tracks = moving_tracks([1, 2, 0])
    result = perturb_tracks(tracks, np.random.default_rng(0), EXACT)
    np.testing.assert_array_equal(result.points, tracks.points)
    np.testing.assert_array_equal(result.state, tracks.state)


def test_jitter_has_its_size_and_is_smooth_in_time():
    tracks = moving_tracks([1.0] * 150, frames=17)
    config = PerturbConfig(jitter=2.0, tail_dropout=0, subsample_probability=0)
    noise = perturb_tracks(tracks, np.random.default_rng(0), config).points - tracks.points
    assert noise[:, [0, 8, 16]].std() == pytest.approx(2.0, rel=0.15)
    assert np.abs(np.diff(noise, axis=1)).mean() < 0.3


def test_jittered_anchor_is_still_an_anchor():
    config = PerturbConfig(jitter=2.0, tail_dropout=0, subsample_probability=1)
    tracks = moving_tracks([0.0])
    moved = perturb_tracks(tracks, np.random.default_rng(0), config)
    assert net_displacement(moved)[0] == 0
    assert not (moved.points == tracks.points).all()


def test_dropped_tails_are_unspecified_and_leave_motion():
    tracks = moving_tracks([1.0] * 50)
    config = PerturbConfig(jitter=0, tail_dropout=1, subsample_probability=0)
    result = perturb_tracks(tracks, np.random.default_rng(0), config)
    known = result.state == TrackState.VISIBLE
    lengths = known.sum(axis=1)
    assert lengths.min() >= 2 and len(set(lengths)) > 3
    assert all(row[:n].all() for row, n in zip(known, lengths, strict=True))
    np.testing.assert_array_equal(result.points[known], tracks.points[known])


def test_thinned_drag_passes_through_its_keyframes_and_stays_in_their_bounds():
    frames = 15
    time = np.linspace(0, 1, frames)
    path = np.stack([40 * time, 20 + 10 * np.sin(3 * np.pi * time)], axis=-1)
    tracks = Tracks(path[None], np.ones((1, frames)))
    config = PerturbConfig(jitter=0, tail_dropout=0, subsample=(4,), subsample_probability=1)
    thinned = perturb_tracks(tracks, np.random.default_rng(3), config).points[0]
    same = np.isclose(thinned, tracks.points[0], atol=1e-4).all(axis=-1)
    assert 4 <= same.sum() < frames and same[[0, -1]].all()
    assert thinned[:, 1].min() >= path[:, 1].min() - 1e-4
    assert thinned[:, 1].max() <= path[:, 1].max() + 1e-4


def test_thinning_reads_no_hidden_positions():
    tracks = moving_tracks([1.0])
    points, state = tracks.points.copy(), tracks.state.copy()
    points[0, 3] = 1000
    state[0, 3] = TrackState.OCCLUDED
    config = PerturbConfig(jitter=0, tail_dropout=0, subsample=(3,), subsample_probability=1)
    result = perturb_tracks(Tracks(points, state), np.random.default_rng(0), config)
    np.testing.assert_allclose(result.points, tracks.points, atol=1e-4)
    np.testing.assert_array_equal(result.state, state)


def test_same_generator_same_drags():
    tracks = moving_tracks(np.linspace(0, 3, 30))
    for kind in ("motion", "grid"):
        first, second = (
            perturb_tracks(sample(tracks, 7, kind=kind), np.random.default_rng(1), PerturbConfig())
            for _ in range(2)
        )
        np.testing.assert_array_equal(first.points, second.points)
        np.testing.assert_array_equal(first.state, second.state)


def test_pchip_keeps_the_ends_and_never_overshoots():
    values = np.array([[0.0], [0.0], [10.0], [10.0]])
    result = pchip(values, np.arange(4.0), np.linspace(-1, 5, 61))
    assert result.min() == 0 and result.max() == 10
    assert (np.diff(result[:, 0]) >= 0).all()
