"""CLIP's image encoder: the picture as one token of cross-attention context (SVD).

At full size this is OpenCLIP's ViT-H/14 image tower, whose released weights load unchanged. The
text tower (`clip_text.py`) is made of the same blocks.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from nuwa_jax.models.attention import dot_product_attention
from nuwa_jax.models.layers import add_spread, broadcast, layer_norm
from nuwa_jax.models.products import Dense

# Mean and standard deviation of the pixels (0..1) CLIP was trained on.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# OpenCLIP trained with the exact GELU, OpenAI with the sigmoid that resembles it.
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of the image encoder; the defaults are those of ViT-H/14."""

    width: int = 1280
    layers: int = 32
    heads: int = 16
    patch: int = 14
    image_size: int = 224
    projection: int = 1024
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if self.image_size % self.patch or self.width % self.heads:
            raise ValueError(
                f"patch must divide image_size and heads must divide width, got patch {self.patch} "
                f"of {self.image_size} and {self.heads} heads of {self.width}: change model.clip"
            )


def preprocess(image: Float[Array, "b H W 3"], image_size: int = 224) -> Float[Array, "b s s 3"]:
    """A picture in [-1, 1] of any size to CLIP's pixels, as the released SVD does it.

    The aspect ratio is given up. A shrunk picture is first blurred (`resize_matrix`); the result of
    the bicubic step is not clipped.
    """
    shrinks = max(image.shape[1:3]) > image_size
    rows, columns = (
        jnp.asarray(resize_matrix(size, image_size, blur=shrinks), jnp.float32)
        for size in image.shape[1:3]
    )
    highest = jax.lax.Precision.HIGHEST
    image = jnp.einsum("bhwc,xw->bhxc", image.astype(jnp.float32), columns, precision=highest)
    image = jnp.einsum("bhxc,yh->byxc", image, rows, precision=highest)
    return ((image + 1) / 2 - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)


class ClipVision(nn.Module):
    """Preprocessed pixels to CLIP's image embedding, not normalised to unit length."""

    config: ClipVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "n s s 3"]) -> Float[Array, "n projection"]:
        config, dtype = self.config, self.dtype
        n, width = pixels.shape[0], config.width
        x = nn.Conv(
            width,
            (config.patch, config.patch),
            strides=(config.patch, config.patch),
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            name="patches",
        )(pixels)
        x = rearrange(x, "n h w c -> n (h w) c")
        init = nn.initializers.normal(width**-0.5)
        class_token = broadcast(self.param("class_token", init, (width,)), (n, 1, width))
        x = jnp.concatenate([class_token.astype(dtype), x], axis=1)
        x = add_spread(x, self.param("positions", init, (x.shape[1], width)))
        x = layer_norm("norm_in", dtype)(x)
        for i in range(config.layers):
            x = ClipBlock(config.heads, config.mlp_ratio, dtype, name=f"block_{i}")(x)
        x = layer_norm("norm_out", dtype)(x[:, 0])
        x = Dense(config.projection, use_bias=False, dtype=dtype, name="projection")(x)
        return x.astype(jnp.float32)


class ClipBlock(nn.Module):
    """Pre-norm transformer block; q, k, v in one projection with bias."""

    heads: int
    mlp_ratio: int
    dtype: jnp.dtype = jnp.float32
    activation: str = "gelu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "n l c"], mask: Bool[Array, "l l"] | None = None
    ) -> Float[Array, "n l c"]:
        c, dtype = x.shape[-1], self.dtype
        y = Dense(3 * c, dtype=dtype, name="qkv")(layer_norm("norm1", dtype)(x))
        q, k, v = rearrange(y, "n l (p e d) -> p n l e d", p=3, e=self.heads)
        y = dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])
        x = x + Dense(c, dtype=dtype, name="out")(rearrange(y, "n l e d -> n l (e d)"))
        y = Dense(self.mlp_ratio * c, dtype=dtype, name="mlp_1")(layer_norm("norm2", dtype)(x))
        return x + Dense(c, dtype=dtype, name="mlp_2")(ACTIVATIONS[self.activation](y))


def resize_matrix(old: int, new: int, *, blur: bool) -> np.ndarray:
    """`[new, old]` matrix that resizes one axis as kornia 0.6.9's antialiased bicubic does.

    Gaussian blur (where `blur`: one axis shrinks) of sd `max((old/new - 1)/2, 0.001)` over the odd
    kernel of at least `int(max(4 sd, 3))` pixels, reflected borders; then torch's bicubic with
    aligned corners: Keys' kernel with a = -0.75, border pixels repeated. `jax.image.resize` has
    a = -0.5 and half-pixel centres.
    """
    step = np.float32(old - 1) / np.float32(max(new - 1, 1))  # rounded as torch rounds it
    position = np.arange(new, dtype=np.float32) * step
    # Four taps around each position; those beyond the border belong to the border pixel.
    tap = np.floor(position).astype(int)[:, None] + np.arange(-1, 3)
    weight = _cubic(np.abs(position[:, None] - tap))
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(tap, 0, old - 1)), weight)
    if not blur:
        return matrix
    sd = max((old / new - 1) / 2, 0.001)
    radius = int(max(4 * sd, 3)) // 2
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sd**2))
    kernel /= kernel.sum()
    padded = np.pad(np.eye(old), ((radius, radius), (0, 0)), mode="reflect")
    return matrix @ sum(k * padded[i : i + old] for i, k in enumerate(kernel))


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel (1981), eq. 15 with free `a`."""
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
