import numpy as np
import pytest
from made_tracks import HEIGHT, WIDTH, moving_tracks

from nuwa_jax.motion.perturbation import PerturbConfig, perturb_tracks
from nuwa_jax.motion.schedules import Schedule
from nuwa_jax.motion.tracks import Tracks, TrackState, inside, net_displacement


@pytest.mark.parametrize(
    ("make", "message"),
    [
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
    result = perturb_tracks(tracks, np.random.default_rng(0), EXACT, HEIGHT, WIDTH)
    np.testing.assert_array_equal(result.points, tracks.points)
    np.testing.assert_array_equal(result.state, tracks.state)


def test_jitter_has_its_size_and_is_smooth_in_time():
    tracks = moving_tracks([1.0] * 150, frames=17)
    config = PerturbConfig(jitter=2.0, tail_dropout=0, subsample_probability=0)
    noise = (
        perturb_tracks(tracks, np.random.default_rng(0), config, 200, 200).points - tracks.points
    )
    assert noise[:, [0, 8, 16]].std() == pytest.approx(2.0, rel=0.15)
    assert np.abs(np.diff(noise, axis=1)).mean() < 0.3


def test_jittered_anchor_is_still_an_anchor():
    config = PerturbConfig(jitter=2.0, tail_dropout=0, subsample_probability=1)
    tracks = moving_tracks([0.0])
    moved = perturb_tracks(tracks, np.random.default_rng(0), config, HEIGHT, WIDTH)
    assert net_displacement(moved)[0] == 0
    assert not (moved.points == tracks.points).all()


def test_dropped_tails_are_unspecified_and_leave_motion():
    tracks = moving_tracks([1.0] * 50)
    config = PerturbConfig(jitter=0, tail_dropout=1, subsample_probability=0)
    result = perturb_tracks(tracks, np.random.default_rng(0), config, 200, 200)
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
    thinned = perturb_tracks(tracks, np.random.default_rng(3), config, HEIGHT, WIDTH).points[0]
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
    result = perturb_tracks(Tracks(points, state), np.random.default_rng(0), config, HEIGHT, WIDTH)
    np.testing.assert_allclose(result.points, tracks.points, atol=1e-4)
    np.testing.assert_array_equal(result.state, state)


def test_what_is_seen_stays_in_the_picture():
    points = np.tile(np.array([[0.0, 0.0], [55.0, 39.0]])[:, None], (20, 7, 1))
    points[:, :, 0] += np.linspace(0, 0.4, 7)
    points[1, 5:, 0] = 80.0
    state = np.ones(points.shape[:2], np.uint8)
    state[1, 5:] = TrackState.OUTSIDE
    state[3, 2:4] = TrackState.OCCLUDED
    config = PerturbConfig(jitter=5.0, tail_dropout=0, subsample_probability=0)
    rough = perturb_tracks(Tracks(points, state), np.random.default_rng(0), config, HEIGHT, WIDTH)
    np.testing.assert_array_equal(rough.state, state)
    assert inside(rough.points[state != TrackState.OUTSIDE], HEIGHT, WIDTH).all()
    assert (rough.points[1, 5:, 0] > 60).all()


@pytest.mark.parametrize("count, frames", [(3, 1), (0, 5), (0, 1)])
def test_one_frame_or_no_track_is_nothing_to_perturb(count, frames):
    tracks = moving_tracks([1.0] * count, frames=frames)
    result = perturb_tracks(tracks, np.random.default_rng(0), PerturbConfig(), HEIGHT, WIDTH)
    assert result.points.shape == (count, frames, 2)
    np.testing.assert_array_equal(result.points, tracks.points)


def test_schedules_are_to_be_resolved_first():
    config = PerturbConfig(jitter=Schedule(0.0, 1.0, 10))
    with pytest.raises(ValueError, match="at_step"):
        perturb_tracks(moving_tracks([1.0]), np.random.default_rng(0), config, HEIGHT, WIDTH)
