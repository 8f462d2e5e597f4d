"""A video LDM thin enough to compile in seconds, and inputs for it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from nuwa_jax.models.video_ldm import Drop, VideoLDM

SIZE = dict(height=16, width=24, frames=3)


def make(*, attention_factors=(1,), **parts):
    """The model with the given parts (`flow_encoder`, `drag`, `text`) on top of the base.

    Without `attention_factors` only the middle block has a transformer: half the compile time.
    """
    config = ConfigDict(
        dict(
            dtype="float32",
            vector=(),
            image_concat=True,
            image_mask=True,
            autoencoder=dict(
                base_channels=8,
                channel_mult=(1,),
                num_res_blocks=1,
                latent_channels=4,
                patch_size=4,
                quant_conv=False,
            ),
            unet=dict(
                model_channels=16,
                channel_mult=(1,),
                num_res_blocks=1,
                attention_factors=attention_factors,
                head_channels=8,
                ff_multiplier=1,
            ),
        )
    )
    if "flow_encoder" in parts:
        config.flow_encoder = dict(patch_size=4) | parts["flow_encoder"]
    if "drag" in parts:
        config.drag = dict(levels=(0,), token_channels=16, heads=2) | parts["drag"]
    if "text" in parts:
        config.text = dict(channels=8, layers=1, heads=2, max_length=8) | parts["text"]
    return VideoLDM.from_config(config)


def inputs(b=2, k=3, seed=0):
    """Noisy latents, picture, caption, flow and drags of `b` different samples, as a dict."""
    height, width, t = SIZE["height"], SIZE["width"], SIZE["frames"]
    rng = np.random.default_rng(seed)
    path = rng.uniform(2, [width - 2, height - 2], (b, k, 1, 2))
    return {
        "x": rng.normal(size=(b, t, height // 4, width // 4, 4)).astype(np.float32),
        "sigma": np.linspace(0.5, 2.0, b, dtype=np.float32),
        "image": rng.uniform(-1, 1, (b, height, width, 3)).astype(np.float32),
        "text": rng.integers(1, 257, (b, 8)).astype(np.int32),
        "flow": rng.normal(size=(b, t, height, width, 2), scale=4.0).astype(np.float32),
        "points": (path + rng.normal(size=(b, k, t, 2))).astype(np.float32),
        "state": np.ones((b, k, t), np.int32),
    }


def initial(model, seed, only=lambda path: True):
    """Fresh parameters as {path: array}, those for which `only(path)`; no others are computed."""

    def init(key):
        flat = flatten_dict(model.init(key, **SIZE), sep="/")
        return {path: leaf for path, leaf in flat.items() if only(path)}

    # Runs once: optimising the random bits takes ten times as long as drawing them.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(init, compiler_options=options)(jax.random.key(seed))


def random_params(model, seed):
    """All parameters of the model, random and none zero (`randomize`)."""
    shapes = jax.eval_shape(lambda key: model.init(key, **SIZE), jax.random.key(0))
    return randomize(shapes, seed)


def drops(text, image, drag):
    """`Drop` from three sequences of bools, one entry per sample."""
    return Drop(*(jnp.asarray(d, bool) for d in (text, image, drag)))


def denoiser(model):
    """(params, inputs, drop) to the denoised estimate, conditions included, compiled once."""

    @jax.jit
    def apply(params, given, drop):
        conditions = {name: a for name, a in given.items() if name not in ("x", "sigma")}
        size = (SIZE["height"], SIZE["width"])
        condition = model.condition(
            params, frames=SIZE["frames"], size=size, drop=drop, **conditions
        )
        return model.denoise(params, given["x"], given["sigma"], condition)

    return apply


def randomize(params, seed):
    """Random values in place of every parameter, about as large as trained ones, none zero."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.normal(size=leaf.shape) / fan_in**0.5, jnp.float32)

    return jax.tree.map(draw, params)
