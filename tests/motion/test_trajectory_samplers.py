import numpy as np
import pytest
from made_tracks import HEIGHT, WIDTH, moving_tracks

from nuwa_jax.motion.tracks import Tracks, TrackState, inside, net_displacement
from nuwa_jax.motion.trajectory_samplers import SamplerConfig, choose_tracks, sample_trajectories


def mixture(**parts):
    return SamplerConfig(kind="mixture", mixture=parts)


EVERY_KIND = [
    SamplerConfig(),
    SamplerConfig(kind="grid", spacing=10.0),
    SamplerConfig(kind="region", mask_ratio=(0.2, 0.9)),
    SamplerConfig(kind="dense", max_count=1024, grid_side=9),
    SamplerConfig(kind="object", tracks_per_object=3),
    mixture(few=dict(max_count=2), many=dict(kind="dense", min_count=3, max_count=40)),
]


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
        (lambda: SamplerConfig(mask_ratio=(0.9, 0.5)), "mask_ratio"),
        (lambda: SamplerConfig(mask_ratio=(0.9,)), "mask_ratio"),
        (lambda: SamplerConfig(region=0), "region is at least 1"),
        (lambda: SamplerConfig(grid_side=0), "grid_side is at least 1"),
        (lambda: SamplerConfig(tracks_per_object=0), "tracks_per_object is at least 1"),
        (lambda: SamplerConfig(coherence=-0.1), "coherence is at least 0"),
        (lambda: SamplerConfig(spacing=0), "spacing"),
        (lambda: SamplerConfig(kind="mixture"), "needs parts"),
        (lambda: SamplerConfig(mixture={"a": {}}), "needs parts"),
        (lambda: mixture(a=dict(weight=0.0)), "weights"),
        (lambda: mixture(a=dict(knd="grid")), "mixture.a.knd is not a known entry"),
        (lambda: mixture(a=3), "mixture.a"),
        (lambda: mixture(a=dict(kind="mixture", mixture={"b": {}})), "flat"),
        (lambda: SamplerConfig(min_count=3, max_count=2), "min_count"),
    ],
)
def test_configs_name_the_value_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def random_tracks(seed, count=60, frames=7):
    """Tracks that start anywhere, also beyond the border, with states of every kind."""
    rng = np.random.default_rng(seed)
    start = rng.uniform((-8, -8), (WIDTH + 8, HEIGHT + 8), (count, 1, 2))
    points = start + rng.normal(0, 2, (count, 1, 2)) * np.arange(frames)[:, None]
    state = rng.choice([1, 1, 1, 2, 0], (count, frames))
    state[::4] = 1
    return Tracks(points, np.where(inside(points, HEIGHT, WIDTH) | (state == 0), state, 3))


@pytest.mark.parametrize("config", EVERY_KIND, ids=lambda config: config.kind)
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_every_sampler_keeps_its_promises(config, frames):
    counts = []
    for seed in range(12):
        tracks = random_tracks(seed, frames=frames)
        groups = np.arange(60) % 4 - 1
        choice, again = (
            choose_tracks(tracks, np.random.default_rng(seed), config, HEIGHT, WIDTH, groups)
            for _ in range(2)
        )
        np.testing.assert_array_equal(choice.tracks, again.tracks)
        np.testing.assert_array_equal(choice.held, again.held)
        drags = choice.drags(tracks)
        counts.append(drags.num_tracks)
        assert len(set(choice.tracks.tolist())) == drags.num_tracks <= config.most_drags
        assert (drags.state[:, 0] == TrackState.VISIBLE).all()
        assert inside(drags.points[:, 0], HEIGHT, WIDTH).all()
        np.testing.assert_array_equal(drags.state, tracks.state[choice.tracks])
        free = ~choice.held
        np.testing.assert_array_equal(drags.points[free], tracks.points[choice.tracks[free]])
    if frames > 1:
        assert len(set(counts)) > 1


@pytest.mark.parametrize("config", EVERY_KIND, ids=lambda config: config.kind)
@pytest.mark.parametrize("count", [0, 1])
def test_every_sampler_takes_as_few_tracks_as_there_are(config, count):
    tracks = moving_tracks([1.0] * count)
    made = sample_trajectories(
        tracks, np.random.default_rng(0), config, HEIGHT, WIDTH, np.ones(count, int)
    )
    assert made.num_tracks <= count and made.num_frames == 7
    hidden = Tracks(tracks.points, np.full_like(tracks.state, TrackState.OCCLUDED))
    args = (np.random.default_rng(0), config, HEIGHT, WIDTH, np.ones(count, int))
    assert sample_trajectories(hidden, *args).num_tracks == 0


def grid_of_tracks(step=2.0, frames=5):
    """A track in every cell of 2x2 pixels, all moving alike to the right, inside the picture."""
    x, y = np.meshgrid(np.arange(0, WIDTH, step), np.arange(0, HEIGHT, step))
    start = np.stack([x.ravel(), y.ravel()], axis=-1)
    points = start[:, None] + np.array([0.5, 0.0]) * np.arange(frames)[:, None]
    return Tracks(points, np.ones(points.shape[:2]))


def test_regions_give_one_drag_each_where_their_tracks_agree():
    tracks = grid_of_tracks()
    points = tracks.points.copy()
    left = points[:, 0, 0] < WIDTH / 2
    points[left] += (
        np.random.default_rng(0).normal(0, 6, (left.sum(), 1, 2)) * np.arange(5)[:, None]
    )
    rough = Tracks(points, tracks.state)
    config = SamplerConfig(kind="region", mask_ratio=(0.0, 0.0), max_count=99)
    drags = sample_trajectories(rough, np.random.default_rng(0), config, HEIGHT, WIDTH)
    blocks = {tuple(block) for block in (drags.points[:, 0] // 8).astype(int).tolist()}
    assert len(blocks) == drags.num_tracks  # one per block
    right = [block for block in blocks if block[0] >= 4]
    assert len(right) == 3 * 5  # every block of the orderly half
    assert len(blocks) - len(right) <= 3  # 28 is in the midst of a column of blocks


def test_regions_are_withheld_in_the_stated_share_and_seen_throughout():
    tracks = grid_of_tracks()
    config = SamplerConfig(kind="region", mask_ratio=(0.8, 0.8), max_count=99)
    counts = [
        sample_trajectories(tracks, np.random.default_rng(s), config, HEIGHT, WIDTH).num_tracks
        for s in range(200)
    ]
    assert np.mean(counts) == pytest.approx(0.2 * 7 * 5, abs=1.0)
    state = tracks.state.copy()
    state[:, 3] = TrackState.OCCLUDED
    hidden = Tracks(tracks.points, state)
    args = (np.random.default_rng(0), config, HEIGHT, WIDTH)
    assert sample_trajectories(hidden, *args).num_tracks == 0


def test_dense_grid_gives_up_to_all_its_points_in_log_uniform_number():
    tracks = grid_of_tracks(step=1.0)
    full = SamplerConfig(kind="dense", grid_side=32, min_count=1024, max_count=1024)
    drags = sample_trajectories(tracks, np.random.default_rng(0), full, HEIGHT, WIDTH)
    assert drags.num_tracks == 1024
    assert len(np.unique(drags.points[:, 0], axis=0)) == 1024
    few = SamplerConfig(kind="dense", grid_side=8, max_count=64)
    counts = np.array(
        [
            sample_trajectories(tracks, np.random.default_rng(s), few, HEIGHT, WIDTH).num_tracks
            for s in range(1000)
        ]
    )
    assert counts.min() == 1 and counts.max() > 55
    # Log-uniform: as many from 1 to 7 as from 8 to 64.
    assert np.mean(counts < 8) == pytest.approx(np.log(8) / np.log(65), abs=0.05)


def test_objects_give_their_midst_first_and_only_if_they_move():
    tracks = moving_tracks([2.0] * 16 + [0.0] * 8 + [2.0] * 16)
    groups = np.array([1] * 16 + [2] * 8 + [-1] * 16)
    config = SamplerConfig(kind="object", max_count=8, min_count=8)
    for seed in range(10):
        (handle,) = sample(tracks, seed, groups, kind="object", min_count=8).points[:, 0]
        middle = np.median(tracks.points[:16, 0], axis=0)
        gaps = np.linalg.norm(tracks.points[:16, 0] - middle, axis=-1)
        assert np.linalg.norm(handle - middle) == pytest.approx(gaps.min())
    several = SamplerConfig(kind="object", min_count=8, tracks_per_object=4)
    counts = set()
    for seed in range(30):
        choice = choose_tracks(tracks, np.random.default_rng(seed), several, 40, 56, groups)
        assert (groups[choice.tracks] == 1).all()
        counts.add(len(choice.tracks))
    assert counts == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="groups"):
        choose_tracks(tracks, np.random.default_rng(0), config, HEIGHT, WIDTH)


def test_a_mixture_draws_its_parts_by_weight():
    tracks = moving_tracks([2.0] * 48)
    config = mixture(
        one=dict(max_count=1, weight=3.0),
        many=dict(kind="dense", min_count=20, max_count=40, grid_side=20),
    )
    assert config.most_drags == 40
    counts = np.array(
        [
            sample_trajectories(tracks, np.random.default_rng(s), config, HEIGHT, WIDTH).num_tracks
            for s in range(200)
        ]
    )
    assert set(counts[counts < 20]) == {1}
    assert np.mean(counts == 1) == pytest.approx(0.75, abs=0.09)
