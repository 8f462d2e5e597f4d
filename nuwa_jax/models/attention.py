"""Attention, the one place where it is computed; many scores are never held all at once.

Large attention is computed by a kernel of the backend where there is one: on TPU splash attention
(and of attention over frames and feed-forward layers `over_time` and `fed_forward`, our own),
on NVIDIA GPUs that of cuDNN. Elsewhere it is computed for a chunk of queries at a time, and its
backward pass makes the scores of a chunk anew instead of keeping them. All are forms of
FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.extend import backend
from jaxtyping import Array, Bool, Float

from nuwa_jax.errors import UserError
from nuwa_jax.models import over_time, splash
from nuwa_jax.models.partition import BATCH_AXES, FRAME_AXIS, HEAD_AXIS, each_device, platform

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
OUTPUT = "attention"  # the name by which a remat policy may keep results of every form

# Up to this many scores per head, all are held at once.
DIRECT_SCORES = 2**18
# Else at most this many of one sample: 8 MB, which stay in a CPU's cache.
CHUNK_SCORES = 2**21


def dot_product_attention(
    query: Float[Array, "b lq heads d"],
    key: Float[Array, "b lk heads d"],
    value: Float[Array, "b lk heads d"],
    *,
    bias: Float[Array, "#b #heads #lq #lk"] | None = None,
    mask: Bool[Array, "#b #heads #lq #lk"] | None = None,
    length: int | None = None,
) -> Float[Array, "b lq heads d"]:
    """Softmax attention scaled by 1/sqrt(d), with the softmax in float32.

    `bias` is added to the scaled scores; where `mask` is False a key is not attended to. A query
    that may attend to no key attends to all alike. `length`, in place of a mask, is how many of the
    keys may be attended to, where `padding` was added.

    Few scores are left to XLA. Of many, the platform for which the program is lowered decides what
    computes them, be it another than that which traces it, unless `implementation` was told.
    """
    if length is None or length == key.shape[1]:
        return _attention(query, key, value, bias, mask, None)
    if mask is not None:
        raise ValueError("attention takes a mask or a length, not both: leave the length out")
    with jax.named_scope(padded_scope("keys", length, key.shape[1])):
        return _attention(query, key, value, bias, None, length)


def _attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    length: int | None,
) -> Array:
    if query.shape[1] * key.shape[1] <= DIRECT_SCORES:
        mask = mask if length is None else _first_keys(length, key)
        out = jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask)
        return checkpoint_name(out, OUTPUT)
    choice = _implementation.get()
    kernels = {}
    if bias is None and choice in ("auto", "splash") and splash.fits(query, key, mask):
        kernels["tpu"] = functools.partial(_splash, length=length)
    mask = mask if length is None else _first_keys(length, key)
    bias, mask = (
        None if x is None else jnp.broadcast_to(x, (len(query), *x.shape[1:])) for x in (bias, mask)
    )
    if bias is None and mask is None and choice in ("auto", "cudnn") and _fits_cudnn(query):
        kernels["cuda"] = _cudnn
    if not kernels:
        return _chunked(query, key, value, bias, mask)
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        mask,
        **kernels,
        default=lambda q, k, v, mask: _chunked(q, k, v, None, mask),
    )


def attention_over_time(
    query: Float[Array, "b t l c"],
    key: Float[Array, "b t l c"],
    value: Float[Array, "b t l c"],
    heads: int,
) -> Float[Array, "b t l c"]:
    """Attention over t at every l, as `dot_product_attention`; c holds one head after the other."""
    if on_tpu() and over_time.fits(query, heads):
        return checkpoint_name(kernel_over_time(query, key, value, heads), OUTPUT)
    q, k, v = (rearrange(x, "b t l (e d) -> (b l) t e d", e=heads) for x in (query, key, value))
    out = dot_product_attention(q, k, v)
    return rearrange(out, "(b l) t e d -> b t l (e d)", b=len(query))


def kernel_over_time(
    query: Float[Array, "b t l c"],
    key: Float[Array, "b t l c"],
    value: Float[Array, "b t l c"],
    heads: int,
    interpret: bool = False,
) -> Float[Array, "b t l c"]:
    """`over_time.attention_over_time` on every device for its clips, pixels and heads."""
    width = query.shape[-1] // heads

    def kernel(q: Array, k: Array, v: Array, mask: None) -> Array:
        del mask
        return over_time.attention_over_time(q, k, v, q.shape[-1] // width, interpret)

    b, _, l, _ = query.shape
    over = ((b, BATCH_AXES), (1, ()), (l, (FRAME_AXIS,)), (heads, (HEAD_AXIS,)))
    return each_device(kernel, query, key, value, over=over)


def padding(x: Float[Array, "b l c"], heads: int) -> int:
    """Zeros to append to `x` along l, of which queries, keys and values are made.

    A kernel that computes whole blocks would otherwise append them to each of the three, and cut
    them off the result and the three gradients.
    """
    head = jax.ShapeDtypeStruct((*x.shape[:2], heads, x.shape[-1] // heads), x.dtype)
    if not on_tpu() or x.shape[1] ** 2 <= DIRECT_SCORES or not splash.fits(head, head, None):
        return 0
    return splash.padding(x.shape[1])


def padded_scope(of: str, length: int, padded: int) -> str:
    """The `jax.named_scope` by which FLOPs are counted without what padding adds.

    "rows" is for all that is linear in the length, "keys", within, for what grows with its square.
    """
    return f"{of}_{length}_of_{padded}"


def on_tpu() -> bool:
    """Whether kernels for TPUs may be used: where a program is traced for one, but for "xla"."""
    return platform() == "tpu" and _implementation.get() in ("auto", "splash")


def _first_keys(length: int, key: Array) -> Bool[Array, "1 1 1 lk"]:
    return (jnp.arange(key.shape[1]) < length)[None, None, None]


_implementation = contextvars.ContextVar("implementation", default="auto")


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """What computes large attention in what is traced within: one of `IMPLEMENTATIONS`.

    With "xla" a TPU's other kernels are not used either (`on_tpu`).

    "auto" is the platform's kernel where it computes what is asked and else "xla", chunk by chunk.
    "splash" and "cudnn" are the same, but only on their own platform; no kernel adds a bias,
    and cuDNN's takes no mask.

    Raises:
      UserError: there is none of that name, or it is another platform's.
    """
    check_implementation(name)
    needed, given = PLATFORMS.get(name), platform()
    if needed not in (None, given):
        raise UserError(
            f"model.attention={name!r} needs a {needed.upper()}, this program is for "
            f"{given.upper()}: set model.attention to 'auto', which takes what there is"
        )
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def check_implementation(name: str) -> None:
    """Raises a UserError that names the implementations, where there is none of that name."""
    if name not in IMPLEMENTATIONS:
        raise UserError(f"model.attention must be one of {IMPLEMENTATIONS}, got {name!r}")


def _fits_cudnn(query: Array) -> bool:
    """Whether cuDNN, which must be present for a program to be traced, has a kernel for this.

    Heads may be wider (256) on GPUs newer than Ampere, which no network here has.
    """
    return (
        jax.default_backend() == "gpu"
        and "cuda" in backend.get_backend().platform_version
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[-1] <= 128
        and query.shape[-1] % 8 == 0
    )


def _splash(q: Array, k: Array, v: Array, mask: Array | None, *, length: int | None) -> Array:
    if length is not None:
        mask = None  # what it says, the length does
    kernel = functools.partial(splash.splash_attention, name=OUTPUT, length=length)
    return each_device(kernel, q, k, v, over=samples_and_heads(q), mask=mask)


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    def kernel(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    # Its own partitioning cannot be lowered where some axes of the mesh are manual.
    out = each_device(kernel, q, k, v, over=samples_and_heads(q), mask=mask)
    return checkpoint_name(out, OUTPUT)


def samples_and_heads(q: Array) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """How `[n l heads d]` may be spread: samples may be the frames of several clips."""
    return (len(q), (*BATCH_AXES, FRAME_AXIS)), (1, ()), (q.shape[2], (HEAD_AXIS,)), (1, ())


@jax.custom_vjp
def _chunked(
    query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None
) -> Array:
    return _each_sample(_forward, query, key, value, bias, mask)[0]


def _chunked_forward(*inputs: Array | None) -> tuple[Array, tuple]:
    out, statistics = checkpoint_name(_each_sample(_forward, *inputs), OUTPUT)
    return out, (inputs, out, statistics)


def _chunked_backward(saved: tuple, gradient: Array) -> tuple[Array | None, ...]:
    inputs, out, statistics = saved
    return *_each_sample(_backward, *inputs, out, statistics, gradient), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _each_sample(function: Callable, *args: Array | tuple | None) -> tuple:
    """`function` of every sample: one by one on a CPU, where its scores stay in the cache.

    Elsewhere of all together, as they may lie on different devices.
    """

    def one_by_one(*args: Array | tuple | None) -> tuple:
        return jax.lax.map(lambda sample: function(*sample), args)

    return jax.lax.platform_dependent(*args, cpu=one_by_one, default=jax.vmap(function))


# Below is one sample: q is [lq n d] for n heads, k and v are [lk n d]. Scores are laid out [n k q]:
# then no product reads a transposed left side, and the softmax reduces over rows, which XLA on CPU
# does better than along them. Bias and mask come in chunks of this layout, too.


def _forward(
    q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None
) -> tuple[Array, tuple]:
    """The output, and for the backward pass every query's highest score and sum of weights."""

    def one_chunk(xs: tuple) -> tuple[Array, tuple]:
        scores = _scores(k, *xs)
        highest = scores.max(1)
        weights = jnp.exp(scores - highest[:, None])
        total = weights.sum(1)
        out = _product("knd,nkq->ndq", v, weights.astype(v.dtype)) / total[:, None]
        return rearrange(out, "n d q -> q n d").astype(q.dtype), (highest, total)

    chunk = _chunk_size(q, k)
    chunks = _split(q, chunk), *(_split_pairs(x, len(q), chunk) for x in (bias, mask))
    out, statistics = jax.lax.map(one_chunk, chunks)
    return rearrange(out, "m q n d -> (m q) n d")[: len(q)], statistics


def _backward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    out: Array,
    statistics: tuple,
    gradient: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients to q, k, v and bias."""
    scale = q.shape[-1] ** -0.5
    # What the softmax takes from the gradient to every weight of a query: they sum to one.
    common = jnp.einsum("qnd,qnd->nq", out, gradient, preferred_element_type=_wide(q))

    def one_chunk(sums: tuple, xs: tuple) -> tuple[tuple, tuple]:
        q, gradient, common, (highest, total), bias, mask = xs
        # Divided by their total is the gradient, which is smaller, and not the weights.
        with jax.named_scope("rematted_computation"):  # as jax.checkpoint marks its own
            weights = jnp.exp(_scores(k, q, bias, mask) - highest[:, None])
        gradient = (gradient / rearrange(total, "n q -> q n 1")).astype(v.dtype)
        common = (common / total)[:, None]
        to_v = _product("nkq,qnd->knd", weights.astype(v.dtype), gradient)
        to_scores = weights * (_product("knd,qnd->nkq", v, gradient) - common)
        if mask is not None:
            to_scores = jnp.where(mask, to_scores, 0)
        to_bias = None
        if bias is not None:
            shared = [axis for axis in range(3) if bias.shape[axis] == 1]
            to_bias = to_scores.sum(shared, keepdims=True)
        to_scores = to_scores.astype(q.dtype)
        to_k = _product("nkq,qnd->knd", to_scores, q)
        to_q = rearrange(_product("knd,nkq->ndq", k, to_scores), "n d q -> q n d") * scale
        return (sums[0] + to_k, sums[1] + to_v), (to_q.astype(q.dtype), to_bias)

    chunk = _chunk_size(q, k)
    chunks = (
        _split(q, chunk),
        _split(gradient, chunk),
        rearrange(_split(common.T, chunk), "m q n -> m n q"),
        statistics,
        *(_split_pairs(x, len(q), chunk) for x in (bias, mask)),
    )
    zeros = jnp.zeros(k.shape, _wide(k))
    (to_k, to_v), (to_q, to_bias) = jax.lax.scan(one_chunk, (zeros, zeros), chunks)
    to_q = rearrange(to_q, "m q n d -> (m q) n d")[: len(q)]
    if bias is not None:
        to_bias = to_bias.sum(0, keepdims=True) if bias.shape[1] == 1 else to_bias
        to_bias = rearrange(to_bias, "m n k q -> n (m q) k")[:, : len(q)].astype(bias.dtype)
    return to_q, (to_k * scale).astype(k.dtype), to_v.astype(v.dtype), to_bias


def _scores(k: Array, q: Array, bias: Array | None, mask: Array | None) -> Array:
    """What the softmax is taken of, `[n k q]`."""
    scores = _product("knd,qnd->nkq", k, q) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        # Finite, as in jax.nn: a query without any key has equal weights, not NaN.
        scores = jnp.where(mask, scores, -0.7 * jnp.finfo(jnp.float32).max)
    return scores


def _product(pattern: str, a: Array, b: Array) -> Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=_wide(a))


def _wide(x: Array) -> jnp.dtype:
    """float32, or float64 where `x` is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _chunk_size(q: Array, k: Array) -> int:
    """Queries per chunk; as many in the last one as in the others, or a few less."""
    chunks = -(-q.shape[0] * q.shape[1] * k.shape[0] // CHUNK_SCORES)
    return -(-len(q) // chunks)


def _split(x: Array, chunk: int) -> Array:
    """`[lq ...]` to `[m chunk ...]`, with zeros at the end of the last."""
    missing = -len(x) % chunk
    x = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(-1, chunk, *x.shape[1:])


def _split_pairs(x: Array | None, lq: int, chunk: int) -> Array | None:
    """`[n lq lk]`, where each axis may be 1, to `[m n lk chunk]`, where those still are."""
    if x is None:
        return None
    if x.shape[1] == 1:
        x = jnp.swapaxes(x, 1, 2)[None]
        return jnp.broadcast_to(x, (-(-lq // chunk), *x.shape[1:]))
    return rearrange(_split(jnp.swapaxes(x, 0, 1), chunk), "m q n k -> m n k q")
