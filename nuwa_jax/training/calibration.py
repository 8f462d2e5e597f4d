"""The latents' mean and scale, measured when the autoencoder's stage ends."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from nuwa_jax.errors import UserError
from nuwa_jax.models.video_ldm import VideoLDM, to_float
from nuwa_jax.parallel.sharding import to_host
from nuwa_jax.training.curriculum import LATENTS, Params


def calibrate_latents(
    model: VideoLDM, params: Params, videos: Sequence[UInt8[np.ndarray, "b t h w 3"]]
) -> dict[str, Float[Array, " c"]]:
    """`params["latents"]` under which the latents of `videos` are normalised, channel by channel.

    Their mean becomes 0 and their deviation 1. A channel that hardly varies (less than 1 % of the
    liveliest one's deviation) is not blown up beyond 100 times the scale of that one.
    """
    posterior = jax.jit(lambda p, video: model.posterior(p, to_float(video))[0])
    count, total, squares = 0, 0.0, 0.0
    for video in videos:
        z = to_host(posterior(params, video)).astype(np.float64).reshape(-1, _channels(params))
        count, total, squares = count + len(z), total + z.sum(0), squares + (z**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    if not std.max() > 0:
        raise UserError(
            "the autoencoder's latents are constant over the data: train it longer before the "
            "stages that build on it (stages.autoencoder.steps)"
        )
    scale = 1.0 / np.maximum(std, 0.01 * std.max())
    return {"mean": jnp.asarray(mean, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)}


def _channels(params: Params) -> int:
    return params[LATENTS]["mean"].shape[0]
