"""A small byte-level text encoder, trained with the model: nothing has to be downloaded."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nuwa_jax.models.layers import Attention, FeedForward, add_spread, layer_norm
from nuwa_jax.models.products import Dense

VOCABULARY = 257  # 0 pads, byte b is b + 1


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the byte-level transformer.

    `stride` bytes make one token of the context: cross-attention costs that much less.
    `max_length` is in bytes.
    """

    channels: int = 128
    layers: int = 2
    heads: int = 4
    max_length: int = 256
    stride: int = 4


def token_mask(text: Int[Array, "b l"], stride: int) -> Bool[Array, "b l2"]:
    """Which tokens of the context a caption has; the others are padding."""
    text = jnp.pad(text, ((0, 0), (0, -text.shape[1] % stride)))
    # The first token always exists: an empty caption is one "nothing said" token.
    return jnp.any(text.reshape(len(text), -1, stride) != 0, axis=-1).at[:, 0].set(True)


class TextEncoder(nn.Module):
    """Bytes to tokens for cross-attention; also says which tokens are padding."""

    config: TextEncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, text: Int[Array, "b l"]
    ) -> tuple[Float[Array, "b l2 c"], Bool[Array, "b l2"]]:
        config, dtype = self.config, self.dtype
        length = text.shape[1]
        if length > config.max_length:
            raise ValueError(
                f"text of {length} bytes, the encoder was built for {config.max_length}: "
                "lower data.text_length or raise model.text.max_length"
            )
        mask = token_mask(text, config.stride)
        text = jnp.pad(text, ((0, 0), (0, -length % config.stride)))
        tokens = text.shape[1] // config.stride
        x = nn.Embed(VOCABULARY, config.channels, name="bytes")(text).astype(dtype)
        x = x.reshape(-1, tokens, config.stride * config.channels)
        x = Dense(config.channels, dtype=dtype, name="merge")(x)
        positions = self.param(
            "positions",
            nn.initializers.normal(0.02),
            (config.max_length // config.stride, config.channels),
        )
        x = add_spread(x, positions[:tokens])
        for i in range(config.layers):
            y = layer_norm(f"norm_{i}_attention", dtype)(x)
            x = x + Attention(config.heads, dtype=dtype, name=f"attention_{i}")(y, mask=mask)
            y = layer_norm(f"norm_{i}_feed_forward", dtype)(x)
            x = x + FeedForward(2, dtype=dtype, name=f"feed_forward_{i}")(y)
        return layer_norm("norm_out", dtype)(x), mask
