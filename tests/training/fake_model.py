"""A model of a few hundred parameters with the real one's interface: compiles in a second.

python tests/training/fake_model.py FLAGS    runs train.py with it
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

ROOT = Path(__file__).parents[2]
PATCH, CHANNELS, WIDTH = 4, 2, 8


class FakeModel:
    """Matrices on 4x4 patches; every condition moves the denoised latents."""

    augmentation = 0.0
    image_encoder = None
    dtype = jnp.float32
    modules = ()  # it takes arrays alone

    def latent_shape(self, height, width, frames):
        return frames, height // PATCH, width // PATCH, CHANNELS

    def init(self, key, *, height, width, frames):
        del height, width, frames
        shapes = {
            "autoencoder": {
                "encoder": {"kernel": (3 * PATCH**2, 2 * CHANNELS)},
                "decoder": {"kernel": (CHANNELS, 3 * PATCH**2), "bias": (3 * PATCH**2,)},
            },
            "text": {"table": (257, WIDTH)},
            "unet": {"in": (CHANNELS, WIDTH), "first": (CHANNELS, WIDTH), "out": (WIDTH, CHANNELS)},
            "flow_encoder": {"kernel": (2, WIDTH)},
            "drag": {"kernel": (2, WIDTH)},
        }
        leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
        keys = jax.random.split(key, len(leaves))
        params = tree.unflatten(
            [0.3 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
        )
        return params | {"latents": {"mean": jnp.zeros(CHANNELS), "scale": jnp.ones(CHANNELS)}}

    def posterior(self, params, video):
        patches = rearrange(video, "b t (h p) (w q) c -> b t h w (p q c)", p=PATCH, q=PATCH)
        moments = patches @ params["autoencoder"]["encoder"]["kernel"]
        return jnp.split(moments, 2, axis=-1)

    def encode(self, params, video):
        latents = params["latents"]
        return (self.posterior(params, video)[0] - latents["mean"]) * latents["scale"]

    def decode(self, params, latents, frames_per_call=0):
        return self.decode_raw(
            params, latents / params["latents"]["scale"] + params["latents"]["mean"]
        )

    def decode_raw(self, params, z):
        part = params["autoencoder"]["decoder"]
        patches = z @ part["kernel"] + part["bias"]
        return rearrange(patches, "b t h w (p q c) -> b t (h p) (w q) c", p=PATCH, q=PATCH, c=3)

    def condition(
        self,
        params,
        *,
        frames,
        size,
        image,
        text,
        flow,
        points,
        state,
        fps,
        noise,
        drop,
        image_latents=None,
    ):
        del frames, size, fps, noise
        keep = [1.0 - d[:, None, None, None, None] for d in (drop.text, drop.image, drop.drag)]
        if image_latents is None:
            image_latents = self.encode(params, image[:, None])[:, 0]
        first = image_latents[:, None] @ params["unet"]["first"]
        words = jnp.mean(params["text"]["table"][text], axis=1)[:, None, None, None]
        out = keep[0] * words + keep[1] * first
        if flow is not None:
            small = reduce(flow, "b t (h p) (w q) c -> b t h w c", "mean", p=PATCH, q=PATCH)
            out = out + keep[2] * (small @ params["flow_encoder"]["kernel"])
        if points is not None:
            seen = (points * (state == 1)[..., None]).mean((1, 2)) / 16
            out = out + keep[2] * (seen @ params["drag"]["kernel"])[:, None, None, None]
        return out

    def denoise(self, params, x, sigma, condition):
        s = sigma[:, None, None, None, None]
        c_in = 1 / jnp.sqrt(s**2 + 1)
        hidden = jnp.tanh((x * c_in) @ params["unet"]["in"] + condition)
        return x * c_in**2 - s * c_in * (hidden @ params["unet"]["out"])


def install():
    """Makes the whole package build `FakeModel`."""
    from nuwa_jax.models.video_ldm import VideoLDM

    VideoLDM.from_config = classmethod(lambda cls, config: FakeModel())


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    install()
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
