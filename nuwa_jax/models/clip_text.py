"""CLIP's text encoder: a caption as tokens of cross-attention context.

With the default sizes this is OpenCLIP's ViT-H/14 text tower, which Stable Diffusion 2 and video
models built on it read; with `quick_gelu`, width 768, 12 layers and 12 heads it is OpenAI's
ViT-L/14. Released weights load unchanged (`nuwa_jax.convert.clip_text`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from nuwa_jax.errors import UserError
from nuwa_jax.models.clip import ACTIVATIONS, ClipBlock
from nuwa_jax.models.layers import add_spread, layer_norm
from nuwa_jax.models.products import Dense

LAYERS = ("last", "penultimate")
PADDINGS = ("zero", "end")


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of the text encoder; the defaults are those of ViT-H/14.

    Attributes:
      width, layers, heads, mlp_ratio: of the transformer.
      max_length: tokens that it has positions for.
      vocabulary: how many tokens there are; the last two are start and end of text.
      projection: channels of the pooled embedding; 0 where a checkpoint has no projection.
      activation: "gelu" (OpenCLIP) or "quick_gelu" (OpenAI).
      layer: whose output the features are, "last" or "penultimate" (Stable Diffusion 2).
      padding: what follows the end of the text, token "zero" (OpenCLIP, Stable Diffusion 2) or
        once more the "end" token (Hugging Face's ViT-L/14, Stable Diffusion 1).
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    max_length: int = 77
    vocabulary: int = 49408
    projection: int = 1024
    mlp_ratio: int = 4
    activation: str = "gelu"
    layer: str = "last"
    padding: str = "zero"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"model.text: {self.heads} heads do not divide width {self.width}")
        for name, known in (
            ("activation", ACTIVATIONS),
            ("layer", LAYERS),
            ("padding", PADDINGS),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"model.text.{name} must be one of {tuple(known)}, got {getattr(self, name)!r}"
                )

        if self.layers < 1 + LAYERS.index(self.layer):
            raise UserError(
                f"model.text.layer is {self.layer!r}, and model.text.layers is {self.layers}: "
                "there is no such layer"
            )

    @property
    def start_token(self) -> int:
        """Stands before every text."""
        return self.vocabulary - 2

    @property
    def end_token(self) -> int:
        """Stands after every text; the pooled embedding is read off there."""
        return self.vocabulary - 1

    @property
    def pad_token(self) -> int:
        """Fills what is left."""
        return self.end_token if self.padding == "end" else 0

    def empty_text(self, length: int) -> Int32[Array, " length"]:
        """The tokens of an empty caption, which stands for "nothing said"."""
        tokens = jnp.full((length,), self.pad_token, jnp.int32)
        return tokens.at[0].set(self.start_token).at[1].set(self.end_token)


class TextFeatures(NamedTuple):
    """What CLIP makes of a text: features of each token, and of the whole."""

    tokens: Float[Array, "b l c"]
    pooled: Float[Array, "b projection"]


class ClipText(nn.Module):
    """Tokens (`nuwa_jax.data.clip_tokenizer`) to features, all after the final norm.

    The pooled embedding is not normalised to unit length. Whatever follows the end of a text is
    taken for padding and replaced by the config's own: data need not know of it.
    """

    config: ClipTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: Int[Array, "b l"]) -> TextFeatures:
        config, dtype = self.config, self.dtype
        b, length = text.shape
        if length > config.max_length:
            raise UserError(
                f"text of {length} tokens, the encoder was built for {config.max_length}: "
                "lower data.text_length"
            )
        end = jnp.argmax(text, axis=-1)  # of all tokens it has the highest number
        text = jnp.where(jnp.arange(length) > end[:, None], config.pad_token, text)
        x = nn.Embed(
            config.vocabulary,
            config.width,
            embedding_init=nn.initializers.normal(0.02),
            name="tokens",
        )(text).astype(dtype)
        init = nn.initializers.normal(0.01)
        positions = self.param("positions", init, (config.max_length, config.width))
        x = add_spread(x, positions[:length])
        causal = jnp.tri(length, dtype=bool)
        outputs = []
        for i in range(config.layers):
            block = ClipBlock(
                config.heads, config.mlp_ratio, dtype, config.activation, name=f"block_{i}"
            )
            x = block(x, causal)
            outputs.append(x)
        norm = layer_norm("norm_out", dtype)
        pooled = norm(x[jnp.arange(b), end])
        if config.projection:
            pooled = Dense(config.projection, use_bias=False, dtype=dtype, name="projection")(
                pooled
            )
        features = outputs[-1 if config.layer == "last" else -2]
        return TextFeatures(norm(features), pooled.astype(jnp.float32))
