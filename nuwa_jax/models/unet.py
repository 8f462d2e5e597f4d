"""SVD's spatio-temporal U-Net, with the places where flow and drags enter.

At full width this is the network of the released SVD and DragNUWA 1.5 checkpoints; the
small models are the same modules with other numbers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from nuwa_jax.models.drag_attention import DragAttentionConfig, DragEmbedding, DragLayer
from nuwa_jax.models.flow_encoder import FlowFeature, FlowInjection
from nuwa_jax.models.layers import (
    AlphaBlender,
    Attention,
    Mlp,
    TemporalConv,
    add_fed_forward,
    add_spread,
    as_stored,
    broadcast,
    conv2d,
    group_norm,
    layer_norm,
    sinusoids,
    upsample_nearest,
)
from nuwa_jax.models.partition import by_frames, by_pixels
from nuwa_jax.models.products import LECUN, ZERO_INIT, Dense
from nuwa_jax.models.remat import block_input, check_policy, rematerialized

RES_EPS = 1e-5
TRANSFORMER_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net; the defaults are those of SVD.

    `attention_factors` are the reductions (1 = latent resolution) at which transformers stand;
    the middle block has one always. `flow_injection` is "film", "concat", "cross_attention" or
    "none", `flow_where` "encoder+decoder" or "decoder". `temporal_context` gives the context to the
    temporal blocks, too, at every pixel, as SVD does; with long texts that is most of their cost.
    `remat` is what each block keeps for the backward pass (`nuwa_jax.models.remat.POLICIES`).
    """

    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_factors: tuple[int, ...] = (1, 2, 4)
    head_channels: int = 64
    ff_multiplier: int = 4
    temporal_context: bool = True
    flow_injection: str = "none"
    flow_where: str = "encoder+decoder"
    drag: DragAttentionConfig | None = None
    remat: str = "none"

    def __post_init__(self) -> None:
        check_policy(self.remat)

    def channels(self, level: int) -> int:
        """Channels at `level` (0 is the latent resolution)."""
        return self.model_channels * self.channel_mult[level]

    def has_attention(self, level: int) -> bool:
        """Whether res blocks at `level` are followed by a transformer."""
        return 2**level in self.attention_factors


class Stream(NamedTuple):
    """What every block reads and only drag layers change."""

    emb: Float[Array, "b t e"]
    context: Float[Array, "b l c"] | None
    context_mask: Bool[Array, "b l"] | None
    drags: DragEmbedding | None
    image_only: Bool[Array, "b t"] | None


class SpatialResBlock(nn.Module):
    """GN, SiLU, conv, (flow), + embedding, GN, SiLU, conv, plus the shortcut."""

    features: int
    flow_injection: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        emb: Float[Array, "b t e"],
        flow: FlowFeature | None = None,
    ) -> Float[Array, "b t h w c2"]:
        b = x.shape[0]
        x = rearrange(x, "b t h w c -> (b t) h w c")
        h = nn.silu(group_norm(x.shape[-1], RES_EPS, name="norm1", dtype=self.dtype)(x))
        h = conv2d(self.features, name="conv1", dtype=self.dtype)(h)
        if flow is not None:
            # Before the embedding is added, as in DragNUWA 1.5.
            h = FlowInjection(self.flow_injection, self.dtype, name="flow_injection")(h, flow)
        shift = Dense(self.features, dtype=self.dtype, name="emb_proj")(nn.silu(emb))
        h = add_spread(h, rearrange(shift, "b t c -> (b t) 1 1 c"))
        h = nn.silu(group_norm(self.features, RES_EPS, name="norm2", dtype=self.dtype)(h))
        h = conv2d(self.features, zero=True, name="conv2", dtype=self.dtype)(h)
        if x.shape[-1] != self.features:
            x = conv2d(self.features, kernel=1, name="shortcut", dtype=self.dtype)(x)
        return rearrange(x + h, "(b t) h w c -> b t h w c", b=b)


class TemporalResBlock(nn.Module):
    """Res block of 3-tap temporal convolutions; GroupNorm statistics run over all frames."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], emb: Float[Array, "b t e"]
    ) -> Float[Array, "b t h w c"]:
        c, dtype = x.shape[-1], self.dtype
        h = nn.silu(group_norm(c, RES_EPS, name="norm1", dtype=dtype)(x))
        h = TemporalConv(c, kernel_init=LECUN, dtype=dtype, name="conv1")(h)
        shift = Dense(c, dtype=dtype, name="emb_proj")(nn.silu(emb))
        h = add_spread(as_stored(h), shift[:, :, None, None, :])
        h = nn.silu(group_norm(c, RES_EPS, name="norm2", dtype=dtype)(h))
        return x + TemporalConv(c, kernel_init=ZERO_INIT, dtype=dtype, name="conv2")(h)


class VideoResBlock(nn.Module):
    """Spatial then temporal res block, blended with a learned weight."""

    features: int
    flow_injection: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], stream: Stream, flow: FlowFeature | None = None
    ) -> Float[Array, "b t h w c2"]:
        x = SpatialResBlock(self.features, self.flow_injection, self.dtype, name="spatial")(
            by_frames(block_input(x)), stream.emb, flow
        )
        x = by_pixels(x)
        z = TemporalResBlock(self.dtype, name="temporal")(x, stream.emb)
        return AlphaBlender(name="time_mixer")(x, z, stream.image_only)


class SpatialBlock(nn.Module):
    """Self-attention over a frame (or time, `Attention`), cross-attention, feed-forward."""

    heads: int
    ff_multiplier: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "n l c"] | Float[Array, "b t l c"],
        context: Float[Array, "b lc cc"] | None,
        mask: Bool[Array, "b lc"] | None,
    ) -> Float[Array, "n l c"] | Float[Array, "b t l c"]:
        dtype = self.dtype
        y = layer_norm("norm1", dtype)(u)
        u = u + Attention(self.heads, dtype=dtype, name="self_attention")(y)
        if context is not None:
            y = layer_norm("norm2", dtype)(u)
            attention = Attention(self.heads, dtype=dtype, name="cross_attention")
            u = u + attention(y, context, mask)
        return add_fed_forward(u, "norm3", "feed_forward", self.ff_multiplier, dtype)


class TemporalBlock(nn.Module):
    """The same over time at every pixel, with one more feed-forward in front."""

    heads: int
    ff_multiplier: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        v: Float[Array, "b t l c"],
        context: Float[Array, "b lc cc"] | None,
        mask: Bool[Array, "b lc"] | None,
    ) -> Float[Array, "b t l c"]:
        dtype = self.dtype
        v = add_fed_forward(v, "norm_in", "feed_forward_in", self.ff_multiplier, dtype)
        return SpatialBlock(self.heads, self.ff_multiplier, dtype, name="block")(v, context, mask)


class VideoTransformer(nn.Module):
    """Spatial block, temporal block with frame-index embedding, blended; zero-initialised out."""

    heads: int
    ff_multiplier: int
    temporal_context: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], stream: Stream) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        dtype = self.dtype
        x = block_input(x)
        u = rearrange(by_frames(x), "b t h w c -> (b t) (h w) c")
        u = group_norm(c, TRANSFORMER_EPS, name="norm", dtype=dtype)(as_stored(u))
        u = Dense(c, dtype=dtype, name="proj_in")(u)

        # Frames of one video are neighbours: they share its context.
        context, mask = stream.context, stream.context_mask
        u = SpatialBlock(self.heads, self.ff_multiplier, dtype, name="spatial_block")(
            u, context, mask
        )

        frame_emb = Mlp(4 * c, c, dtype=dtype, name="frame_embed")(sinusoids(jnp.arange(t), c))
        u = by_pixels(rearrange(u, "(b t) l c -> b t l c", t=t))
        v = add_spread(u, frame_emb[None, :, None, :])
        if not self.temporal_context:
            context = mask = None
        v = TemporalBlock(self.heads, self.ff_multiplier, dtype, name="temporal_block")(
            v, context, mask
        )
        u = AlphaBlender(name="time_mixer")(u, v, stream.image_only)
        u = Dense(c, dtype=dtype, kernel_init=ZERO_INIT, name="proj_out")(u)
        return rearrange(u, "b t (h w) c -> b t h w c", h=h) + x


class UNet(nn.Module):
    """Predicts the network output F of the EDM denoiser for a batch of noisy latent videos.

    The flow enters the first res block of every level (encoder and decoder, or decoder only), the
    drags after the transformers of the levels named in the drag config. Parameters of both begin
    with `flow_` and `drag_`, so that training rules can name them.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        c_noise: Float[Array, " b"],
        context: Float[Array, "b l cc"] | None = None,
        vector: Float[Array, "b v"] | None = None,
        flow: dict[str, FlowFeature] | None = None,
        drags: DragEmbedding | None = None,
        context_mask: Bool[Array, "b l"] | None = None,
        image_only: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t h w out"]:
        config, dtype = self.config, self.dtype
        b, t = x.shape[:2]
        emb_channels = 4 * config.model_channels
        emb = Mlp(emb_channels, emb_channels, dtype=dtype, name="time_embed")(
            sinusoids(c_noise, config.model_channels)
        )
        if vector is not None:
            emb = emb + Mlp(emb_channels, emb_channels, dtype=dtype, name="vector_embed")(vector)
        emb = broadcast(emb[:, None], (b, t, emb_channels))
        stream = Stream(emb, context, context_mask, drags, image_only)
        flow = flow or {}
        res_block, transformer, drag_layer = (
            rematerialized(part, config.remat)
            for part in (VideoResBlock, VideoTransformer, DragLayer)
        )

        def block(
            x: Array, stream: Stream, name: str, level: int, *, attend: bool, site: str | None
        ) -> tuple[Array, Stream]:
            features = config.channels(level)
            x = res_block(features, config.flow_injection, dtype, name=f"{name}_res")(
                x, stream, flow.get(site) if site else None
            )
            if not attend:
                return x, stream
            heads = max(1, features // config.head_channels)
            x = transformer(
                heads,
                config.ff_multiplier,
                config.temporal_context,
                dtype,
                name=f"{name}_transformer",
            )(x, stream)
            if config.drag is not None and level in config.drag.levels and drags is not None:
                x, updated = drag_layer(config.drag, dtype, name=f"{name}_drag")(x, stream.drags)
                stream = stream._replace(drags=updated)
            return x, stream

        def per_frame(layer: nn.Module, x: Array) -> Array:
            x = by_frames(x)
            return rearrange(
                layer(rearrange(x, "b t h w c -> (b t) h w c")), "(b t) h w c -> b t h w c", b=b
            )

        levels = len(config.channel_mult)
        x = per_frame(conv2d(config.model_channels, name="conv_in", dtype=dtype), x.astype(dtype))
        skips = [x]
        for level in range(levels):
            attend = config.has_attention(level)
            for i in range(config.num_res_blocks):
                site = f"down_{level}" if i == 0 else None
                x, stream = block(x, stream, f"down_{level}_{i}", level, attend=attend, site=site)
                skips.append(x)
            if level < levels - 1:
                conv = conv2d(x.shape[-1], stride=2, name=f"down_{level}_downsample", dtype=dtype)
                x = per_frame(conv, x)
                skips.append(x)

        x, stream = block(x, stream, "mid_0", levels - 1, attend=True, site=None)
        x, stream = block(x, stream, "mid_1", levels - 1, attend=False, site=None)

        for level in reversed(range(levels)):
            attend = config.has_attention(level)
            for i in range(config.num_res_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                site = f"up_{level}" if i == 0 else None
                x, stream = block(x, stream, f"up_{level}_{i}", level, attend=attend, site=site)
            if level > 0:
                conv = conv2d(x.shape[-1], name=f"up_{level}_upsample", dtype=dtype)
                x = per_frame(lambda y, conv=conv: conv(upsample_nearest(y)), x)

        x = nn.silu(per_frame(group_norm(x.shape[-1], RES_EPS, name="norm_out", dtype=dtype), x))
        out = conv2d(config.out_channels, zero=True, name="conv_out", dtype=dtype)
        return per_frame(out, x).astype(jnp.float32)
