"""Drags as tokens, and the attention layers in which they meet the frames.

Two forms, both leaving a trained network unchanged until they are trained themselves:
`tokens`: each drag is one token per frame; tokens read the frame and the frame reads the tokens.
`query_key`: an embedding of the handle is added to the query at the target and to the key at the
handle in the first frame (LightningDrag, arXiv 2405.13722), so that a target finds its handle.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from nuwa_jax.models.attention import dot_product_attention
from nuwa_jax.models.layers import Mlp, add_spread, broadcast, fourier_features, layer_norm
from nuwa_jax.models.products import ZERO_INIT, Conv, Dense, wide
from nuwa_jax.models.remat import block_input

NUM_STATES = 4  # unspecified, visible, occluded, outside
UNSPECIFIED = 0
VISIBLE = 1


@dataclasses.dataclass(frozen=True)
class DragAttentionConfig:
    """Sizes of the drag tokens and of the layers that use them.

    `levels` are the U-Net levels (0 = latent resolution) whose transformers are followed by a drag
    layer; `forms` is any of "tokens", "query_key".
    """

    forms: tuple[str, ...] = ("tokens",)
    levels: tuple[int, ...] = (0, 1, 2)
    token_channels: int = 256
    heads: int = 4
    num_frequencies: int = 6

    def __post_init__(self) -> None:
        unknown = set(self.forms) - {"tokens", "query_key"}
        if unknown or not self.forms:
            raise ValueError(f"drag forms are 'tokens' and 'query_key', not {self.forms!r}")


class DragEmbedding(NamedTuple):
    """The drags of a sample as the U-Net sees them; positions are in units of the picture."""

    tokens: Float[Array, "b t k d"]
    position: Float[Array, "b t k 2"]
    present: Bool[Array, "b t k"]
    target: dict[int, Float[Array, "b t p f"]]  # by number of rows of the grid (form query_key)
    handle: dict[int, Float[Array, "b p f"]]
    keep: Float[Array, " b"]


class DragEmbedder(nn.Module):
    """Drags and the first frame to `DragEmbedding`: run once per sample.

    A token sums Fourier features of position, start and displacement (through an MLP), an embedding
    of its state, an embedding of its depth and the first-frame feature found at its handle.
    """

    config: DragAttentionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        position: Float[Array, "b k t 2"],
        state: Int[Array, "b k t"],
        first_frame: Float[Array, "b h w c"],
        keep: Float[Array, " b"],
        depth: Float[Array, "b k"] | None = None,
    ) -> DragEmbedding:
        """`position` is in units of the picture (0..1), `first_frame` are its latents."""
        config, dtype = self.config, self.dtype
        d, frequencies = config.token_channels, config.num_frequencies
        position = rearrange(position, "b k t p -> b t k p")
        state = rearrange(state, "b k t -> b t k")
        start = position[:, 0]
        displacement = position - start[:, None]
        step = jnp.diff(position, axis=1, prepend=position[:, :1])

        geometry = jnp.concatenate(
            [
                fourier_features(position, frequencies),
                jnp.broadcast_to(
                    fourier_features(start, frequencies)[:, None],
                    (*position.shape[:3], 4 * frequencies),
                ),
                fourier_features(displacement, frequencies),
                displacement,
                step,
            ],
            axis=-1,
        )
        geometry = Mlp(d, d, dtype=dtype, name="geometry")(geometry)
        base = self.param("base", nn.initializers.normal(0.02), (d,))
        states = nn.Embed(NUM_STATES, d, name="state")(state.astype(jnp.int32))

        appearance = Conv(d, (3, 3), padding=1, dtype=dtype, name="appearance_1")(first_frame)
        appearance = Conv(d, (3, 3), padding=1, dtype=dtype, name="appearance_2")(
            nn.silu(appearance)
        )
        found = sample_at(appearance, start)
        found = Dense(d, dtype=dtype, name="appearance_out")(found)

        depth = jnp.zeros(start.shape[:2]) if depth is None else depth
        depth = Dense(d, use_bias=False, dtype=dtype, name="depth")(depth[..., None])

        tokens = wide(geometry) + base + states + wide(found + depth)[:, None]
        tokens = tokens.astype(dtype)
        target, handle = {}, {}
        if "query_key" in config.forms:
            sharpness = jax.nn.softplus(self.param("sharpness", nn.initializers.constant(50.0), ()))
            height, width = first_frame.shape[1:3]
            for level in config.levels:
                grid = grid_positions(height // 2**level, width // 2**level)
                maps = correspondence_maps(grid, position, state == VISIBLE, sharpness, frequencies)
                target[height // 2**level], handle[height // 2**level] = maps
        return DragEmbedding(tokens, position, state != UNSPECIFIED, target, handle, keep)


class DragLayer(nn.Module):
    """One modified attention layer: changes the frame, and (token form) the drag tokens."""

    config: DragAttentionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], drags: DragEmbedding
    ) -> tuple[Float[Array, "b t h w c"], DragEmbedding]:
        x = block_input(x)
        if "query_key" in self.config.forms:
            x = CorrespondenceAttention(self.config, self.dtype, name="drag_query_key")(x, drags)
        if "tokens" in self.config.forms:
            x, drags = TokenAttention(self.config, self.dtype, name="drag_tokens")(x, drags)
        return x, drags


class TokenAttention(nn.Module):
    """Two-way gated attention between the pixels of a frame and its drag tokens.

    Attention logits carry a learned, per-head penalty on the squared distance between pixel and
    drag: a drag matters most where it is. A learned null token stands for "no drag here".
    """

    config: DragAttentionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], drags: DragEmbedding
    ) -> tuple[Float[Array, "b t h w c"], DragEmbedding]:
        config, dtype = self.config, self.dtype
        b, t, h, w, c = x.shape
        d, heads = config.token_channels, config.heads
        grid = grid_positions(h, w)
        place = Dense(d, dtype=dtype, name="drag_place")(
            fourier_features(grid, config.num_frequencies)
        )
        pixels = rearrange(x, "b t h w c -> (b t) (h w) c")
        tokens = rearrange(drags.tokens, "b t k d -> (b t) k d")
        position = rearrange(drags.position, "b t k p -> (b t) k p")
        present = rearrange(drags.present, "b t k -> (b t) k")
        distance = jnp.sum(
            (grid[None, :, None, :] - position[:, None, :, :]) ** 2, axis=-1
        )  # n (h w) k, in units of the picture
        penalty = self.param("drag_locality", log_spaced_locality, (2, heads))
        penalty = jax.nn.softplus(penalty)[:, None, :, None, None] * distance[None, :, None]

        normed_pixels = layer_norm("drag_norm_pixels", dtype)(pixels)
        normed_pixels = Dense(d, dtype=dtype, name="drag_pixels")(normed_pixels)
        normed_pixels = add_spread(normed_pixels, place)

        # Tokens read the frame.
        normed_tokens = layer_norm("drag_norm_tokens", dtype)(tokens)
        read = self._attend(
            normed_tokens,
            normed_pixels,
            bias=-rearrange(penalty[0], "n e p k -> n e k p"),
            name="drag_read",
        )
        gate = self.param("drag_token_gate", nn.initializers.zeros_init(), (d,))
        tokens = (wide(tokens) + jnp.tanh(gate) * wide(read)).astype(dtype)

        # The frame reads the tokens; unspecified ones do not exist for it.
        null = self.param("drag_null", nn.initializers.normal(0.02), (d,))
        null = broadcast(null, (b * t, 1, d)).astype(dtype)
        normed_tokens = layer_norm("drag_norm_updated", dtype)(tokens)
        sources = jnp.concatenate([null, normed_tokens], axis=1)
        mask = jnp.concatenate([jnp.ones((b * t, 1), bool), present], axis=1)
        bias = jnp.pad(-penalty[1], ((0, 0), (0, 0), (0, 0), (1, 0)))
        wrote = self._attend(
            normed_pixels, sources, bias=bias, mask=mask[:, None, None, :], name="drag_write"
        )
        wrote = nn.silu(add_spread(Dense(d, dtype=dtype, name="drag_mix")(wrote), place))
        wrote = Dense(c, dtype=dtype, kernel_init=ZERO_INIT, name="drag_out")(wrote)
        keep = jnp.repeat(drags.keep, t)[:, None, None].astype(dtype)
        pixels = pixels + keep * wrote
        x = rearrange(pixels, "(b t) (h w) c -> b t h w c", b=b, h=h)
        return x, drags._replace(tokens=rearrange(tokens, "(b t) k d -> b t k d", b=b))

    def _attend(
        self,
        target: Float[Array, "n lq d"],
        source: Float[Array, "n lk d"],
        *,
        bias: Float[Array, "n heads lq lk"],
        name: str,
        mask: Bool[Array, "n 1 1 lk"] | None = None,
    ) -> Float[Array, "n lq d"]:
        d, heads = self.config.token_channels, self.config.heads
        q, k, v = (
            rearrange(
                Dense(d, use_bias=False, dtype=self.dtype, name=f"{name}_{part}")(y),
                "n l (e d) -> n l e d",
                e=heads,
            )
            for part, y in (("q", target), ("k", source), ("v", source))
        )
        out = dot_product_attention(q, k, v, bias=bias, mask=mask)
        return rearrange(out, "n l e d -> n l (e d)")


class CorrespondenceAttention(nn.Module):
    """Frame t looks up the first frame: target embeddings on queries, handle embeddings on keys.

    Both embeddings go through one projection, so that a query agrees most with the key of the place
    it comes from, before anything is learned.
    """

    config: DragAttentionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], drags: DragEmbedding
    ) -> Float[Array, "b t h w c"]:
        dtype, d, heads = self.dtype, self.config.token_channels, self.config.heads
        t, h, c = x.shape[1], x.shape[2], x.shape[4]
        pixels = rearrange(x, "b t h w c -> b t (h w) c")
        normed = layer_norm("drag_norm", dtype)(pixels)
        first = normed[:, 0]
        place = Dense(d, use_bias=False, dtype=dtype, name="drag_place")
        query = Dense(d, use_bias=False, dtype=dtype, name="drag_q")(normed)
        query = query + place(drags.target[h].astype(dtype))
        key = Dense(d, use_bias=False, dtype=dtype, name="drag_k")(first)
        key = key + place(drags.handle[h].astype(dtype))
        value = Dense(d, use_bias=False, dtype=dtype, name="drag_v")(first)
        out = dot_product_attention(
            rearrange(query, "b t p (e d) -> b (t p) e d", e=heads),
            rearrange(key, "b p (e d) -> b p e d", e=heads),
            rearrange(value, "b p (e d) -> b p e d", e=heads),
        )
        out = rearrange(out, "b (t p) e d -> b t p (e d)", t=t)
        out = Dense(c, dtype=dtype, kernel_init=ZERO_INIT, name="drag_out")(out)
        pixels = pixels + drags.keep[:, None, None, None].astype(dtype) * out
        return rearrange(pixels, "b t (h w) c -> b t h w c", h=h)


def correspondence_maps(
    grid: Float[Array, "p 2"],
    position: Float[Array, "b t k 2"],
    visible: Bool[Array, "b t k"],
    sharpness: Float[Array, ""],
    num_frequencies: int,
) -> tuple[Float[Array, "b t p f"], Float[Array, "b p f"]]:
    """Where in the first frame each cell of each frame comes from, as Fourier features.

    A cell near drag k in frame t comes from its own place less what the drag has moved: an object
    moves as a whole. Each drag acts on a Gaussian neighbourhood, `exp(-sharpness * distance²)`
    (distances in units of the picture); where several drags act, their features are averaged.
    Occluded, outside and unspecified points act on nothing.

    Returns:
      Target features per frame, and handle features: those of the first frame's own cells.
    """

    def weigh(position: Array, visible: Array) -> Array:
        squared = jnp.sum((grid[:, None] - position[..., None, :, :]) ** 2, axis=-1)
        weight = jnp.exp(-sharpness * squared) * visible[..., None, :]
        return weight / jnp.maximum(1.0, jnp.sum(weight, axis=-1, keepdims=True))

    moved = position - position[:, :1]
    source = grid[:, None] - moved[:, :, None]
    target = jnp.einsum(
        "btpk,btpkf->btpf", weigh(position, visible), fourier_features(source, num_frequencies)
    )
    near = jnp.sum(weigh(position[:, 0], visible[:, 0]), axis=-1, keepdims=True)
    return target, near * fourier_features(grid, num_frequencies)


def grid_positions(height: int, width: int) -> Float[Array, "p 2"]:
    """Centres of a grid's cells as (x, y) in units of the picture, row by row."""
    y, x = jnp.meshgrid(
        (jnp.arange(height) + 0.5) / height, (jnp.arange(width) + 0.5) / width, indexing="ij"
    )
    return jnp.stack([x.reshape(-1), y.reshape(-1)], axis=-1)


def sample_at(
    features: Float[Array, "b h w c"], position: Float[Array, "b k 2"]
) -> Float[Array, "b k c"]:
    """Bilinear lookup at positions in units of the picture, by two small matrix products.

    Positions beyond the centres of the border cells take the border's value.
    """
    h, w = features.shape[1:3]

    def weights(u: Array, size: int) -> Array:
        cell = jnp.clip(u * size - 0.5, 0, size - 1)
        return jax.nn.relu(1 - jnp.abs(cell[..., None] - jnp.arange(size)))

    rows, columns = weights(position[..., 1], h), weights(position[..., 0], w)
    return jnp.einsum("bkh,bkw,bhwc->bkc", rows, columns, features)


def log_spaced_locality(
    key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32
) -> Array:
    """Heads from almost global to about an eighth of the picture wide (before softplus)."""
    del key
    wanted = jnp.logspace(0.0, 2.0, shape[1])  # penalty at distance 1: from 1 to 100
    # The inverse of softplus, in the form that does not overflow.
    return jnp.broadcast_to(wanted + jnp.log(-jnp.expm1(-wanted)), shape).astype(dtype)
