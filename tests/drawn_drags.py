"""A drag across a grey picture, and what a drawing of it changed."""

import numpy as np

from nuwa_jax.motion.tracks import Tracks, TrackState

HEIGHT, WIDTH, FRAMES = 60, 90, 5
GREY = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)


def drag(start=(20.0, 30.0), step=(10.0, 0.0), states=None):
    points = np.array(start) + np.arange(FRAMES)[:, None] * np.array(step)
    states = np.full(FRAMES, TrackState.VISIBLE) if states is None else np.asarray(states)
    return Tracks(points[None], states[None])


def changed(picture, ground):
    return (np.abs(picture.astype(int) - ground.astype(int)) > 8).any(axis=-1)
