"""Networks of single pictures: the autoencoder and CLIP."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array

from nuwa_jax.convert.rules import encoder_rows, to_params
from nuwa_jax.golden.compare import (
    Item,
    absolute,
    channels_last,
    compiled,
    guarded,
    relative,
    sums,
)
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.golden.model import Golden
from nuwa_jax.models.clip import ClipVision, ClipVisionConfig, preprocess
from nuwa_jax.models.video_ldm import Params, to_float

AUTOENCODER = 5e-6
CLIP = 3e-6
FIRST_STAGE = "first_stage_model.encoder"


def check_vae(golden: Golden) -> Iterator[Item]:
    """Both encoders, and the decoder with several frames per call and with one."""
    arrays = golden.arrays("vae")
    yield from arrays.require(
        [
            "cond_encoder_raw",
            "cond_moments_after_quant_conv",
            "cond_mode",
            "cond_embedder_out",
            "first_stage_moments",
            "decode_first_stage_net(z)",
        ]
    )
    yield from arrays.require_some(
        {"dec_timestepsN": r"dec_timesteps\d+", "dec_chunks_of_1": r"dec_chunks_of_\d+"}
    )
    yield from guarded(arrays.name("image"), _check_encoders(golden, arrays))
    yield from guarded(arrays.name("z"), _check_decoder(golden, arrays))


def _check_encoders(golden: Golden, arrays: Arrays) -> Iterator[Item]:
    image = channels_last(arrays["image"])
    params = golden.params("autoencoder")
    encoder = params["autoencoder"]["encoder"]
    # Where the reference has no quant_conv, the identity stands in for it.
    channels = 2 * golden.model.autoencoder.latent_channels
    identity = {
        "quant_conv": {
            "kernel": np.eye(channels, dtype=np.float32)[None, None],
            "bias": np.zeros((channels,), np.float32),
        }
    }
    posterior = compiled(golden.model.posterior)

    def compare(key: str, encoder: Params, *, mean_only: bool = False) -> Iterator[Item]:
        if key not in arrays:
            return
        given = params | {"autoencoder": {"encoder": encoder}}
        mean, log_variance = (part[:, 0] for part in posterior(given, image[:, None]))
        ours, theirs = mean, channels_last(arrays[key])
        if not mean_only:
            ours = jnp.concatenate([mean, log_variance], axis=-1)
            # Our log variance is cut, the reference cuts it later.
            bounds = np.array([[-np.inf, np.inf], [-30.0, 20.0]]).repeat(mean.shape[-1], axis=0)
            theirs = np.clip(theirs, *bounds.T)
        note = golden.floor("vae_encoder")
        yield relative(arrays.name(key), ours, theirs, AUTOENCODER, note)

    yield from compare("cond_encoder_raw", encoder | identity)
    yield from compare("cond_moments_after_quant_conv", encoder)
    yield from compare("cond_mode", encoder, mean_only=True)
    yield from compare("cond_embedder_out", encoder, mean_only=True)
    template = {name: value for name, value in encoder.items() if name not in identity}
    rows = encoder_rows("", FIRST_STAGE, golden.model.autoencoder)
    first_stage = to_params(golden.state, rows, template)
    yield from compare("first_stage_moments", first_stage | identity)


def _check_decoder(golden: Golden, arrays: Arrays) -> Iterator[Item]:
    z = channels_last(arrays["z"])[None]  # as frames of one video
    params, model = golden.params("autoencoder"), golden.model
    unscaled = params | {"latents": {"mean": np.float32(0), "scale": np.float32(1)}}
    note = golden.floor("vae_decoder")
    for key, match in arrays.matching(r"dec_(?:timesteps|chunks_of_)(\d+)").items():
        decode = functools.partial(model.decode, frames_per_call=int(match[1]))
        ours = compiled(decode)(unscaled, z)[0]
        yield relative(arrays.name(key), ours, channels_last(arrays[key]), AUTOENCODER, note)
    key = "decode_first_stage_net(z)"
    if key in arrays:
        # The demo's own call: latents in the diffusion model's scale, one frame per call.
        theirs = channels_last(arrays[key])
        decode = functools.partial(model.decode, frames_per_call=1)
        ours = compiled(decode)(params, z[:, : len(theirs)])[0]
        yield relative(arrays.name(key), ours, theirs, AUTOENCODER, note)


def check_clip(golden: Golden) -> Iterator[Item]:
    """CLIP's pixels and embedding of pictures of several sizes."""
    arrays = golden.arrays("clip")
    yield from arrays.require_some({"PICTURE|image_u8": r".+\|image_u8"})
    # What one picture has, each has.
    found = {match[1] for match in arrays.matching(r".+\|(.+)").values()}
    parts = sorted(found | {"image_u8", "embedding", "crossattn"})
    yield from arrays.require_some({"PICTURE|preprocessed": r".+\|preprocessed_.+"})
    config = golden.model.image_encoder
    embed = compiled(ClipVision(config).apply)
    for picture in arrays.places():
        part = arrays.at(picture)
        yield from part.require(parts)
        yield from guarded(arrays.name(picture), _check_picture(golden, part, config, embed))


def _check_picture(
    golden: Golden, arrays: Arrays, config: ClipVisionConfig, embed: Callable[..., Array]
) -> Iterator[Item]:
    image = to_float(jnp.asarray(rearrange(arrays["image_u8"], "n c h w -> n h w c")))
    pixels = compiled(lambda image: preprocess(image, config.image_size))(image)
    for key in arrays:
        part = None
        if match := re.fullmatch(r"preprocessed_stride(\d+)", key):
            part = pixels[:, :: int(match[1]), :: int(match[1])]
        elif match := re.fullmatch(r"preprocessed_rows_(\d+)_(\d+)", key):
            part = pixels[:, int(match[1]) : int(match[2]) + 1]
        elif key == "preprocessed_sum_sumsq":
            yield sums(arrays.name(key), pixels, arrays[key], CLIP)
        if part is not None:
            yield absolute(arrays.name(key), part, channels_last(arrays[key]), CLIP)
    params = golden.params("image_encoder")["image_encoder"]
    embedding = embed({"params": params}, pixels)
    for key, ours in (("embedding", embedding), ("crossattn", embedding[:, None])):
        if key in arrays:
            yield relative(arrays.name(key), ours, arrays[key], CLIP)
