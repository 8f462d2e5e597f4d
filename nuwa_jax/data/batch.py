"""What training reads: one batch of clips, their drags and their captions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Int32, UInt8


class Batch(NamedTuple):
    """A pytree of host arrays. Sizes are fixed by the config, so that jit never recompiles.

    Attributes:
      video: uint8 [b t h w 3].
      flow: float16 [b t h w 2], dense, pixels per frame; `flow[:, 0]` is 0. None where not asked.
      points: float32 [b k t 2], drags as (x, y) in pixels; unused ones are all zero.
      state: uint8 [b k t], values of `TrackState`; unused drags are unspecified throughout.
      text: int32 [b l], tokens of the caption, padded with 0.
      fps: float32 [b], frames per second.
    """

    video: UInt8[np.ndarray, "b t h w 3"]
    flow: Float16[np.ndarray, "b t h w 2"] | None
    points: Float[np.ndarray, "b k t 2"]
    state: UInt8[np.ndarray, "b k t"]
    text: Int32[np.ndarray, "b l"]
    fps: Float[np.ndarray, " b"]
