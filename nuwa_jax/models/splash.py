"""Attention by jax's TPU kernel, which holds no scores outside the core (splash attention).

The kernel wants lengths in whole blocks: queries and keys are padded with zeros, and segment ids
keep every query from the keys that were added, so that the result is that of the lengths given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Bool, Float

# Lengths of blocks: multiples of the 128 lanes. In 512 x 512 float32 scores fit the core's memory
# with room for what is being fetched; the compiler accepts them for heads up to 512 wide.
BLOCKS = (512, 384, 256)
# Fewer keys fill less than half a block: then XLA's attention does less.
MIN_KEYS = 256
MAX_WIDTH = 512


def fits(query: Array, key: Array, mask: Array | None) -> bool:
    """Whether the kernel computes this: floats of 16 or 32 bits, enough keys, a mask of keys."""
    return (
        query.dtype in (jnp.bfloat16, jnp.float32)
        and query.shape[-1] <= MAX_WIDTH
        and key.shape[1] >= MIN_KEYS
        and (mask is None or mask.shape[1:3] == (1, 1))
    )


def splash_attention(
    query: Float[Array, "b lq heads d"],
    key: Float[Array, "b lk heads d"],
    value: Float[Array, "b lk heads d"],
    mask: Bool[Array, "b 1 1 lk"] | None = None,
    *,
    length: int | None = None,
    name: str | None = None,
    interpret: bool = False,
) -> Float[Array, "b lq heads d"]:
    """`nuwa_jax.models.attention.dot_product_attention` on one TPU, its backward pass fused, too.

    Args:
      query: any number of them.
      key: as many as `value`.
      value: what is averaged.
      mask: True where a key may be attended to; where none may, all are, alike.
      length: without a mask, how many of the keys may be; the rest are of `padding`.
      name: by which a remat policy may keep what the backward pass needs of the kernel's results.
      interpret: run the kernel step by step on any backend, for tests.
    """
    lq, lk, heads = query.shape[1], key.shape[1], query.shape[2]
    block_q, block_k = _block(lq), _block(lk)
    if mask is not None:
        mask = mask[:, 0, 0]
        some = mask.any(-1)
        # All scores of a query of zeros are alike, and no gradient passes to it or to the keys.
        query = jnp.where(some[:, None, None, None], query, 0)
        mask = mask | ~some[:, None]
    # Of merged heads, and held there: else the gradient is scaled in the kernel's layout, by a pass
    # over padded heads, before it is turned.
    merged = query.reshape(*query.shape[:2], -1)
    merged = jax.lax.optimization_barrier(
        merged * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    )
    query = merged.reshape(query.shape)
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))), 1, 2)
        for x, block in ((query, block_q), (key, block_k), (value, block_k))
    )
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            # Two kernels for the backward pass: the fused one writes a gradient to the queries for
            # every block of keys, in their own precision, to be summed afterwards.
            block_q_dq=block_q,
            block_kv_dq=block_k,
            # Of a head's channels there are half as many as lanes, of queries and keys enough.
            q_layout=kernel.QKVLayout.SEQ_MINOR,
            k_layout=kernel.QKVLayout.SEQ_MINOR,
            v_layout=kernel.QKVLayout.SEQ_MINOR,
        ),
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    segments, axes = None, None
    if mask is not None or k.shape[2] != (length or lk):
        real = jnp.arange(lk) < (length or lk) if mask is None else mask
        missing = k.shape[2] - lk
        real = jnp.pad(real, [*[(0, 0)] * (real.ndim - 1), (0, missing)]).astype(jnp.int32)
        segments = kernel.SegmentIds(jnp.ones((q.shape[2],), jnp.int32), real)
        axes = kernel.SegmentIds(None, None if mask is None else 0)
    out = jax.vmap(attend, (0, 0, 0, axes))(q, k, v, segments)
    return jnp.swapaxes(out[:, :, :lq], 1, 2)


def padding(length: int) -> int:
    """Zeros that the kernel adds to so many queries or keys."""
    return -length % _block(length)


def _block(length: int) -> int:
    """The length of blocks that adds least to `length`; of those that add the same, the longest."""
    return min(BLOCKS, key=lambda block: (-length % block, -block))
