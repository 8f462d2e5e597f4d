"""What is measured of trackers and flow estimators; NumPy, given estimate and truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from nuwa_jax.motion.estimators import sample_patches
from nuwa_jax.motion.tracks import Tracks, TrackState, inside

# Where nobody knows the true flow, its files hold values beyond this (Middlebury's convention).
UNKNOWN_FLOW = 1e9
# Trackers are compared at this size, whatever that of the clip (TAP-Vid, arXiv 2211.03726).
REFERENCE_SIDE = 256
# A track whose every frame is within so many pixels, at the reference size, is fit to train on.
CLOSE = 4.0


@dataclasses.dataclass(frozen=True)
class TrackCounts:
    """What was seen of the tracks of one clip or more; counts of different clips are added up.

    Queries are the points that are visible in frame 0, other frames are scored. Errors are in
    pixels of a clip resized to 256 x 256. To be alive is to be called visible in the last frame.

    Attributes:
      queries, alive, close: points; those alive; those of them that in every frame in which they
        are called visible are so in truth, and within 4 pixels.
      lasting: points that in truth are visible in every frame: what a tracker that never finds a
        point again can at most keep.
      moving_alive, moving_close: the same of points that in truth move by 4 pixels or more.
      states: [4 4], frames by their true state (rows) and the one that was told.
      errors: of all frames that are visible, and were called so.
      round_trips: where tracking back from the last frame ends, from where the point started;
        points that are alive there and back, in pixels of the clip at the reference size.
    """

    queries: int
    alive: int
    close: int
    lasting: int
    moving_alive: int
    moving_close: int
    states: np.ndarray
    errors: Float[np.ndarray, " n"]
    round_trips: Float[np.ndarray, " m"]


def count_tracks(
    estimate: Tracks,
    truth: Tracks,
    size: tuple[int, int],
    returned: Tracks | None = None,
) -> TrackCounts:
    """Compares tracks with the truth.

    Args:
      estimate: tracks of the points of `truth` in frame 0, in their order.
      truth: exact tracks.
      size: height and width of the clip in pixels.
      returned: tracks of the last points of `estimate` through the reversed clip.
    """
    start = truth.visible[:, 0]
    estimate, truth = estimate.select(start), truth.select(start)
    scale = REFERENCE_SIDE / np.array(size[::-1])
    error = np.linalg.norm((estimate.points - truth.points) * scale, axis=-1)
    alive = estimate.visible[:, -1]
    right = truth.visible & (error <= CLOSE)
    close = alive & (right | ~estimate.visible).all(axis=1)
    way = np.linalg.norm((truth.points - truth.points[:, :1]) * scale, axis=-1)
    moving = np.where(truth.visible, way, 0).max(axis=1, initial=0) >= CLOSE
    states = np.zeros((4, 4), int)
    np.add.at(states, (truth.state[:, 1:], estimate.state[:, 1:]), 1)
    round_trips = np.zeros(0)
    if returned is not None:
        returned = returned.select(start)
        gap = np.linalg.norm((returned.points[:, -1] - truth.points[:, 0]) * scale, axis=-1)
        round_trips = gap[alive & returned.visible[:, -1]]
    return TrackCounts(
        queries=len(alive),
        alive=int(alive.sum()),
        close=int(close.sum()),
        lasting=int(truth.visible.all(axis=1).sum()),
        moving_alive=int((alive & moving).sum()),
        moving_close=int((close & moving).sum()),
        states=states,
        errors=error[:, 1:][(truth.visible & estimate.visible)[:, 1:]],
        round_trips=round_trips,
    )


def track_scores(clips: Sequence[TrackCounts]) -> dict[str, Any]:
    """Shares over all points of all clips; None where there was nothing to divide by.

    `survival` of `queries` are alive in the last frame, where `visible_throughout` could be;
    `ok4` of those are right in every frame in which they are called visible (every frame, where a
    tracker never finds a point again), `ok4_moving` of those that move. A frame counts as hidden if
    the point is occluded or outside: `occlusion_recall` is the share of truly hidden frames that
    were told, `occlusion_precision` the share of those told that are hidden.
    """
    total = {
        field.name: sum(getattr(clip, field.name) for clip in clips)
        for field in dataclasses.fields(TrackCounts)
        if field.name not in ("errors", "round_trips")
    }
    states = np.zeros((4, 4), int) + total["states"]
    hidden = [TrackState.OCCLUDED, TrackState.OUTSIDE]
    both = int(states[np.ix_(hidden, hidden)].sum())
    told = int(states[:, hidden].sum())
    true = int(states[hidden].sum())
    errors = np.concatenate([clip.errors for clip in clips] or [np.zeros(0)])
    round_trips = np.concatenate([clip.round_trips for clip in clips] or [np.zeros(0)])
    return {
        "queries": total["queries"],
        "median_error": _median(errors),
        "survival": _share(total["alive"], total["queries"]),
        "visible_throughout": _share(total["lasting"], total["queries"]),
        "ok4": _share(total["close"], total["alive"]),
        "ok4_moving": _share(total["moving_close"], total["moving_alive"]),
        "occlusion_recall": _share(both, true),
        "occlusion_precision": _share(both, told),
        "round_trip": _median(round_trips),
        "states": {
            f"{a.name.lower()} as {b.name.lower()}": int(states[a, b])
            for a in list(TrackState)[1:]
            for b in list(TrackState)[1:]
        },
    }


def end_point_errors(
    flow: Float[np.ndarray, "h w 2"], truth: Float[np.ndarray, "h w 2"]
) -> Float[np.ndarray, " n"]:
    """Distance in pixels between estimated and true ends of motion, wherever truth is known."""
    return np.linalg.norm(flow - truth, axis=-1)[known_flow(truth)]


def forward_backward_errors(
    forward: Float[np.ndarray, "h w 2"], backward: Float[np.ndarray, "h w 2"]
) -> Float[np.ndarray, " n"]:
    """How far from the start one lands after going there and back; where one stays inside."""
    height, width = forward.shape[:2]
    start = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)
    target = start + forward
    within = inside(target, height, width)
    there = forward[within]
    return np.linalg.norm(there + sample_patches(backward, target[within], 0)[:, 0], axis=-1)


def known_flow(truth: Float[np.ndarray, "h w 2"]) -> Bool[np.ndarray, "h w"]:
    """Where the true flow is known."""
    return (np.abs(truth) <= UNKNOWN_FLOW).all(axis=-1)  # not so for NaN


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _median(values: Float[np.ndarray, " n"]) -> float | None:
    return float(np.median(values)) if len(values) else None
