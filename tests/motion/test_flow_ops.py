import numpy as np
import pytest

from nuwa_jax.motion.flow_ops import chain_flow, consistency_mask, forward_backward_error, warp
from nuwa_jax.motion.tracks import TrackState

HEIGHT, WIDTH = 18, 25


def uniform_flow(x, y, batch=1):
    return np.broadcast_to(np.array([x, y], np.float32), (batch, HEIGHT, WIDTH, 2))


@pytest.mark.parametrize("batch", [1, 2])
def test_warp_fetches_what_the_flow_points_to(batch):
    image = np.random.default_rng(0).random((batch, HEIGHT, WIDTH, 3), np.float32)
    moved = np.asarray(warp(image, uniform_flow(3, -2, batch)))
    np.testing.assert_allclose(moved[:, 2:, :-3], image[:, :-2, 3:], atol=1e-6)
    between = np.asarray(warp(image, uniform_flow(0.25, 0, batch)))
    expected = 0.75 * image[:, :, :-1] + 0.25 * image[:, :, 1:]
    np.testing.assert_allclose(between[:, :, :-1], expected, atol=1e-6)


def test_warp_continues_the_border_outwards():
    image = np.random.default_rng(1).random((1, HEIGHT, WIDTH, 1), np.float32)
    moved = np.asarray(warp(image, uniform_flow(100, 0)))
    np.testing.assert_allclose(moved, np.repeat(image[:, :, -1:], WIDTH, axis=2), atol=1e-6)


def test_warp_refuses_flow_of_another_size():
    with pytest.raises(ValueError, match="of one size"):
        warp(np.zeros((1, 5, 6, 3)), np.zeros((1, 6, 5, 2)))


def test_opposite_flows_are_consistent_until_the_border():
    forward = uniform_flow(2, 1, batch=2)
    np.testing.assert_allclose(forward_backward_error(forward, -forward), 0, atol=1e-6)
    mask = np.asarray(consistency_mask(forward, -forward))
    assert mask[:, : HEIGHT - 1, : WIDTH - 2].all()
    assert not mask[:, HEIGHT - 1].any() and not mask[:, :, WIDTH - 2 :].any()


def test_hidden_pixels_are_inconsistent():
    forward, backward = uniform_flow(3, 0).copy(), uniform_flow(-3, 0).copy()
    backward[:, 5:9, 10:14] = 4  # another surface arrives here
    error = np.asarray(forward_backward_error(forward, backward))[0]
    mask = np.asarray(consistency_mask(forward, backward))[0]
    np.testing.assert_allclose(error[5:9, 7:11], np.hypot(7, 4), atol=1e-5)
    assert not mask[5:9, 7:11].any()
    assert mask[:4, :20].all()


def test_points_follow_a_turning_flow_between_pixels():
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    angle, centre = 0.1, (12.0, 8.5)
    turn = np.array([[np.cos(angle) - 1, -np.sin(angle)], [np.sin(angle), np.cos(angle) - 1]])
    field = np.stack([x - centre[0], y - centre[1]], axis=-1) @ turn.T
    flow = np.repeat(field[None], 6, axis=0)
    flow[0] = np.nan  # never read
    tracks = chain_flow(flow, np.array([[17.3, 8.5], [12.0, 8.5]]))
    turned = [
        (centre[0] + 5.3 * np.cos(i * angle), centre[1] + 5.3 * np.sin(i * angle)) for i in range(6)
    ]
    np.testing.assert_allclose(tracks.points[0], turned, atol=1e-3)
    np.testing.assert_allclose(tracks.points[1], [centre] * 6, atol=1e-4)
    assert tracks.visible.all()


def test_points_that_leave_stay_outside_and_distrust_stays_hidden():
    flow = np.repeat(uniform_flow(4, 0), 5, axis=0).copy()
    flow[4] = -flow[4]
    trusted = np.ones((5, HEIGHT, WIDTH), bool)
    trusted[2, 3, 6] = False
    points = np.array([[15, 9], [2, 3]])
    tracks = chain_flow(flow, points, trusted)
    visible, occluded, outside = TrackState.VISIBLE, TrackState.OCCLUDED, TrackState.OUTSIDE
    assert tracks.state[0].tolist() == [visible] * 3 + [outside] * 2
    assert tracks.state[1].tolist() == [visible] * 2 + [occluded] * 3
    np.testing.assert_allclose(tracks.points[0, :, 0], [15, 19, 23, 27, 23])
