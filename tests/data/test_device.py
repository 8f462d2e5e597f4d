import dataclasses

import cv2
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from prepared_clips import SMALL, assert_equal, captions, joined, make_clips, take

from nuwa_jax.data.device import complete, to_device
from nuwa_jax.motion.tracks import TrackState

FLIPPING = dataclasses.replace(SMALL, flip_probability=0.5)


def finished(batch, height=24, width=32):
    return jax.jit(complete, static_argnums=(1, 2))(batch, height, width)


def test_mirrored_elements_are_mirrored_in_all_their_parts():
    raw = joined(take(FLIPPING, 6, with_flow=True))
    plain = joined(take(SMALL, 6, with_flow=True))
    assert_equal(raw._replace(flip=None), plain)  # only the bit differs on the host
    done = finished(raw)
    assert done.flip is None
    assert 0 < raw.flip.sum() < len(raw.flip)
    for row, flip in enumerate(raw.flip):
        video, flow, points = (
            plain.video[row],
            plain.flow[row].astype(np.float32),
            plain.points[row],
        )
        if flip:
            video = np.stack([cv2.flip(frame, 1) for frame in video])
            flow = np.stack([cv2.flip(frame, 1) for frame in flow]) * [-1, 1]
            used = (plain.state[row] != TrackState.UNSPECIFIED).any(axis=1)
            points = np.where(used[:, None, None], points * [-1, 1] + [31, 0], points)
        np.testing.assert_array_equal(done.video[row], video)
        np.testing.assert_array_equal(done.flow[row], flow.astype(np.float32))
        np.testing.assert_allclose(done.points[row], points, atol=1e-5)
        np.testing.assert_array_equal(done.state[row], plain.state[row])


def test_captions_that_tell_left_from_right_are_never_mirrored(tmp_path):
    said = ["to the Left", "brightness", "right-hand", "anticlockwise", "upright", "leftwards"]

    def caption(record, scene):
        del scene
        return dataclasses.replace(record, caption=said[int(record.source_id)])

    folder = make_clips(tmp_path / "clips", count=len(said), change=caption)
    config = dataclasses.replace(
        SMALL, clips=folder, clips_weight=1.0, scenes_weight=0.0, flip_probability=1.0
    )
    batch = take(config, 1, batch_size=len(said))[0]
    flipped = {name for name, flip in zip(captions(batch), batch.flip, strict=True) if flip}
    assert flipped == {"brightness", "upright"}


def test_clips_are_mirrored_as_often_as_the_config_says(tmp_path):
    probability = 0.3
    folder = make_clips(tmp_path / "clips", count=3, height=24, width=32)
    config = dataclasses.replace(
        SMALL, clips=folder, clips_weight=1.0, scenes_weight=0.0, flip_probability=probability
    )
    share = take(config, 1, batch_size=200)[0].flip.mean()
    assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / 200)


def test_flow_is_sent_small_and_is_what_it_was_on_the_device(tmp_path):
    folder = make_clips(tmp_path / "clips", count=4, height=32, width=48)
    base = dataclasses.replace(SMALL, height=16, width=24, clips=folder, clips_weight=1.0)
    whole = joined(take(base, 4, with_flow=True))
    sent = joined(take(dataclasses.replace(base, flow_divisor=2), 4, with_flow=True))
    assert sent.flow.shape == (8, 5, 8, 12, 2) and sent.flow.dtype == np.float16
    assert_equal(sent._replace(flow=None), whole._replace(flow=None))
    done = np.asarray(finished(sent, 16, 24).flow)
    enlarged = [
        [cv2.resize(frame.astype(np.float32), (24, 16)) for frame in clip] for clip in sent.flow
    ]
    np.testing.assert_allclose(done, enlarged, atol=1e-4)
    assert not done[:, 0].any()
    error = np.abs(done - whole.flow.astype(np.float32))
    # Only along the edges of what moves are the two different.
    assert np.abs(whole.flow).max() > 1 and np.median(error[:, 1:]) < 0.05


def test_batch_moves_to_devices_with_and_without_a_sharding():
    batch = take(FLIPPING, 1, with_flow=True)[0]
    sharding = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec("data"))
    for moved in (to_device(batch), to_device(batch, sharding)):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(moved))
        assert_equal(moved, batch)
    assert to_device(batch._replace(flow=None)).flow is None
