"""From the original code's config and weights to our model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nuwa_jax.convert.rules import Row, autoencoder_rows, clip_rows, flow_rows, to_params, unet_rows
from nuwa_jax.diffusion.guidance import GuidanceScales
from nuwa_jax.errors import UserError
from nuwa_jax.golden.compare import Missing
from nuwa_jax.golden.folder import CONFIG, Folder
from nuwa_jax.models.autoencoder import AutoencoderConfig
from nuwa_jax.models.clip import ClipVisionConfig
from nuwa_jax.models.flow_encoder import FlowEncoderConfig
from nuwa_jax.models.layers import sinusoids
from nuwa_jax.models.unet import UNetConfig
from nuwa_jax.models.video_ldm import VECTOR_CHANNELS, Condition, Drop, Params, VideoLDM

# The numbers in the conditioning vector: their input_key -> our name.
VECTOR_NAMES = {
    "fps_id": "fps",
    "motion_bucket_id": "motion_bucket",
    "cond_aug": "augmentation",
}
# What the released network has, and ours cannot do without.
FIXED = {
    "num_classes": "sequential",
    "transformer_depth": 1,
    "use_linear_in_transformer": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": [3, 1, 1],
}


class Golden(Folder):
    """A folder of goldens with the model it describes, each part made when first asked for."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._params = functools.cache(self._part)

    @property
    def frames(self) -> int:
        """Frames of a video."""
        return int(self.setting("num_frames"))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a video in pixels."""
        return int(self.setting("height")), int(self.setting("width"))

    @functools.cached_property
    def model(self) -> VideoLDM:
        """Our model of the config."""
        try:
            return model_from_config(self.config)
        except KeyError as error:
            raise Missing(f"{CONFIG}/{error.args[0]}") from error

    def params(self, *parts: str) -> Params:
        """Our parameters of some of "autoencoder", "unet", "flow_encoder", "image_encoder"."""
        channels = self.model.autoencoder.latent_channels
        latents = {
            "mean": np.zeros((channels,), np.float32),
            "scale": np.full((channels,), self.model.autoencoder.scale, np.float32),
        }
        return {"latents": latents} | {part: self._params(part) for part in parts}

    def condition(self, params: Params, *, drop: Drop, **given: Array) -> Condition:
        """`VideoLDM.condition` of one video, with the vector as wide as the config has it."""
        condition = self.model.condition(
            params,
            frames=self.frames,
            size=self.size,
            fps=jnp.full((1,), float(self.setting("fps_id"))),
            drop=drop,
            **given,
        )
        widths = vector_widths(self.config)
        if set(widths.values()) == {VECTOR_CHANNELS}:
            return condition
        keys = {ours: theirs for theirs, ours in VECTOR_NAMES.items()}
        vector = [
            sinusoids(jnp.full((1,), float(self.setting(keys[name]))), width)
            for name, width in widths.items()
        ]
        return condition._replace(vector=jnp.concatenate(vector, axis=-1))

    @property
    def guidance(self) -> GuidanceScales:
        """Guidance from the first to the last frame; the drags are in both branches."""
        guider = "sampler_config.guider_config.params"
        low, high = (float(self.setting(f"{guider}.{key}_scale")) for key in ("min", "max"))
        return GuidanceScales(text=None, image=(low, high), drag=None)

    @property
    def sigma_range(self) -> tuple[float, float, float]:
        """sigma_min, sigma_max and rho of the sampler; by default those of the original code."""
        params = "sampler_config.discretization_config.params"
        given = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
        return tuple(float(self.setting(f"{params}.{key}", given[key])) for key in given)

    @functools.cached_property
    def _template(self) -> Params:
        height, width = self.size
        template = jax.eval_shape(
            lambda key: self.model.init(key, height=height, width=width, frames=self.frames),
            jax.random.key(0),
        )
        first = template["unet"]["vector_embed"]["linear_1"]
        channels = sum(vector_widths(self.config).values())
        first["kernel"] = jax.ShapeDtypeStruct(
            (channels, first["kernel"].shape[1]), first["kernel"].dtype
        )
        return template

    def _part(self, part: str) -> Params:
        return to_params(self.state, self._rows(part), self._template[part])

    def _rows(self, part: str) -> list[Row]:
        model = self.model
        if part == "unet":
            return unet_rows(model.unet)
        if part == "flow_encoder":
            return flow_rows(model.flow_encoder, model.unet, model.autoencoder.reduction)
        if part == "autoencoder":
            return autoencoder_rows(model.autoencoder)
        return clip_rows(model.image_encoder)


def model_from_config(config: Mapping[str, Any]) -> VideoLDM:
    """The model of a config of the original code.

    Raises:
      UserError: the config asks for what the released network does not have.
    """
    network = config["network_config"]
    for key, wanted in FIXED.items():
        if network.get(key, wanted) != wanted:
            raise UserError(
                f"network_config.{key} is {network[key]!r}, but the released network, and so this "
                f"package, has {wanted!r}"
            )
    decoder = config["first_stage_config"]["decoder_config"]["params"]
    (encoder,) = (
        embedder["params"]["encoder_config"]["params"]["ddconfig"]
        for embedder in config["conditioner_emb_models"]
        if embedder["input_key"] == "cond_frames"
    )
    autoencoder, *others = (
        AutoencoderConfig(
            base_channels=part["ch"],
            channel_mult=tuple(part["ch_mult"]),
            num_res_blocks=part["num_res_blocks"],
            latent_channels=part["z_channels"],
            scale=config["scale_factor"],
        )
        for part in (decoder, encoder)
    )
    if others != [autoencoder]:
        raise UserError(
            "the encoder of conditioner_emb_models and the decoder of first_stage_config differ "
            f"in their sizes: {others[0]} and {autoencoder}"
        )
    clip, vision = config["open_clip_model_config"], config["open_clip_model_config"]["vision_cfg"]
    return VideoLDM(
        autoencoder=autoencoder,
        unet=UNetConfig(
            out_channels=network["out_channels"],
            model_channels=network["model_channels"],
            channel_mult=tuple(network["channel_mult"]),
            num_res_blocks=network["num_res_blocks"],
            attention_factors=tuple(network["attention_resolutions"]),
            head_channels=network["num_head_channels"],
            flow_injection="film",
        ),
        flow_encoder=flow_encoder_config(network.get("flow_dim_scale", 1)),
        image_encoder=ClipVisionConfig(
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision["head_width"],
            patch=vision["patch_size"],
            image_size=vision["image_size"],
            projection=clip["embed_dim"],
            mlp_ratio=int(vision.get("mlp_ratio", 4)),
        ),
        vector=tuple(vector_widths(config)),
        motion_bucket=float(config["motion_bucket_id"]),
        augmentation=float(config["cond_aug"]),
        image_concat_raw=True,
        image_mask=False,
    )


def flow_encoder_config(dim_scale: int) -> FlowEncoderConfig:
    """The flow encoder of a `flow_dim_scale`, by which its widths are divided."""
    # Rounded up: the widths are cut to whole numbers after the product.
    return FlowEncoderConfig(channel_scale=float(np.nextafter(1 / dim_scale, 1.0)))


def vector_widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Our names of the numbers in the conditioning vector, in order, and the width of each."""
    return {
        VECTOR_NAMES[model["input_key"]]: model["params"]["outdim"]
        for model in config["conditioner_emb_models"]
        if model["input_key"] in VECTOR_NAMES
    }
