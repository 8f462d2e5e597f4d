"""What training reads: one batch of clips, their drags and their captions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float16, Int32, UInt8


class Batch(NamedTuple):
    """A pytree of host arrays. Sizes are fixed by the config, so that jit never recompiles.

    It is small: what follows from it is made on the device (`nuwa_jax.data.device.complete`).

    Attributes:
      video: uint8 [b t h w 3]; with precomputed latents the first frame alone, t = 1, or None.
      flow: float16 [b t h w 2], dense, pixels per frame; `flow[:, 0]` is 0. None where not asked.
        From the host at 1 / `data.flow_divisor` of the size, displacements in whole pixels.
      points: float32 [b k t 2], drags as (x, y) in pixels; unused ones are all zero.
      state: uint8 [b k t], values of `TrackState`; unused drags are unspecified throughout.
      text: int32 [b l], tokens of the caption, padded with 0.
      fps: float32 [b], frames per second.
      flip: bool [b], of elements that the device is to mirror left to right; None: of none.
      latents: float16 [b t h' w' c], normalised, as the model's `encode` gives them; None where
        the video is to be encoded.
      text_embedding: float16 [b l' c], what the text encoder makes of `text`; None where it is to
        be run.
    """

    video: UInt8[np.ndarray, "b t h w 3"] | None
    flow: Float16[np.ndarray, "b t h2 w2 2"] | None
    points: Float[np.ndarray, "b k t 2"]
    state: UInt8[np.ndarray, "b k t"]
    text: Int32[np.ndarray, "b l"]
    fps: Float[np.ndarray, " b"]
    flip: Bool[np.ndarray, " b"] | None = None
    latents: Float16[np.ndarray, "b t h3 w3 c"] | None = None
    text_embedding: Float16[np.ndarray, "b l2 c"] | None = None

    @property
    def frames(self) -> int:
        """t, of the whole clip."""
        return self.points.shape[2]
