"""TAPIR and BootsTAPIR (Doersch et al., arXiv 2306.08637, 2402.00847) by their authors' package.

The package `tapnet` is not in the registry and its checkpoints are not shipped here:

    pip install git+https://github.com/google-deepmind/tapnet einops

and give the checkpoint (.npy) as the weights. It is a pickle, as published: give none that you do
not trust.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from nuwa_jax.errors import UserError
from nuwa_jax.estimation.registry import package_versions
from nuwa_jax.estimation.weights import file_hash
from nuwa_jax.motion.estimators import check_track_inputs
from nuwa_jax.motion.tracks import Tracks, TrackState, inside, resize_points

SIDE = 256  # of the square that clips are resized to, as in training
# What reading something else as a pickle of parameters can raise.
_NOT_A_CHECKPOINT = (
    *(ValueError, KeyError, TypeError, AttributeError, EOFError, ImportError),
    pickle.UnpicklingError,
)
QUERIES = 64  # points at a time; others are made up, so that their number compiles nothing anew


class TapirTracker:
    """TAPIR, which finds points again after they were hidden.

    Args:
      path: a checkpoint of TAPIR or BootsTAPIR, told apart by the layers that only the latter has.

    Raises:
      UserError: `tapnet` is not installed, or the file is no such checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        model = _import_tapnet()
        params, state = _load_checkpoint(path)
        boots = any("extra_convs" in name for name in params)
        options: dict[str, Any] = {"bilinear_interp_with_depthwise_conv": False, "pyramid_level": 0}
        if boots:
            options |= {"pyramid_level": 1, "extra_convs": True, "softmax_temperature": 10.0}
        network = model.ParameterizedTAPIR(params, state, tapir_kwargs=options)
        self._run = jax.jit(_visible_tracks(network))
        kind = "bootstapir" if boots else "tapir"
        self.name = (
            f"{kind}-1 (tapnet {package_versions('tapir')['tapnet']}, weights {file_hash(path)})"
        )

    def track(
        self, video: UInt8[np.ndarray, "t h w 3"], points: Float[np.ndarray, "k 2"]
    ) -> Tracks:
        """See `nuwa_jax.motion.estimators.PointTracker`.

        Raises:
          ValueError: the video is not uint8 [t h w 3] or the points are not finite [k 2].
        """
        points = check_track_inputs(video, points)
        frames, *size = video.shape[:3]
        if len(points) == 0:
            return Tracks(np.zeros((0, frames, 2)), np.zeros((0, frames), np.uint8))
        small = np.stack(
            [cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in video]
        )
        # (frame, y, x) with (0, 0) at the outer corner of the first pixel, not at its centre.
        start = resize_points(points, size, (SIDE, SIDE))
        queries = np.zeros((len(points) + -len(points) % QUERIES, 3), np.float32)
        queries[: len(points), 1:] = start[:, ::-1] + 0.5
        path, visible = self._run(small, queries)
        path = np.asarray(path)[: len(points)] - 0.5
        path = resize_points(path, (SIDE, SIDE), size)
        path[:, 0] = points
        seen = np.array(visible)[: len(points)]
        seen[:, 0] = True
        state = np.where(seen, TrackState.VISIBLE, TrackState.OCCLUDED)
        return Tracks(path, np.where(inside(path, *size), state, TrackState.OUTSIDE))


def _visible_tracks(
    network: Callable[..., dict[str, Array]],
) -> Callable[[Array, Array], tuple[Float[Array, "k t 2"], Bool[Array, "k t"]]]:
    def run(video: UInt8[Array, "t h w 3"], queries: Float[Array, "k 3"]) -> tuple[Array, Array]:
        out = network(
            video=video[None].astype(jnp.float32) / 255 * 2 - 1,
            query_points=queries[None],
            is_training=False,
            query_chunk_size=QUERIES,
        )
        hidden, astray = (jax.nn.sigmoid(out[name][0]) for name in ("occlusion", "expected_dist"))
        return out["tracks"][0], (1 - hidden) * (1 - astray) > 0.5

    return run


def _import_tapnet() -> ModuleType:
    try:
        return importlib.import_module("tapnet.models.tapir_model")
    except ImportError as error:
        raise UserError(
            f"tapir needs the package tapnet ({error}): pip install "
            "git+https://github.com/google-deepmind/tapnet einops"
        ) from error


def _load_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    wanted = (
        "give TAPIR's or BootsTAPIR's .npy, as https://github.com/google-deepmind/tapnet has it"
    )
    try:
        checkpoint = np.load(path, allow_pickle=True).item()
        return checkpoint["params"], checkpoint["state"]
    except OSError as error:
        raise UserError(f"weights {path} cannot be read ({error}): {wanted}") from error
    except _NOT_A_CHECKPOINT as error:
        raise UserError(f"{path} is no checkpoint of tapnet ({error!r}): {wanted}") from error
