"""The tracker that scores videos: near the truth on good videos, never lost on bad ones."""

import cv2
import numpy as np
import pytest

from nuwa_jax.data.scenes import HELD_OUT_SEED, SceneConfig, render_scene
from nuwa_jax.evaluation import metrics
from nuwa_jax.evaluation.template_tracker import TemplateTracker


def noise_picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    picture = cv2.GaussianBlur(rng.uniform(0, 255, (height, width, 3)), (0, 0), 1.5)
    return cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def slide(picture, step, frames):
    """The picture shifted by step (x, y) pixels per frame, cut from a larger one."""
    height, width = picture.shape[:2]
    matrices = [np.array([[1, 0, i * step[0]], [0, 1, i * step[1]]], float) for i in range(frames)]
    return np.stack([cv2.warpAffine(picture, m, (width, height)) for m in matrices])


@pytest.mark.parametrize("height, width, frames", [(48, 64, 5), (64, 40, 3)])
def test_shifts_are_found_to_a_fraction_of_a_pixel(height, width, frames):
    video = slide(noise_picture(height, width), (2.25, -1.5), frames)
    points = np.array([[15.3, 30.0], [20.0, 25.6]])
    tracked = TemplateTracker().track(video, points)
    expected = points[:, None] + np.arange(frames)[:, None] * np.array([2.25, -1.5])
    assert tracked.points.shape == (2, frames, 2)
    np.testing.assert_allclose(tracked.points, expected, atol=0.25)
    assert tracked.visible.all()


def test_large_pictures_are_tracked_on_a_small_copy():
    video = slide(cv2.resize(noise_picture(64, 80), None, fx=3, fy=3), (9.0, 4.0), 3)
    tracked = TemplateTracker(side=64).track(video, np.array([[120.0, 100.0]]))
    np.testing.assert_allclose(tracked.points[0, 2], [138, 108], atol=0.75)


def test_a_still_video_has_still_tracks():
    """The ceiling of the protocol: a tracker that drifts there would lower it."""
    scene = render_scene(HELD_OUT_SEED, SceneConfig())
    video = np.repeat(scene.video[:1], 8, axis=0)
    start = scene.tracks.select(scene.tracks.visible[:, 0]).points[:, 0]
    tracked = TemplateTracker().track(video, start)
    assert np.abs(tracked.points - start[:, None]).max() < 0.35


def test_a_turning_and_growing_object_is_followed():
    picture = noise_picture(64, 64)
    matrices = [cv2.getRotationMatrix2D((31.5, 31.5), -7 * i, 1.04**i) for i in range(6)]
    video = np.stack([cv2.warpAffine(picture, m, (64, 64)) for m in matrices])
    start = np.array([[40.0, 26.0]])
    expected = np.stack([m @ [40.0, 26.0, 1.0] for m in matrices])
    tracked = TemplateTracker().track(video, start)
    np.testing.assert_allclose(tracked.points[0], expected, atol=1.0)


def test_a_point_is_found_again_behind_an_occluder():
    ground = np.full((48, 64, 3), 60, np.uint8)
    sprite = noise_picture(13, 13, seed=1)
    video = np.repeat(ground[None], 7, axis=0)
    for i in range(7):
        video[i, 18:31, 5 + 6 * i : 18 + 6 * i] = sprite
    video[2:5, :, 14:44] = (10, 200, 30)  # a wall comes and goes
    tracked = TemplateTracker().track(video, np.array([[11.0, 24.0]]))
    np.testing.assert_allclose(tracked.points[0, :, 0], 11 + 6 * np.arange(7), atol=2.0)
    np.testing.assert_allclose(tracked.points[0, 5:, 0], [41, 47], atol=0.3)
    assert not tracked.visible[0, 3] and tracked.visible[0, [0, 1, 5, 6]].all()


@pytest.mark.parametrize("video", ["black", "noise", "plain"])
def test_every_point_has_a_position_in_the_worst_video(video):
    first = noise_picture(32, 24)
    rest = {
        "black": np.zeros((4, 32, 24, 3), np.uint8),
        "noise": np.random.default_rng(0).integers(0, 255, (4, 32, 24, 3), dtype=np.uint8),
        "plain": np.full((4, 32, 24, 3), 128, np.uint8),
    }[video]
    corners = np.array([[0.0, 0.0], [23.0, 31.0], [-0.4, 31.4], [12.0, 15.0]])
    tracked = TemplateTracker().track(np.concatenate([first[None], rest]), corners)
    assert tracked.points.shape == (4, 5, 2)
    assert np.isfinite(tracked.points).all()
    assert (tracked.points >= -1).all() and (tracked.points <= [24, 32]).all()
    np.testing.assert_allclose(tracked.points[:, 0], corners, atol=1e-5)


def test_no_points_and_single_frames_are_fine():
    picture = noise_picture(20, 30)
    assert TemplateTracker().track(picture[None], np.array([[5.0, 6.0]])).points.shape == (1, 1, 2)
    assert TemplateTracker().track(picture[None].repeat(3, 0), np.zeros((0, 2))).num_tracks == 0


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_floor_on_scenes_is_far_below_their_ceiling(blur):
    """Sharp or as soft as a small model's videos: what the tracker gets wrong stays small."""
    floor, ceiling = [], []
    for index in range(10):
        scene = render_scene(HELD_OUT_SEED + 900_000 + index, SceneConfig())
        middles = np.arange(scene.track_object.max())
        truth = scene.tracks.select(middles[scene.tracks.visible[middles, 0]])
        video = scene.video.copy()
        if blur:
            video[1:] = [cv2.GaussianBlur(frame, (0, 0), blur) for frame in video[1:]]
        tracked = TemplateTracker().track(video, truth.points[:, 0])
        still = np.repeat(truth.points[:, :1], truth.num_frames, axis=1)
        floor.append(metrics.trajectory_error(tracked.points, truth))
        ceiling.append(metrics.trajectory_error(still, truth))
    assert np.nanmean(floor) < 0.1 * np.nanmean(ceiling)
    assert np.nanmedian(floor) < 0.5
