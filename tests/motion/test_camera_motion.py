"""Camera against object, on scenes whose camera and objects are known exactly."""

import threading

import numpy as np
import pytest
from made_tracks import HEIGHT, WIDTH, moving_tracks

from nuwa_jax.data.scenes import SceneConfig, render_scene
from nuwa_jax.motion.camera_motion import UNCLEAR, CameraConfig, fit_camera, group_tracks
from nuwa_jax.motion.tracks import Tracks, TrackState

SCENES = dict(height=72, width=104, frames=7, background_points=40, supersample=1)
MOVING = SceneConfig(
    **SCENES, pan_probability=1.0, zoom_probability=0.6, still_probability=0.0, points_per_sprite=10
)
STILL = SceneConfig(
    **SCENES, pan_probability=0.0, zoom_probability=0.0, still_probability=0.0, points_per_sprite=10
)


def split(config, count):
    """Tracks of scenes as (truly background, said to be background), for those that are seen."""
    truth, said, found, moves = [], [], 0, []
    for seed in range(count):
        scene = render_scene(seed, config)
        camera = fit_camera(scene.tracks, config.height, config.width)
        found += camera is not None
        if camera is not None:
            seen = scene.tracks.visible.sum(axis=1) >= 2
            truth.append((scene.track_object == 0)[seen])
            said.append(camera.background[seen])
            moves.append(camera.moves)
    return np.concatenate(truth), np.concatenate(said), found, moves


@pytest.mark.parametrize("config, moves", [(MOVING, True), (STILL, False)])
def test_background_is_told_from_objects_whether_the_camera_moves_or_not(config, moves):
    truth, said, found, moved = split(config, 20)
    assert found == 20
    assert set(moved) == {moves}
    assert (truth & said).sum() / said.sum() > 0.99  # precision
    assert (truth & said).sum() / truth.sum() > 0.99  # recall


def test_transforms_are_those_of_the_camera():
    for seed in range(8):
        scene = render_scene(seed, MOVING)
        camera = fit_camera(scene.tracks, MOVING.height, MOVING.width)
        background = scene.tracks.select((scene.track_object == 0) & scene.tracks.visible[:, 0])
        start = background.points[:, 0].astype(np.float64)
        for frame, transform in enumerate(camera.transforms):
            expected = start @ transform[:, :2].T + transform[:, 2]
            # The truth of every background point, seen or hidden.
            assert np.abs(expected - background.points[:, frame]).max() < 0.05
        own = camera.own_motion[camera.background]
        assert np.nanmax(np.abs(own)) < 0.1


def test_objects_of_a_scene_are_groups_of_their_own():
    pure, tracks_grouped, tracks_free = 0, 0, 0
    for seed in range(20):
        scene = render_scene(seed, MOVING)
        groups = group_tracks(scene.tracks, MOVING.height, MOVING.width)
        on_sprites = scene.track_object > 0
        tracks_free += int((on_sprites & (scene.tracks.visible.sum(axis=1) >= 2)).sum())
        for group in range(1, groups.max() + 1):
            owners = scene.track_object[groups == group]
            pure += int(np.bincount(owners).max())
            tracks_grouped += len(owners)
    assert tracks_grouped > 0.9 * tracks_free
    assert pure > 0.95 * tracks_grouped


def test_larger_objects_come_first_and_loners_are_unclear():
    still = grid(9, 7)
    objects = [moving(5, 3, (12.0, 12.0), (3.0, 0.0)), moving(3, 3, (40.0, 24.0), (0.0, -2.0))]
    loner = moving(1, 1, (30.0, 6.0), (-3.0, 2.0))
    tracks = Tracks.concatenate([loner, objects[1], still, objects[0]])
    groups = group_tracks(tracks, HEIGHT, WIDTH)
    assert groups.tolist() == [UNCLEAR] + [2] * 9 + [0] * 63 + [1] * 15
    lower = CameraConfig(min_object_tracks=1)
    assert group_tracks(tracks, HEIGHT, WIDTH, lower)[0] == 3


def grid(columns, rows, speed=(0.0, 0.0), frames=5):
    x, y = np.meshgrid(np.linspace(1, WIDTH - 2, columns), np.linspace(1, HEIGHT - 2, rows))
    start = np.stack([x.ravel(), y.ravel()], axis=-1)
    points = start[:, None] + np.array(speed) * np.arange(frames)[:, None]
    return Tracks(points, np.ones(points.shape[:2]))


def moving(columns, rows, corner, speed, frames=5):
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    start = np.array(corner) + 2.0 * np.stack([x.ravel(), y.ravel()], axis=-1)
    points = start[:, None] + np.array(speed) * np.arange(frames)[:, None]
    return Tracks(points, np.ones(points.shape[:2]))


def test_a_crowded_object_is_not_taken_for_the_background():
    crowd = moving(20, 12, (8.0, 8.0), (2.0, 1.0))
    assert crowd.num_tracks > 3 * grid(9, 7).num_tracks
    tracks = Tracks.concatenate([crowd, grid(9, 7)])
    background = fit_camera(tracks, HEIGHT, WIDTH, CameraConfig(min_spread=0.0)).background
    assert background[240:].all() and not background[:240].any()


def test_tracks_that_are_lost_before_anything_moves_decide_nothing():
    ground, lost, late = (grid(*size, frames=13) for size in ((6, 5), (5, 4), (8, 7)))
    state = lost.state.copy()
    state[:, 8:] = TrackState.OCCLUDED
    points = late.points.copy()
    points[:, 8:, 1] += np.arange(1, 6)  # all that moves starts when those are gone
    points[:, 8:] += np.random.default_rng(0).normal(0, 2, (56, 1, 2)) * np.arange(5)[:, None]
    tracks = Tracks.concatenate([ground, Tracks(lost.points, state), Tracks(points, late.state)])
    background = fit_camera(tracks, HEIGHT, WIDTH).background
    assert background[:50].all() and not background[50:].any()


def test_everything_moving_as_it_likes_has_no_background():
    rng = np.random.default_rng(0)
    points = rng.uniform((0, 0), (WIDTH, HEIGHT), (60, 1, 2))
    points = points + rng.normal(0, 6, (60, 1, 2)) * np.arange(5)[:, None]
    tracks = Tracks(points, np.ones((60, 5)))
    assert fit_camera(tracks, HEIGHT, WIDTH) is None
    assert not (group_tracks(tracks, HEIGHT, WIDTH) == 0).any()


def test_everything_moving_together_is_the_camera():
    camera = fit_camera(grid(9, 7, (1.5, -0.5)), HEIGHT, WIDTH)
    assert camera.background.all() and camera.moves


@pytest.mark.parametrize("count, frames", [(0, 5), (1, 5), (5, 5), (40, 1), (0, 1)])
def test_too_few_tracks_or_frames_tell_nothing(count, frames):
    tracks = moving_tracks([1.0] * count, frames=frames)
    assert fit_camera(tracks, HEIGHT, WIDTH) is None
    groups = group_tracks(tracks, HEIGHT, WIDTH)
    assert groups.shape == (count,) and not (groups == 0).any()


def test_two_frames_are_enough():
    tracks = Tracks.concatenate([grid(9, 7, frames=2), moving(4, 3, (10.0, 10.0), (5.0, 0.0), 2)])
    assert group_tracks(tracks, HEIGHT, WIDTH).tolist() == [0] * 63 + [1] * 12


def test_frames_in_which_nothing_is_seen_are_unknown_and_the_rest_is_told():
    tracks = Tracks.concatenate([grid(9, 7), moving(4, 3, (10.0, 10.0), (3.0, 0.0))])
    state = tracks.state.copy()
    state[:, 2] = TrackState.OCCLUDED
    state[3] = TrackState.OCCLUDED  # never seen at all
    camera = fit_camera(Tracks(tracks.points, state), HEIGHT, WIDTH)
    assert (
        np.isnan(camera.transforms[2]).all() and np.isfinite(camera.transforms[[0, 1, 3, 4]]).all()
    )
    assert np.flatnonzero(~camera.background).tolist() == [3, *range(63, 75)]
    assert group_tracks(Tracks(tracks.points, state), HEIGHT, WIDTH)[3] == UNCLEAR


def test_the_result_is_the_same_in_every_run_and_thread():
    scene = render_scene(3, MOVING)
    noise = np.random.default_rng(0).normal(0, 0.3, scene.tracks.points.shape)
    tracks = Tracks(scene.tracks.points + noise, scene.tracks.state)
    results = []

    def run():
        np.random.seed(len(results))
        camera = fit_camera(tracks, MOVING.height, MOVING.width)
        groups = group_tracks(tracks, MOVING.height, MOVING.width)
        results.append((camera.transforms.tobytes(), groups.tobytes()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run()
    assert len(results) == 5 and len(set(results)) == 1
