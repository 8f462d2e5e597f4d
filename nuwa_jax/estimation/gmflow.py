"""GMFlow as a flow estimator, and tracks by following its flow."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, UInt8

from nuwa_jax.errors import UserError
from nuwa_jax.estimation.weights import file_hash
from nuwa_jax.models.gmflow import FORMAT, GMFlow, GMFlowConfig
from nuwa_jax.motion.estimators import (
    check_track_inputs,
    check_video,
    enlarge,
    enlargement,
    even_exposure,
    follow_while_sure,
    lucas_kanade,
    sample_patches,
)
from nuwa_jax.motion.tracks import Tracks
from nuwa_jax.tensor_files import SafetensorsFile


class GMFlowEstimator:
    """Flow of all neighbouring frames of a clip, in batches on the default device.

    The weights were trained on pictures of some hundred pixels and fail on small ones, which are
    therefore enlarged until their short side is at least 192, by at most 4: on a pair of 50 x 50
    pixels that lowers the end-point error from 4.9 to 0.9.

    Args:
      path: a file that `python -m nuwa_jax.convert --part=gmflow` wrote.
      batch: pairs of frames at a time, at most. Both ways, a pair of 320 x 576 takes 0.7 GB.
      upsample: the factor to enlarge by, instead of the above. The weights at hand take motion below
        some 3 pixels for none; 2 lowered the end-point error of slow 256 x 256 scenes from 1.8 to
        0.3 and from 2.3 to 0.9, for four times the computing.

    Raises:
      UserError: it is not such a file.
    """

    def __init__(self, path: str | Path, batch: int = 4, upsample: int | None = None) -> None:
        if batch < 1 or (upsample or 1) < 1:
            raise ValueError(f"batch and upsample are at least 1, got {batch} and {upsample}")
        config, params = load_gmflow(path)
        self.batch = batch
        self.upsample = upsample
        enlarged = "" if upsample is None else f", enlarged {upsample}"
        self.name = f"gmflow-1 (weights {file_hash(path)}{enlarged})"
        self._params = jax.device_put(params)
        self._apply = jax.jit(
            functools.partial(_clip_flow, GMFlow(config)), static_argnames="bidirectional"
        )

    def estimate(self, video: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t h w 2"]:
        """See `nuwa_jax.motion.estimators.FlowEstimator`.

        Raises:
          ValueError: the video is not uint8 [t h w 3].
        """
        return self._run(video, bidirectional=False)[0]

    def both_ways(
        self, video: UInt8[np.ndarray, "t h w 3"]
    ) -> tuple[Float[np.ndarray, "t h w 2"], Float[np.ndarray, "t h w 2"]]:
        """`estimate`, and the flow back: the second's [i] is from frame i to i-1, at i."""
        forward, backward = self._run(video, bidirectional=True)
        return forward, backward

    def _run(
        self, video: UInt8[np.ndarray, "t h w 3"], bidirectional: bool
    ) -> Float[np.ndarray, "d t h w 2"]:
        check_video(video)
        frames = len(video)
        flow = np.zeros((1 + bidirectional, *video.shape[:3], 2), np.float32)
        if frames == 1:
            return flow
        height, width = video.shape[1:3]
        factor = self.upsample or enlargement(height, width)
        video = np.stack([enlarge(frame, factor) for frame in video])
        # Equal parts, so that one compiled program does for all; the last frame fills the last.
        parts = -(-(frames - 1) // self.batch)
        size = -(-(frames - 1) // parts)
        padded = np.concatenate([video, np.repeat(video[-1:], parts * size + 1 - frames, axis=0)])
        for start in range(0, frames - 1, size):
            part = self._apply(
                self._params, padded[start : start + size + 1], bidirectional=bidirectional
            )
            kept = min(size, frames - 1 - start)
            part = rearrange(
                np.asarray(part),
                "(d n) (h y) (w x) k -> d n h w (y x) k",
                d=len(flow),
                y=factor,
                x=factor,
            )
            flow[:, start + 1 : start + 1 + kept] = part[:, :kept].mean(axis=-2) / factor
        return flow


@dataclasses.dataclass(frozen=True)
class FlowTracker:
    """Follows points from frame to frame along flow, until tracking back does not return.

    Flow finds large motion; Lucas-Kanade from where it leads makes the position precise, for errors
    of flow add up over a clip. Points are given up as `LucasKanadeTracker` does it.

    Attributes:
      flow: of neighbouring frames, both ways.
      window: side in pixels of the patch that is matched and compared.
      max_round_trip: pixels by which tracking back may miss the start.
      min_similarity: least normalised cross-correlation of the patches of successive frames.
      max_correction: pixels beyond which Lucas-Kanade is not believed and flow alone is.
    """

    flow: GMFlowEstimator
    window: int = 11
    max_round_trip: float = 0.5
    min_similarity: float = 0.7
    max_correction: float = 4.0

    @property
    def name(self) -> str:
        return f"flow-lk-1 (opencv {cv2.__version__}) on {self.flow.name}"

    def track(
        self, video: UInt8[np.ndarray, "t h w 3"], points: Float[np.ndarray, "k 2"]
    ) -> Tracks:
        """See `nuwa_jax.motion.estimators.PointTracker`.

        Raises:
          ValueError: the video is not uint8 [t h w 3] or the points are not finite [k 2].
        """
        points = check_track_inputs(video, points)
        forward, backward = self.flow.both_ways(video)
        video = even_exposure(video)

        def step(i: int, start: Float[np.ndarray, "k 2"]) -> tuple[np.ndarray, np.ndarray]:
            moved = self._move(video[i - 1], video[i], forward[i], start)
            return moved, self._move(video[i], video[i - 1], backward[i], moved)

        return follow_while_sure(
            video, points, step, self.window, self.max_round_trip, self.min_similarity
        )

    def _move(
        self,
        before: UInt8[np.ndarray, "h w 3"],
        after: UInt8[np.ndarray, "h w 3"],
        flow: Float[np.ndarray, "h w 2"],
        points: Float[np.ndarray, "k 2"],
    ) -> Float[np.ndarray, "k 2"]:
        led = points + sample_patches(flow, points, 0)[:, 0]
        precise = lucas_kanade(before, after, points, led, self.window, levels=0)
        near = np.linalg.norm(precise - led, axis=-1, keepdims=True) <= self.max_correction
        return np.where(near, precise, led)


def load_gmflow(path: str | Path) -> tuple[GMFlowConfig, dict[str, Any]]:
    """Sizes and parameters of a converted GMFlow.

    Raises:
      UserError: the file cannot be read or is none.
    """
    advice = (
        "convert the published weights by python -m nuwa_jax.convert --part=gmflow "
        "--from=FILE --out=gmflow.safetensors"
    )
    if Path(path).suffix != ".safetensors":
        raise UserError(f"gmflow reads its weights from a .safetensors file, got {path}: {advice}")
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise UserError(f"{path} does not hold a converted GMFlow ({FORMAT}): {advice}")
    sizes = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(file.metadata["config"]).items()
    }
    params = unflatten_dict({name: file.read(name) for name in file.specs}, sep="/")
    return GMFlowConfig(**sizes), params


def _clip_flow(
    model: GMFlow, params: dict[str, Any], video: UInt8[Array, "t h w 3"], bidirectional: bool
) -> Float[Array, "n h w 2"]:
    pictures = video.astype(jnp.float32) / 255
    return model.apply({"params": params}, pictures, bidirectional, method=GMFlow.clip)
