"""Tracks that are known by heart, for tests."""

import numpy as np

from nuwa_jax.motion.tracks import Tracks

HEIGHT, WIDTH = 40, 56


def moving_tracks(speeds, frames=7):
    """One track per speed (pixels per frame) rightwards, handles on a grid, all visible."""
    k = len(speeds)
    start = np.stack([4 + 6 * (np.arange(k) % 8), 4 + 6 * (np.arange(k) // 8)], axis=-1)
    points = np.repeat(start[:, None].astype(float), frames, axis=1)
    points[..., 0] += np.asarray(speeds)[:, None] * np.arange(frames)
    return Tracks(points, np.ones((k, frames)))
