"""KL autoencoder: a 2-D encoder and SVD's temporal decoder."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from nuwa_jax.models.attention import dot_product_attention
from nuwa_jax.models.layers import (
    AlphaBlender,
    TemporalConv,
    conv2d,
    depth_to_space,
    group_norm,
    middle_tap_identity,
    space_to_depth,
    upsample_nearest,
)
from nuwa_jax.models.products import ZERO_INIT, Conv, Dense

SPATIAL_EPS = 1e-6
TEMPORAL_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are those of SVD.

    `patch_size` > 1 folds patches of pixels into channels before the first convolution. The whole
    reduction is `patch_size * 2 ** (len(channel_mult) - 1)`. Thin convolutions at full resolution
    cost most of the time of a small model; with patches there are none.
    """

    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    patch_size: int = 1
    scale: float = 0.18215
    quant_conv: bool = True

    @property
    def reduction(self) -> int:
        """Pixels per latent along one side."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


class ResBlock2D(nn.Module):
    """GN, swish, conv, GN, swish, conv plus the (1x1) shortcut; no time embedding."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c2"]:
        h = nn.silu(group_norm(x.shape[-1], SPATIAL_EPS, name="norm1", dtype=self.dtype)(x))
        h = conv2d(self.features, name="conv1", dtype=self.dtype)(h)
        h = nn.silu(group_norm(self.features, SPATIAL_EPS, name="norm2", dtype=self.dtype)(h))
        h = conv2d(self.features, name="conv2", dtype=self.dtype)(h)
        if x.shape[-1] != self.features:
            x = conv2d(self.features, kernel=1, name="shortcut", dtype=self.dtype)(x)
        return x + h


class VideoResBlock(nn.Module):
    """Spatial res block, then a temporal one blended in with a learned weight.

    The blend weight belongs to the temporal branch here (in the U-Net to the spatial one). The
    temporal norm's statistics run over the frames of a video, too.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c2"]:
        b = x.shape[0]
        x = rearrange(x, "b t h w c -> (b t) h w c")
        x = ResBlock2D(self.features, self.dtype, name="spatial")(x)
        x = rearrange(x, "(b t) h w c -> b t h w c", b=b)
        h = nn.silu(group_norm(self.features, TEMPORAL_EPS, name="time_norm1", dtype=self.dtype)(x))
        h = TemporalConv(self.features, dtype=self.dtype, name="time_conv1")(h)
        h = nn.silu(group_norm(self.features, TEMPORAL_EPS, name="time_norm2", dtype=self.dtype)(h))
        h = TemporalConv(self.features, kernel_init=ZERO_INIT, dtype=self.dtype, name="time_conv2")(
            h
        )
        return AlphaBlender(init=0.0, name="time_mixer")(x + h, x)


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a frame with one head as wide as the channels."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        n, h, w, c = x.shape
        y = group_norm(c, SPATIAL_EPS, name="norm", dtype=self.dtype)(x)
        y = rearrange(y, "n h w c -> n (h w) c")
        q, k, v = (Dense(c, dtype=self.dtype, name=name)(y) for name in ("q", "k", "v"))
        y = dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
        y = Dense(c, dtype=self.dtype, name="out")(y)
        return x + rearrange(y, "n (h w) c -> n h w c", h=h, w=w)


class Encoder(nn.Module):
    """`[n H W 3]` in [-1, 1] to the mean and log variance of the latents, `[n h w 2c]`."""

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, frames: Float[Array, "n H W 3"]) -> Float[Array, "n h w c2"]:
        config, dtype = self.config, self.dtype
        x = space_to_depth(frames, config.patch_size)
        x = conv2d(config.base_channels, name="conv_in", dtype=dtype)(x)
        for level, mult in enumerate(config.channel_mult):
            for i in range(config.num_res_blocks):
                name = f"down_{level}_res_{i}"
                x = ResBlock2D(mult * config.base_channels, dtype, name=name)(x)
            if level < len(config.channel_mult) - 1:
                # The reference pads right and bottom only, by one pixel of zeros.
                x = Conv(
                    x.shape[-1],
                    (3, 3),
                    strides=(2, 2),
                    padding=((0, 1), (0, 1)),
                    dtype=dtype,
                    name=f"down_{level}_downsample",
                )(x)
        x = ResBlock2D(x.shape[-1], dtype, name="mid_res_0")(x)
        x = SpatialAttention(dtype, name="mid_attn")(x)
        x = ResBlock2D(x.shape[-1], dtype, name="mid_res_1")(x)
        x = nn.silu(group_norm(x.shape[-1], SPATIAL_EPS, name="norm_out", dtype=dtype)(x))
        x = conv2d(2 * config.latent_channels, name="conv_out", dtype=dtype)(x)
        if config.quant_conv:
            x = conv2d(2 * config.latent_channels, kernel=1, name="quant_conv", dtype=dtype)(x)
        return x


class TemporalDecoder(nn.Module):
    """Latents `[b t h w c]` (unscaled) to video `[b t H W 3]`, about [-1, 1], not clamped."""

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t H W 3"]:
        config, dtype = self.config, self.dtype
        b = latents.shape[0]
        top = config.base_channels * config.channel_mult[-1]

        def per_frame(layer: nn.Module, x: Array) -> Array:
            x = layer(rearrange(x, "b t h w c -> (b t) h w c"))
            return rearrange(x, "(b t) h w c -> b t h w c", b=b)

        x = per_frame(conv2d(top, name="conv_in", dtype=dtype), latents)
        x = VideoResBlock(top, dtype, name="mid_res_0")(x)
        x = per_frame(SpatialAttention(dtype, name="mid_attn"), x)
        x = VideoResBlock(top, dtype, name="mid_res_1")(x)
        for level in reversed(range(len(config.channel_mult))):
            features = config.base_channels * config.channel_mult[level]
            for i in range(config.num_res_blocks + 1):
                x = VideoResBlock(features, dtype, name=f"up_{level}_res_{i}")(x)
            if level > 0:
                conv = conv2d(features, name=f"up_{level}_upsample", dtype=dtype)
                x = per_frame(lambda y, conv=conv: conv(upsample_nearest(y)), x)
        x = per_frame(group_norm(x.shape[-1], SPATIAL_EPS, name="norm_out", dtype=dtype), x)
        out_channels = 3 * config.patch_size**2
        x = per_frame(conv2d(out_channels, name="conv_out", dtype=dtype), nn.silu(x))
        x = depth_to_space(x, config.patch_size)
        # Trained from nothing, a random mix of the three colours would first have to be undone.
        return TemporalConv(3, kernel_init=middle_tap_identity, dtype=dtype, name="time_conv_out")(
            x
        )
