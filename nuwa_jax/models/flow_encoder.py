"""Flow maps to features for every level of the U-Net, and how they enter a res block.

DragNUWA 1.5: strided convolutions with temporal ones between them; the features modulate the first
res block of each level by an additive residual FiLM. Everything that does not depend on the noisy
latents, down to gamma and beta, is computed here, once per sample.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from nuwa_jax.models.attention import dot_product_attention
from nuwa_jax.models.layers import (
    TemporalConv,
    as_stored,
    conv2d,
    group_norm,
    space_to_depth,
)
from nuwa_jax.models.products import ZERO_INIT, Dense

FLOW_EPS = 1e-5
FLOW_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class FlowEncoderConfig:
    """Sizes of the flow encoder; the defaults are those of DragNUWA 1.5.

    `reduction` is that of the autoencoder: the stem brings the flow to latent resolution.
    `patch_size` > 1 folds pixels into channels first, which spares a small model the thin
    convolutions at full resolution. `flow_scale` multiplies the flow (pixels) at the entrance.
    """

    injection: str = "film"
    where: str = "encoder+decoder"
    channel_scale: float = 1.0
    patch_size: int = 1
    flow_scale: float = 1.0


class FlowFeature(NamedTuple):
    """What one injection site gets: gamma and beta for FiLM, else `gamma` holds the features.

    `keep` is 1 where the drag condition is given and 0 where it is dropped; a dropped one leaves
    the block exactly as it is without a flow encoder.
    """

    gamma: Float[Array, "b t h w c"]
    beta: Float[Array, "b t h w c"] | None
    keep: Float[Array, " b"]


class FlowEncoder(nn.Module):
    """`[b t H W 2]` pixels per frame to one feature map per level, `[b t h_l w_l c_l]`."""

    config: FlowEncoderConfig
    model_channels: int
    channel_mult: tuple[int, ...]
    reduction: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, flow: Float[Array, "b t H W 2"]) -> list[Float[Array, "b t h w c"]]:
        config, dtype = self.config, self.dtype
        b = flow.shape[0]

        def conv(x: Array, features: int, stride: int, name: str) -> Array:
            x = rearrange(x, "b t h w c -> (b t) h w c")
            x = conv2d(features, stride=stride, name=name, dtype=dtype)(x)
            return rearrange(x, "(b t) h w c -> b t h w c", b=b)

        def norm(x: Array, name: str) -> Array:
            frames = rearrange(x, "b t h w c -> (b t) h w c")
            groups = {"groups": FLOW_GROUPS, "name": name, "dtype": dtype}
            frames = nn.silu(group_norm(x.shape[-1], FLOW_EPS, **groups)(as_stored(frames)))
            return rearrange(frames, "(b t) h w c -> b t h w c", b=b)

        def temporal(x: Array, name: str) -> Array:
            return TemporalConv(x.shape[-1], edge=True, dtype=dtype, name=name)(x)

        x = flow.astype(dtype) * config.flow_scale
        if config.patch_size > 1:
            x = space_to_depth(x, config.patch_size)
        width = int(self.model_channels * config.channel_scale)
        stages = int(math.log2(self.reduction // config.patch_size))
        for i in range(stages):
            features = width // 2 ** (stages - 1 - i)
            if i > 0:
                x = norm(x, f"stem_norm_{i}")
            x = temporal(conv(x, features, 2, f"stem_conv_{i}"), f"stem_time_{i}")
        if stages == 0:
            x = temporal(conv(x, width, 1, "stem_conv_0"), "stem_time_0")
        features_per_level = [x]
        for level in range(1, len(self.channel_mult)):
            features = width * self.channel_mult[level]
            x = norm(x, f"level_{level}_norm")
            x = temporal(conv(x, features, 1, f"level_{level}_conv"), f"level_{level}_time")
            x = conv(x, features, 2, f"level_{level}_downsample")
            features_per_level.append(x)
        return features_per_level


class FlowHeads(nn.Module):
    """Feature maps to what each injection site needs: gamma and beta (FiLM), or the features."""

    config: FlowEncoderConfig
    model_channels: int
    channel_mult: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: list[Float[Array, "b t h w c"]], keep: Float[Array, " b"]
    ) -> dict[str, FlowFeature]:
        sites = [f"up_{level}" for level in range(len(self.channel_mult))]
        if self.config.where == "encoder+decoder":
            sites = [f"down_{level}" for level in range(len(self.channel_mult))] + sites
        out = {}
        for site in sites:
            level = int(site.rsplit("_", 1)[1])
            if self.config.injection != "film":
                out[site] = FlowFeature(features[level], None, keep)
                continue
            channels = self.model_channels * self.channel_mult[level]
            gamma, beta = (
                self._modulation(features[level], channels, f"{site}_{name}")
                for name in ("gamma", "beta")
            )
            out[site] = FlowFeature(gamma, beta, keep)
        return out

    def _modulation(self, x: Array, channels: int, name: str) -> Array:
        b = x.shape[0]
        x = rearrange(x, "b t h w c -> (b t) h w c")
        x = conv2d(channels // 4, name=f"{name}_conv", dtype=self.dtype)(x)
        x = rearrange(x, "(b t) h w c -> b t h w c", b=b)
        return TemporalConv(
            channels, edge=True, kernel_init=ZERO_INIT, dtype=self.dtype, name=f"{name}_time"
        )(x)


class FlowInjection(nn.Module):
    """Adds the flow's part to the hidden map of a res block; a fresh one adds exactly zero."""

    kind: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "n h w c"], flow: FlowFeature) -> Float[Array, "n h w c"]:
        t = flow.gamma.shape[1]
        keep = jnp.repeat(flow.keep, t)[:, None, None, None].astype(h.dtype)
        first = rearrange(flow.gamma, "b t h w c -> (b t) h w c")
        channels = h.shape[-1]
        if self.kind == "film":
            # h + GN(h) * gamma + beta: an additive residual, neither GN(h)(1+g)+b nor h(1+g)+b.
            beta = rearrange(flow.beta, "b t h w c -> (b t) h w c")
            normed = group_norm(channels, FLOW_EPS, name="flow_norm", dtype=self.dtype)(h)
            return h + keep * (normed * first + beta)
        if self.kind == "concat":
            joined = jnp.concatenate([h, first], axis=-1)
            conv = conv2d(channels, kernel=1, zero=True, name="flow_concat", dtype=self.dtype)
            return h + keep * conv(joined)
        if self.kind == "cross_attention":
            query = group_norm(channels, FLOW_EPS, name="flow_norm", dtype=self.dtype)(h)
            query = Dense(channels, dtype=self.dtype, name="flow_query")(query)
            key = Dense(channels, dtype=self.dtype, name="flow_key")(first)
            value = Dense(channels, dtype=self.dtype, name="flow_value")(first)
            q, k, v = (rearrange(y, "n h w c -> n (h w) 1 c") for y in (query, key, value))
            out = rearrange(dot_product_attention(q, k, v), "n (h w) 1 c -> n h w c", w=h.shape[2])
            out = Dense(channels, kernel_init=ZERO_INIT, dtype=self.dtype, name="flow_out")(out)
            return h + keep * out
        raise ValueError(
            f"flow injection is film, concat or cross_attention, not {self.kind!r}: mend the config"
        )
