"""A model of SVD's architecture, a few thousand times smaller, with random weights on disk."""

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nuwa_jax.convert.released import parameter_shapes
from nuwa_jax.generation.weights import Model, save_model
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.presets import load_preset

SIZE, FRAMES = (32, 64), 3
HEADS = {"head_channels": 16, "clip_heads": 2}


def small_config(*, flow: bool = True, lora_rank: int = 0) -> ml_collections.ConfigDict:
    """Two levels, of which the lower has no transformers."""
    config = load_preset("dragnuwa_svd", "small")
    config.model.dtype = "float32"
    config.model.unet.channel_mult = (1, 2)
    config.model.unet.remat = "none"
    config.model.lora_rank = lora_rank
    if not flow:
        del config.model.flow_encoder
    return config


def random_params(config: ml_collections.ConfigDict, seed: int = 0, dtype=np.float32) -> dict:
    """Every parameter normal, none zero; the latents' statistics as SVD has them."""
    rng = np.random.default_rng(seed)
    model = VideoLDM.from_config(config.model)
    flat = {
        path: (0.1 * rng.normal(size=shape)).astype(dtype)
        for path, shape in parameter_shapes(model).items()
    }
    channels = model.autoencoder.latent_channels
    flat["latents/mean"] = np.zeros(channels, np.float32)
    flat["latents/scale"] = np.full(channels, model.autoencoder.scale, np.float32)
    return unflatten_dict(flat, sep="/")


def write(folder, config, params, dtype="float32"):
    """The model as `sample.py` takes it; returns its parameters by path."""
    save_model(Model(params, config, "test"), folder, jnp.dtype(dtype))
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
