"""Layers shared by the networks: activations are `[b t h w c]`, spatial layers merge b t into n.

Numerical choices (eps, padding, the order of the sinusoid's halves) are those of the released SVD
and DragNUWA 1.5 networks, which load into these modules unchanged.

Where activations are bfloat16, what is spread over many of them (a bias, an embedding, a blend
weight) is spread and applied in float32: its gradient is a sum over all of those, and a sum of many
in bfloat16 stops growing (40,320 ones make 8,192 on a CPU).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from nuwa_jax.models import fed_forward
from nuwa_jax.models.attention import (
    attention_over_time,
    dot_product_attention,
    on_tpu,
    padded_scope,
    padding,
)
from nuwa_jax.models.partition import is_divided, platform, undivided
from nuwa_jax.models.products import (
    LECUN,
    ZERO_INIT,
    Conv,
    Dense,
    DenseParts,
    as_matrix,
    wide,
)
from nuwa_jax.models.tpu import normal_cdf

# What attention and feed-forward layers add, by the name by which a remat policy may keep it.
BRANCH = "branch"


def middle_tap_identity(key: Array, shape: tuple[int, int, int], dtype: jnp.dtype) -> Array:
    """Initialises a temporal kernel so that every frame passes unchanged."""
    del key
    taps, inputs, outputs = shape
    return jnp.zeros(shape, dtype).at[taps // 2].set(jnp.eye(inputs, outputs, dtype=dtype))


def group_count(channels: int, groups: int = 32) -> int:
    """The largest number of groups, at most `groups`, that divides `channels`."""
    return next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0)


def add_spread(x: Float[Array, "..."], spread: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x + spread` of `x`'s shape and dtype, added in float32."""
    return (wide(x) + wide(spread)).astype(x.dtype)


def broadcast(x: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`jnp.broadcast_to` by way of float32."""
    return x if x.shape == shape else jnp.broadcast_to(wide(x), shape).astype(x.dtype)


def as_stored(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, of which on a TPU no float32 copy is made where a norm changes how it lies in memory.

    XLA converts what a norm reads, and then copies that into the layout of the norm's other side:
    twice the bytes, kept for the backward pass. It does so where producer and consumer want
    different layouts; elsewhere this would only keep the norm from being computed with either.
    """
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


def fast_variance(dtype: jnp.dtype) -> bool:
    """Whether a variance may be the mean square less the square of the mean, in float32.

    Then both are sums over what a product or convolution gives, and made with it: no pass over
    memory. What float32 loses of the difference is some 2^-24 of the squared mean; having been
    rounded to bfloat16, the values themselves are off by 2^-18 of it in the mean square.
    """
    return dtype == jnp.bfloat16


class GroupNorm(nn.Module):
    """GroupNorm with affine, statistics over every axis but the first, in float32.

    The variance is that of what is left without the mean, in a second pass; of bfloat16 the mean
    square less the square of the mean (`fast_variance`).

    Written channel-wise: axes before the channels are reduced first and groups are formed of the
    small result. Flax's form splits the channels of the whole activation, which XLA on CPU
    vectorises badly (2.5 times the time at 64 channels).
    """

    groups: int
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n ... c"]) -> Float[Array, "n ... c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        axes = tuple(range(1, x.ndim - 1))

        def group_mean(per_channel: Array) -> Array:
            grouped = per_channel.reshape(*per_channel.shape[:-1], self.groups, -1)
            mean = jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape)
            return mean.reshape(per_channel.shape)

        fast = fast_variance(x.dtype)
        x = x.astype(jnp.float32)
        mean = group_mean(x.mean(axes, keepdims=True))
        centred = x - mean
        if fast:
            variance = group_mean(jnp.square(x).mean(axes, keepdims=True)) - jnp.square(mean)
            variance = jnp.maximum(variance, 0)
        else:
            variance = group_mean(jnp.square(centred).mean(axes, keepdims=True))
        out = centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias
        return out.astype(self.dtype)


def group_norm(
    channels: int, eps: float, *, groups: int = 32, name: str, dtype: jnp.dtype
) -> nn.Module:
    """`GroupNorm` with at most `groups` groups for `channels` channels."""
    return GroupNorm(group_count(channels, groups), eps, dtype, name=name)


def layer_norm(name: str, dtype: jnp.dtype) -> nn.Module:
    """LayerNorm with the eps of the reference (1e-5; Flax's own default is 1e-6)."""
    fast = fast_variance(dtype)
    return nn.LayerNorm(epsilon=fed_forward.EPS, use_fast_variance=fast, dtype=dtype, name=name)


def conv2d(
    features: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    zero: bool = False,
    name: str,
    dtype: jnp.dtype,
) -> nn.Module:
    """Square 2-D convolution over `[n h w c]`, padded symmetrically (stride 2, too: not SAME)."""
    pad = kernel // 2
    return Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_init=ZERO_INIT if zero else LECUN,
        dtype=dtype,
        name=name,
    )


class TemporalConv(nn.Module):
    """3-tap convolution over time at every pixel.

    Written as a 1-D convolution over `[b·h·w, t, c]`, which XLA runs about twice as fast on CPU as
    a (3, 1) 2-D one. `edge=True` repeats the first and last frame (flow encoder), otherwise the
    video is padded with zeros (res blocks, decoder).
    """

    features: int
    edge: bool = False
    kernel_init: nn.initializers.Initializer = LECUN
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c2"]:
        b, _, h, w, _ = x.shape
        x = rearrange(x, "b t h w c -> (b h w) t c")
        if self.edge:
            x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="edge")
        x = Conv(
            self.features,
            (3,),
            padding=((0, 0),) if self.edge else ((1, 1),),
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        return rearrange(x, "(b h w) t c -> b t h w c", b=b, h=h, w=w)


def sinusoids(values: Float[Array, "..."], channels: int) -> Float[Array, "... c"]:
    """`[cos(v f_k), sin(v f_k)]`, f_k = 10000^(-k / (c/2)): the cosine half comes first (SVD)."""
    half = channels // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.asarray(values, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def fourier_features(
    coordinates: Float[Array, "... 2"], num_frequencies: int
) -> Float[Array, "... 2*2*f"]:
    """`sin, cos(π 2^j u)` for j = 0..f-1 of coordinates in units of the picture (NeRF, eq. 4)."""
    frequencies = jnp.pi * 2.0 ** jnp.arange(num_frequencies, dtype=jnp.float32)
    angles = coordinates[..., None] * frequencies
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return rearrange(features, "... p f -> ... (p f)")


class Attention(nn.Module):
    """Multi-head attention; q, k, v without bias, output with bias (SVD `CrossAttention`).

    Every n / b neighbouring samples share a context: their queries are those of one attention.
    Videos `[b t l c]` without a context attend over t, at every l: t is too small for the tiles of
    a TPU, on which merging it with l costs a copy wherever it is the axis next to the channels.
    """

    heads: int
    zero: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n lq c"] | Float[Array, "b t l c"],
        context: Float[Array, "b lk c2"] | None = None,
        mask: Bool[Array, "b lk"] | None = None,
    ) -> Float[Array, "n lq c"] | Float[Array, "b t l c"]:
        if context is None and mask is None and x.ndim == 3:
            length, missing = x.shape[1], padding(x, self.heads)
            if missing:
                with jax.named_scope(padded_scope("rows", length, length + missing)):
                    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
                    return self._attend(x, None, None, length)[:, :length]
        return self._attend(x, context, mask, None)

    def _attend(
        self, x: Array, context: Array | None, mask: Array | None, length: int | None
    ) -> Array:
        channels, shape = x.shape[-1], x.shape
        over_time = x.ndim == 4 and context is None
        context = x if context is None else context

        def project(inputs: Array, name: str) -> Array:
            out = Dense(channels, use_bias=False, dtype=self.dtype, name=name)(inputs)
            return out if over_time else rearrange(out, "b l (e d) -> b l e d", e=self.heads)

        b = len(context)
        if not over_time:
            x = x.reshape(b, -1, channels)
        q, k, v = project(x, "to_q"), project(context, "to_k"), project(context, "to_v")
        if k.shape[1] == 1:
            # The softmax of one score is 1: q and k have no effect, and compiled do not exist.
            out = v
        elif over_time:
            out = attention_over_time(q, k, v, self.heads)
        else:
            if mask is not None:
                mask = jnp.repeat(mask, b // len(mask), axis=0)[:, None, None, :]
            out = dot_product_attention(q, k, v, mask=mask, length=length)
        if not over_time:
            out = rearrange(out, "b l e d -> b l (e d)")
        init = ZERO_INIT if self.zero else LECUN
        out = Dense(channels, dtype=self.dtype, kernel_init=init, name="to_out")(out)
        return broadcast(checkpoint_name(out, BRANCH), x.shape).reshape(shape)


@jax.custom_vjp
def gated(value: Float[Array, "*n"], gate: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`value * gelu(gate)` with the exact GELU, in float32 (GEGLU, arXiv 2002.05202).

    Its backward pass takes the two arguments as they are, and nothing else: float32 parts of the
    GELU, of the forward pass or shared with it, would be the largest arrays of a block.
    """
    return (wide(value) * wide(gate) * normal_cdf(wide(gate))).astype(value.dtype)


def _gated_forward(value: Array, gate: Array) -> tuple[Array, tuple[Array, Array]]:
    return gated(value, gate), (value, gate)


def _gated_backward(kept: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    # Else XLA finds the same float32 parts in a forward pass made anew, and keeps those.
    kept = jax.lax.optimization_barrier(kept)
    value, gate, change = (wide(x) for x in (*kept, change))
    cdf = normal_cdf(gate)
    density = jnp.exp(-0.5 * gate**2) / (2 * jnp.pi) ** 0.5
    by_value, by_gate = change * gate * cdf, change * value * (cdf + gate * density)
    return by_value.astype(kept[0].dtype), by_gate.astype(kept[1].dtype)


gated.defvjp(_gated_forward, _gated_backward)


class FeedForward(nn.Module):
    """GEGLU: Linear to `[value | gate]`, `value * gelu(gate)` with the exact GELU, Linear back."""

    multiplier: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        channels, shape = x.shape[-1], x.shape
        # The hidden channels have one shape throughout: else a TPU makes them in two.
        x = as_matrix(x)
        hidden = 2 * self.multiplier * channels
        value, gate = DenseParts(hidden, 2, dtype=self.dtype, name="proj")(x)
        out = Dense(channels, dtype=self.dtype, name="out")(gated(value, gate))
        return checkpoint_name(out, BRANCH).reshape(shape)


class DenseWeights(nn.Module):
    """The kernel and bias of a dense layer, for what multiplies by them itself."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
        kernel = self.param("kernel", LECUN, (inputs, self.features))
        return kernel, self.param("bias", ZERO_INIT, (self.features,))


class FeedForwardWeights(nn.Module):
    """Those of a `FeedForward`: of `[value | gate]`, and back."""

    hidden: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array, Array, Array]:
        into = DenseWeights(2 * self.hidden, name="proj")(channels)
        return *into, *DenseWeights(channels, name="out")(self.hidden)


class NormWeights(nn.Module):
    """Those of a `layer_norm`."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        return scale, self.param("bias", nn.initializers.zeros_init(), (channels,))


def add_fed_forward(
    u: Float[Array, "... l c"], norm: str, name: str, multiplier: int, dtype: jnp.dtype
) -> Float[Array, "... l c"]:
    """`u + FeedForward(LayerNorm(u))`, of submodules `norm` and `name` of the module that calls."""
    channels = u.shape[-1]
    hidden = multiplier * channels
    if on_tpu() and fed_forward.fits(u, hidden) and not is_divided():
        scale, bias = NormWeights(name=norm)(channels)
        kernel, kernel_bias, out_kernel, out_bias = FeedForwardWeights(hidden, name=name)(channels)
        pixels_last = jnp.swapaxes(u.reshape(-1, *u.shape[-2:]), 1, 2)
        out = undivided(
            fed_forward.fed_forward,
            *(pixels_last, scale, bias, kernel.astype(dtype), kernel_bias),
            *(out_kernel.astype(dtype), out_bias),
        )
        return checkpoint_name(jnp.swapaxes(out, 1, 2).reshape(u.shape), BRANCH)
    y = layer_norm(norm, dtype)(u)
    return u + FeedForward(multiplier, dtype, name=name)(y)


class AlphaBlender(nn.Module):
    """`a * first + (1 - a) * second` with a learned scalar a = σ(mix_factor).

    The U-Net passes (spatial, temporal), the decoder (temporal, spatial): that is how the released
    weights were trained. Frames marked in `image_only` take `first` alone (U-Net only).
    """

    init: float = 0.5

    @nn.compact
    def __call__(
        self,
        first: Float[Array, "b t ..."],
        second: Float[Array, "b t ..."],
        image_only: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t ..."]:
        mix_factor = self.param("mix_factor", nn.initializers.constant(self.init), (1,))
        alpha = jax.nn.sigmoid(mix_factor[0])
        if image_only is not None:
            alpha = jnp.where(image_only, 1.0, alpha)
            alpha = alpha.reshape(alpha.shape + (1,) * (first.ndim - 2))
        return (alpha * wide(first) + (1 - alpha) * wide(second)).astype(first.dtype)


class Mlp(nn.Module):
    """Linear, SiLU, Linear: the embedding networks of timestep, vector and frame index."""

    hidden: int
    out: int
    zero: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... out"]:
        x = nn.silu(Dense(self.hidden, dtype=self.dtype, name="linear_1")(x))
        init = ZERO_INIT if self.zero else LECUN
        return Dense(self.out, dtype=self.dtype, kernel_init=init, name="linear_2")(x)


def upsample_nearest(x: Float[Array, "n h w c"]) -> Float[Array, "n 2h 2w c"]:
    """Repeats every pixel twice in each direction."""
    return jnp.repeat(jnp.repeat(wide(x), 2, axis=1), 2, axis=2).astype(x.dtype)


def space_to_depth(x: Float[Array, "... h w c"], patch: int) -> Float[Array, "... h2 w2 c2"]:
    """Folds `patch` x `patch` pixels into channels."""
    return rearrange(x, "... (h p) (w q) c -> ... h w (p q c)", p=patch, q=patch)


def depth_to_space(x: Float[Array, "... h w c"], patch: int) -> Float[Array, "... h2 w2 c2"]:
    """Undoes `space_to_depth`."""
    return rearrange(x, "... h w (p q c) -> ... (h p) (w q) c", p=patch, q=patch)
