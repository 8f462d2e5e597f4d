"""GMFlow (Xu et al., CVPR 2022, arXiv 2111.13680): optical flow as matching of features.

The variant with one refinement, which the published `scale2` weights fit: a convolutional backbone
at 1/4 of the size and the same features at 1/8; a transformer that makes the features of two
pictures know of each other; all-to-all matching at 1/8, matching within a window at 1/4 of what the
first left over; at either size the flow is spread to where matching fails by self-attention.

The matrix of all-to-all matching has (h w / 64)^2 entries per pair, 33 MB at 320 x 576 and 870 MB
at 720 x 1280. It is attention with positions for values, and goes through the one attention that
never holds many scores at once. The window's scores take 81 numbers per position at 1/4, 3.7 MB.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from nuwa_jax.models.attention import dot_product_attention
from nuwa_jax.models.layers import layer_norm
from nuwa_jax.models.products import Dense

# Of ImageNet, for pictures in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MULTIPLE = 32  # of both sides: 8 windows of features at 1/4, 2 at 1/8
UPSAMPLING = 4  # from the finer features to pixels
# Of files of our parameters, in their metadata beside the config.
FORMAT = "nuwa_jax gmflow 1"
CONV = nn.initializers.he_normal()


@dataclasses.dataclass(frozen=True)
class GMFlowConfig:
    """Sizes; the defaults are the published ones.

    Attributes:
      stem: channels of the backbone at 1/2, 1/4 and 1/4 of the size.
      width: of the features that are matched.
      layers: of the transformer; every other one shifts its windows by half of one (Swin).
      mlp_ratio: hidden width of the transformer's MLPs, over 2 * width.
      upsampler_width: hidden width of what weighs the neighbours in upsampling.
      splits: windows along either side that attention is limited to, at 1/8 and at 1/4.
      radius: of the window that is searched at 1/4, in positions.
    """

    stem: tuple[int, int, int] = (64, 96, 128)
    width: int = 128
    layers: int = 6
    mlp_ratio: int = 4
    upsampler_width: int = 256
    splits: tuple[int, int] = (2, 8)
    radius: int = 4


class GMFlow(nn.Module):
    """Flow between pictures, in float32: positions as large as these do not survive bfloat16."""

    config: GMFlowConfig = GMFlowConfig()

    def setup(self) -> None:
        config = self.config
        self.backbone = _Backbone(config.stem, config.width)
        self.transformer = _Transformer(config.layers, config.mlp_ratio)
        self.propagation = _Propagation()
        self.upsampler = _Upsampler(config.upsampler_width)

    def __call__(
        self,
        before: Float[Array, "b h w 3"],
        after: Float[Array, "b h w 3"],
        bidirectional: bool = False,
    ) -> Float[Array, "n h w 2"]:
        """Flow of pairs of pictures in [0, 1], of any size, in pixels.

        Returns:
          The displacement from `before` to `after` at positions of `before`. If `bidirectional`,
          n is 2 b and the second half is from `after` to `before`; all at 1/8 is shared.
        """
        size = before.shape[1:3]
        with jax.default_matmul_precision("float32"):
            both = self._features(jnp.concatenate([before, after]))
            return self._flow(*jnp.split(both, 2), size, bidirectional)

    def clip(
        self, video: Float[Array, "t h w 3"], bidirectional: bool = False
    ) -> Float[Array, "n h w 2"]:
        """`__call__` of all neighbours among the frames, whose features are made once for each."""
        with jax.default_matmul_precision("float32"):
            features = self._features(video)
            return self._flow(features[:-1], features[1:], video.shape[1:3], bidirectional)

    def _features(self, pictures: Float[Array, "n h w 3"]) -> Float[Array, "n h4 w4 c"]:
        x = (pictures - jnp.array(MEAN)) / jnp.array(DEVIATION)
        missing = [(0, -side % MULTIPLE) for side in pictures.shape[1:3]]
        return self.backbone(jnp.pad(x, ((0, 0), *missing, (0, 0)), mode="edge"))

    def _flow(
        self,
        first: Float[Array, "b h4 w4 c"],
        second: Float[Array, "b h4 w4 c"],
        size: tuple[int, int],
        bidirectional: bool,
    ) -> Float[Array, "n h w 2"]:
        config = self.config
        # A convolution with stride 2 is every other value of the same one with stride 1.
        coarse = self.transformer(first[:, ::2, ::2], second[:, ::2, ::2], config.splits[0])
        if bidirectional:
            coarse = jnp.concatenate([coarse[0], coarse[1]]), jnp.concatenate(coarse[::-1])
            first, second = jnp.concatenate([first, second]), jnp.concatenate([second, first])
        flow = self.propagation.everywhere(coarse[0], match_everywhere(*coarse))
        flow = 2 * upsample_aligned(flow)
        fine = self.transformer(first, warp_zero(second, flow), config.splits[1])
        flow = flow + match_nearby(*fine, config.radius)
        flow = self.propagation.nearby(fine[0], flow)
        return self.upsampler(fine[0], flow)[:, : size[0], : size[1]]


# What is computed without weights.


def match_everywhere(
    first: Float[Array, "b h w c"], second: Float[Array, "b h w c"]
) -> Float[Array, "b h w 2"]:
    """Flow to the mean position in `second`, weighed by the softmax of the correlation."""
    grid = _positions(*first.shape[1:3])
    values = jnp.broadcast_to(grid, (len(first), *grid.shape))
    return _attend_to(first, second, values) - grid


def match_nearby(
    first: Float[Array, "b h w c"], second: Float[Array, "b h w c"], radius: int
) -> Float[Array, "b h w 2"]:
    """The same among positions of `second` that are within `radius` along either axis."""
    height, width, channels = first.shape[1:]
    side = 2 * radius + 1
    padded = jnp.pad(second, ((0, 0), (radius, radius), (radius, radius), (0, 0)))

    def correlate(row: Array) -> Float[Array, "b h w side"]:
        rows = jax.lax.dynamic_slice_in_dim(padded, row, height, axis=1)
        columns = [(first * rows[:, :, x : x + width]).sum(-1) for x in range(side)]
        return jnp.stack(columns, axis=-1)

    scores = jax.lax.map(correlate, jnp.arange(side)) * channels**-0.5
    scores = rearrange(scores, "dy b h w dx -> b h w (dy dx)")
    offsets = _positions(side, side).reshape(-1, 2) - radius
    target = _positions(height, width)[:, :, None] + offsets
    within = ((target >= 0) & (target < np.array([width, height]))).all(-1)
    return nn.softmax(jnp.where(within, scores, -1e9)) @ offsets


def warp_zero(
    image: Float[Array, "b h w c"], flow: Float[Array, "b h w 2"]
) -> Float[Array, "b h w c"]:
    """out(x) = image(x + flow(x)), bilinear; beyond the border the image is 0."""
    height, width = image.shape[1:3]
    place = flow + _positions(height, width)
    corner = jnp.floor(place)
    share = place - corner
    corner = corner.astype(int)
    out = jnp.zeros(image.shape)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            weight = jnp.abs(1 - dx - share[..., 0]) * jnp.abs(1 - dy - share[..., 1])
            weight *= (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
            flat = rearrange(image, "b h w c -> b (h w) c")
            values = jnp.take_along_axis(flat, rearrange(index, "b h w -> b (h w) 1"), axis=1)
            out += weight[..., None] * values.reshape(image.shape)
    return out


def upsample_aligned(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Twice the size, bilinear, corners onto corners (PyTorch's `align_corners=True`)."""
    rows, columns = (_interpolation(side) for side in x.shape[1:3])
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x)


def split_windows(x: Float[Array, "b h w c"], splits: int) -> Float[Array, "b l n c"]:
    """`splits`^2 windows n of l positions each."""
    return rearrange(x, "b (i h) (j w) c -> b (h w) (i j) c", i=splits, j=splits)


def merge_windows(
    x: Float[Array, "b l n c"], splits: int, size: tuple[int, int]
) -> Float[Array, "b h w c"]:
    """Undoes `split_windows`."""
    h = size[0] // splits
    return rearrange(x, "b (h w) (i j) c -> b (i h) (j w) c", h=h, i=splits)


def window_positions(height: int, width: int, channels: int) -> Float[np.ndarray, "h w c"]:
    """Sines and cosines of the place in a window, first of y, then of x (DETR, normalised)."""
    count = channels // 2
    frequency = 10000.0 ** (-2 * (np.arange(count) // 2) / count)

    def encode(side: int) -> Float[np.ndarray, "side half"]:
        angle = 2 * np.pi * np.arange(1, side + 1)[:, None] / (side + 1e-6) * frequency
        return np.where(np.arange(count) % 2, np.cos(angle), np.sin(angle))

    y = np.broadcast_to(encode(height)[:, None], (height, width, count))
    x = np.broadcast_to(encode(width), (height, width, count))
    return np.concatenate([y, x], axis=-1).astype(np.float32)


def shifted_window_bias(size: tuple[int, int], splits: int) -> Float[np.ndarray, "1 n l l"]:
    """-100 between positions of a window that only the shift has brought together (Swin)."""

    def parts(side: int) -> np.ndarray:
        window = side // splits
        part = np.zeros(side, int)
        if window // 2:  # a window of one position is not shifted
            part[-window:] = 1
            part[-(window // 2) :] = 2
        return part

    part = parts(size[0])[:, None] * 3 + parts(size[1])
    part = rearrange(part, "(i h) (j w) -> (i j) (h w)", i=splits, j=splits)
    return np.where(part[:, :, None] == part[:, None], 0, -100)[None].astype(np.float32)


# Modules.


class _InstanceNorm(nn.Module):
    """Mean 0 and variance 1 of every channel of a picture."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        centred = x - x.mean((1, 2), keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2), keepdims=True) + 1e-5)


def _conv(features: int, kernel: int, *, name: str, stride: int = 1, bias: bool = False) -> nn.Conv:
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=kernel // 2,
        use_bias=bias,
        kernel_init=CONV,
        name=name,
    )


class _ResBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        out = _conv(self.features, 3, stride=self.stride, name="conv1")(x)
        out = _conv(self.features, 3, name="conv2")(nn.relu(_InstanceNorm()(out)))
        if out.shape != x.shape:
            x = _conv(self.features, 1, stride=self.stride, bias=True, name="shortcut")(x)
            x = _InstanceNorm()(x)
        return nn.relu(x + nn.relu(_InstanceNorm()(out)))


class _Backbone(nn.Module):
    """Features at 1/4 of the size."""

    stem: tuple[int, int, int]
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n h4 w4 c"]:
        x = nn.relu(_InstanceNorm()(_conv(self.stem[0], 7, stride=2, name="conv_in")(x)))
        for level, (features, stride) in enumerate(zip(self.stem, (1, 2, 1), strict=True)):
            x = _ResBlock(features, stride, name=f"res_{level}_0")(x)
            x = _ResBlock(features, 1, name=f"res_{level}_1")(x)
        x = _conv(self.width, 1, bias=True, name="conv_out")(x)
        return _conv(self.width, 3, name="scales")(x)


class _Transformer(nn.Module):
    """Alternately attends within a picture and to the other, in windows; both pictures at once."""

    layers: int
    mlp_ratio: int

    @nn.compact
    def __call__(
        self, first: Float[Array, "b h w c"], second: Float[Array, "b h w c"], splits: int
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        height, width, channels = first.shape[1:]
        place = window_positions(height // splits, width // splits, channels)
        x = jnp.concatenate([first, second]) + jnp.tile(place, (splits, splits, 1))
        bias = shifted_window_bias((height, width), splits)
        for i in range(self.layers):
            window = splits, bias if i % 2 else None
            other = jnp.roll(x, len(first), axis=0)
            x = _Attention(name=f"self_{i}")(x, x, window)
            x = _Attention(self.mlp_ratio, name=f"cross_{i}")(x, other, window)
        first, second = jnp.split(x, 2)
        return first, second


class _Attention(nn.Module):
    """One head of attention, added to its source; with an MLP on both if it has a ratio."""

    mlp_ratio: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        target: Float[Array, "b h w c"],
        window: tuple[int, Float[np.ndarray, "1 n l l"] | None],
    ) -> Float[Array, "b h w c"]:
        splits, bias = window
        size, channels = x.shape[1:3], x.shape[-1]
        shift = tuple(0 if bias is None else side // splits // 2 for side in size)

        def project(inputs: Array, name: str) -> Array:
            out = Dense(channels, use_bias=False, name=name)(inputs)
            return split_windows(jnp.roll(out, [-s for s in shift], (1, 2)), splits)

        # Windows stand where heads do elsewhere, and have a bias each.
        message = dot_product_attention(
            project(x, "to_q"), project(target, "to_k"), project(target, "to_v"), bias=bias
        )
        message = jnp.roll(merge_windows(message, splits, size), shift, (1, 2))
        message = Dense(channels, use_bias=False, name="to_out")(message)
        message = layer_norm("norm1", jnp.float32)(message)
        if self.mlp_ratio:
            hidden = jnp.concatenate([x, message], axis=-1)
            hidden = Dense(2 * channels * self.mlp_ratio, use_bias=False, name="mlp_1")(hidden)
            hidden = nn.gelu(hidden, approximate=False)
            message = Dense(channels, use_bias=False, name="mlp_2")(hidden)
            message = layer_norm("norm2", jnp.float32)(message)
        return x + message


class _Propagation(nn.Module):
    """Flow as the mean of flow elsewhere, weighed by how alike the features are there."""

    @nn.compact
    def _project(self, features: Array, chained: bool) -> tuple[Array, Array]:
        query = Dense(features.shape[-1], name="to_q")(features)
        key = Dense(features.shape[-1], name="to_k")(query if chained else features)
        return query, key

    def everywhere(
        self, features: Float[Array, "b h w c"], flow: Float[Array, "b h w 2"]
    ) -> Float[Array, "b h w 2"]:
        """From the whole picture; keys are made of queries here, as the weights were trained."""
        return _attend_to(*self._project(features, chained=True), flow)

    def nearby(
        self, features: Float[Array, "b h w c"], flow: Float[Array, "b h w 2"]
    ) -> Float[Array, "b h w 2"]:
        """From the 3 x 3 neighbours; beyond the border there is a key of 0 with no flow."""
        query, key = self._project(features, chained=False)
        scores = (query[..., None, :] * _neighbours(key)).sum(-1) * query.shape[-1] ** -0.5
        return jnp.einsum("bhwn,bhwnk->bhwk", nn.softmax(scores), _neighbours(flow))


class _Upsampler(nn.Module):
    """Every pixel's flow as a convex combination of its 3 x 3 neighbours' (RAFT)."""

    hidden: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "b h w c"], flow: Float[Array, "b h w 2"]
    ) -> Float[Array, "b h4 w4 2"]:
        x = jnp.concatenate([flow, features], axis=-1)
        x = nn.relu(_conv(self.hidden, 3, bias=True, name="conv")(x))
        weights = Dense(9 * UPSAMPLING**2, name="weights")(x)
        weights = rearrange(weights, "b h w (n p) -> b h w n p", n=9)
        fine = jnp.einsum(
            "bhwnp,bhwnk->bhwpk", nn.softmax(weights, axis=3), _neighbours(UPSAMPLING * flow)
        )
        return rearrange(fine, "b h w (y x) k -> b (h y) (w x) k", y=UPSAMPLING)


def _attend_to(query: Array, key: Array, values: Array) -> Float[Array, "b h w 2"]:
    """Attention of all positions to all, with two channels of values."""
    height = query.shape[1]
    # Attention wants values as wide as keys.
    missing = key.shape[-1] - values.shape[-1]
    values = jnp.pad(values.astype(key.dtype), ((0, 0), (0, 0), (0, 0), (0, missing)))
    flat = (rearrange(x, "b h w c -> b (h w) 1 c") for x in (query, key, values))
    out = dot_product_attention(*flat)[..., 0, :2]
    return rearrange(out, "b (h w) k -> b h w k", h=height)


def _neighbours(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 9 c"]:
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return jnp.stack(shifted, axis=3)


def _positions(height: int, width: int) -> Float[np.ndarray, "h w 2"]:
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)


def _interpolation(side: int) -> Float[np.ndarray, "twice side"]:
    place = np.linspace(0, side - 1, 2 * side)[:, None]
    return np.maximum(0, 1 - np.abs(place - np.arange(side))).astype(np.float32)
