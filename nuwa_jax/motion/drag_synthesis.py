"""From the tracks of a clip to the drags of a training sample: what is dragged, where, how well.

First it is drawn whether the drags lie on objects, on the background (drags of the camera) or on
both; then which of those tracks become drags; then they are made imprecise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nuwa_jax.motion.camera_motion import CameraConfig, group_tracks
from nuwa_jax.motion.perturbation import PerturbConfig, perturb_tracks
from nuwa_jax.motion.schedules import Schedule, build_config, check_ends
from nuwa_jax.motion.tracks import Tracks, net_displacement
from nuwa_jax.motion.trajectory_samplers import BACKGROUND, SamplerConfig, choose_tracks


@dataclasses.dataclass(frozen=True)
class DragsOn:
    """What drags lie on, as relative frequencies. Any number may be a `Schedule`.

    What a clip does not have is never drawn: the camera, where the background is still; objects,
    where nothing moves on its own.

    Attributes:
      object: on what moves on its own. What stays still may be held by an anchor.
      camera: on the background only: drags of the camera.
      both: on anything.

    Raises:
      ValueError: one is negative, or all are 0.
    """

    object: float | Schedule = 0.75
    camera: float | Schedule = 0.0
    both: float | Schedule = 0.25

    def __post_init__(self) -> None:
        if check_ends(self):
            return
        values = dataclasses.astuple(self)
        if min(values) < 0 or not sum(values) > 0:
            raise ValueError(
                "drags_on needs frequencies of at least 0 for object, camera and both, one of "
                f"them above 0, got {values}"
            )


@dataclasses.dataclass(frozen=True)
class DragSynthesis:
    """How drags are made of tracks.

    Attributes:
      sampler: which tracks become drags.
      perturb: how imprecise drags are.
      drags_on: whether they lie on objects or on the background.
      camera: how the two are told apart in clips of which it is not known.
    """

    sampler: SamplerConfig = SamplerConfig()
    perturb: PerturbConfig = PerturbConfig()
    drags_on: DragsOn = DragsOn()
    camera: CameraConfig = CameraConfig()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "data") -> DragSynthesis:
        """From the entries sampler, perturb, drags_on and camera of a config; others are not read.

        Raises:
          UserError: an entry within them is unknown or makes no sense.
        """
        return cls(
            **{
                name: build_config(part, config[name], f"{where}.{name}")
                for name, part in PARTS.items()
                if name in config
            }
        )


PARTS = {
    "sampler": SamplerConfig,
    "perturb": PerturbConfig,
    "drags_on": DragsOn,
    "camera": CameraConfig,
}


class Drags(NamedTuple):
    """Drags of a clip.

    Attributes:
      tracks: positions and states.
      camera: bool [n], the drags of a background that moves.
      on: what they were drawn to lie on: "object", "camera", "both", or "none" if nothing moves
        that may be dragged; then they are anchors, or move by less than `min_motion`.
    """

    tracks: Tracks
    camera: Bool[np.ndarray, " n"]
    on: str


def synthesise_drags(
    tracks: Tracks,
    rng: np.random.Generator,
    config: DragSynthesis,
    height: int,
    width: int,
    groups: Int[np.ndarray, " k"] | None = None,
) -> Drags:
    """The drags of a clip.

    Args:
      tracks: everything that was tracked, in pixels of the clip.
      rng: the one source of randomness.
      config: without schedules (`nuwa_jax.motion.schedules.at_step`).
      height: of the clip in pixels.
      width: of the clip in pixels.
      groups: int [k], the object each track belongs to, if it is known: `BACKGROUND` (0) or a
        number from 1 on. Otherwise it is found by how the tracks move, where it is needed.
    """
    frequency = config.drags_on
    total = frequency.object + frequency.camera + frequency.both
    drawn = rng.random()
    displacement = net_displacement(tracks)
    moving = displacement >= config.sampler.min_motion
    # What comes first is drawn most often without telling camera and objects apart.
    unconditional = drawn * total < frequency.both and moving.any()
    if groups is None and (_needs_groups(config.sampler) or not unconditional):
        groups = group_tracks(tracks, height, width, config.camera)
    if unconditional:
        on = "both"
    else:
        on = _draw_part(drawn, displacement, config.sampler.min_motion, groups, frequency)
    kept = np.arange(tracks.num_tracks)
    if on == "camera":
        kept = np.flatnonzero(groups == BACKGROUND)
    elif on != "both":
        # A background that moves is the camera's doing; one that is still can be held.
        kept = np.flatnonzero(((groups > BACKGROUND) & (on == "object")) | ~moving)
    tracks = tracks.select(kept)
    groups = None if groups is None else np.asarray(groups)[kept]
    choice = choose_tracks(tracks, rng, config.sampler, height, width, groups)
    drags = perturb_tracks(choice.drags(tracks), rng, config.perturb, height, width)
    if groups is None:
        camera = np.zeros(drags.num_tracks, bool)
    else:
        moved = _background_moves(displacement[kept], groups, config.sampler.min_motion)
        camera = (groups[choice.tracks] == BACKGROUND) & ~_still(drags) & moved
    return Drags(drags, camera, on)


def _draw_part(
    drawn: float,
    displacement: Float[np.ndarray, " k"],
    least: float,
    groups: Int[np.ndarray, " k"],
    frequency: DragsOn,
) -> str:
    """What `drawn`, in [0, 1), stands for among what the clip has."""
    moving = displacement >= least
    has = {
        "both": moving.any(),
        "camera": _background_moves(displacement, groups, least),
        "object": (moving & (groups > BACKGROUND)).any(),
    }
    weights = {part: getattr(frequency, part) * bool(there) for part, there in has.items()}
    left = drawn * sum(weights.values())
    for part, weight in weights.items():
        if left < weight:
            return part
        left -= weight
    return "none"


def _background_moves(
    displacement: Float[np.ndarray, " k"], groups: Int[np.ndarray, " k"], least: float
) -> bool:
    """On the whole: of many tracks on a still background, one or the other is wrong."""
    background = groups == BACKGROUND
    return bool(background.any() and displacement[background].mean() >= least)


def _needs_groups(sampler: SamplerConfig) -> bool:
    return sampler.kind == "object" or any(_needs_groups(part) for _, part in sampler.mixture)


def _still(drags: Tracks) -> Bool[np.ndarray, " n"]:
    return net_displacement(drags) == 0
