"""Compiles each block of the U-Net for a TPU, and says what the compiler thinks it takes.

    JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1.0 python -m benchmarks.blocks [--chip=v5e] [--remat=block]

One clip of `--frames` frames on one chip, bfloat16 with float32 parameters, forward and backward.
Compiling a whole step takes a quarter of an hour (`nuwa_jax.parallel.aot`), a block 15 seconds:
what a change of a layer does can be tried here. No TPU is needed, only its compiler (extra `tpu`).
Times are the compiler's estimates, without what splash attention takes, and with what our own
kernels say that they read, write and multiply; arithmetic is its count at the chip's peak, with
what is computed anew. Not among them: layers between the blocks, drags and flow, the optimizer, and
all that is sent between chips.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from nuwa_jax.errors import UserError, run_main
from nuwa_jax.models.remat import POLICIES, rematerialized
from nuwa_jax.models.unet import Stream, UNetConfig, VideoResBlock, VideoTransformer
from nuwa_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from nuwa_jax.parallel.topology import Topology, prepare_environment

CONTEXT, DTYPE = 1024, jnp.bfloat16  # channels of the one context token (SVD)

_CHIP = flags.DEFINE_enum("chip", "v5e", ["v4", "v5e", "v5p", "v6e"], "For which TPU.")
_REMAT = flags.DEFINE_enum("remat", "branches", POLICIES[:-1], "What a block keeps.")
_FRAMES = flags.DEFINE_integer("frames", 14, "Frames.", lower_bound=1)
_HEIGHT = flags.DEFINE_integer("height", 40, "Rows of the latents; divisible by 8.", lower_bound=8)
_WIDTH = flags.DEFINE_integer("width", 72, "Columns of the latents; divisible by 8.", lower_bound=8)
_CHANNELS = flags.DEFINE_integer("channels", 320, "Channels of the first level.", lower_bound=64)
_ONLY = flags.DEFINE_list("only", [], "Kinds of blocks and levels, as res0 or transformer1; all.")


class Kind(NamedTuple):
    """Blocks that are compiled alike."""

    name: str  # "res" or "transformer"
    inputs: int
    features: int
    level: int


class Block(nn.Module):
    """One block of the U-Net, with the parameters in the step's precision."""

    kind: Kind
    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, context: jax.Array) -> jax.Array:
        config, features = self.config, self.kind.features
        stream = Stream(emb, context, None, None, None)
        if self.kind.name == "res":
            block = rematerialized(VideoResBlock, config.remat)
            return block(features, "none", DTYPE, name="block")(x, stream, None)
        block = rematerialized(VideoTransformer, config.remat)
        heads = features // config.head_channels
        return block(heads, config.ff_multiplier, True, DTYPE, name="block")(x, stream)


def blocks(config: UNetConfig) -> Iterator[Kind]:
    """All that the U-Net is made of, in its order."""
    levels = len(config.channel_mult)
    features = config.model_channels
    skips = [features]

    def block(inputs: int, level: int, attend: bool) -> Iterator[Kind]:
        yield Kind("res", inputs, config.channels(level), level)
        if attend:
            yield Kind("transformer", config.channels(level), config.channels(level), level)

    for level in range(levels):
        for _ in range(config.num_res_blocks):
            yield from block(features, level, config.has_attention(level))
            features = config.channels(level)
            skips.append(features)
        if level < levels - 1:
            skips.append(features)
    yield from block(features, levels - 1, True)
    yield from block(features, levels - 1, False)
    for level in reversed(range(levels)):
        for _ in range(config.num_res_blocks + 1):
            yield from block(features + skips.pop(), level, config.has_attention(level))
            features = config.channels(level)


def compiled(kind: Kind, config: UNetConfig, topology: Topology) -> jax.stages.Compiled:
    """The block's value and its gradients to input, embedding and parameters."""
    mesh = make_mesh(MeshConfig(data=1), topology.devices()[:1])
    net = Block(kind, config)
    t, h, w = _FRAMES.value, _HEIGHT.value >> kind.level, _WIDTH.value >> kind.level
    where = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: jnp.dtype = DTYPE) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    emb = array(1, t, 4 * config.model_channels, dtype=jnp.float32)
    x, context = array(1, t, h, w, kind.inputs), array(1, 1, CONTEXT)
    params = jax.eval_shape(net.init, jax.random.key(0), x, emb, context)
    params = jax.tree.map(lambda a: array(*a.shape, dtype=a.dtype), params)

    def run(params: dict, x: jax.Array, emb: jax.Array, context: jax.Array) -> jax.Array:
        halved = jax.tree.map(lambda a: a.astype(DTYPE) if a.ndim > 1 else a, params)
        return net.apply(halved, x, emb, context)

    def step(change: jax.Array, context: jax.Array, *varied: Any) -> tuple[jax.Array, Any]:
        out, back = jax.vjp(lambda *varied: run(*varied, context), *varied)
        return out, back(change)

    with use_mesh(mesh):
        traced = jax.jit(step).trace(array(1, t, h, w, kind.features), context, params, x, emb)
        lowered = traced.lower(lowering_platforms=("tpu",))
    return lowered.compile(compiler_options=topology.chip.compiler_options)


def main(argv: Sequence[str]) -> None:
    """A line for each kind of block, and the sum over all blocks."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    if _HEIGHT.value % 8 or _WIDTH.value % 8 or _CHANNELS.value % 64:
        raise UserError(
            f"--height and --width must be divisible by 8, --channels by 64, got {_HEIGHT.value}, "
            f"{_WIDTH.value} and {_CHANNELS.value}: change them"
        )
    prepare_environment()
    config = UNetConfig(model_channels=_CHANNELS.value, remat=_REMAT.value)
    topology = Topology.parse(f"{_CHIP.value}:{'2x2x1' if _CHIP.value in ('v4', 'v5p') else '2x2'}")
    counts = Counter(blocks(config))
    known = {f"{kind.name}{kind.level}" for kind in counts}
    if not set(_ONLY.value) <= known:
        raise UserError(f"--only takes names among {sorted(known)}, got {_ONLY.value}")
    print(f"{'block':28s}  times  arithmetic  estimate  ratio   traffic", flush=True)
    total = [0.0, 0.0]
    for kind, count in sorted(counts.items(), key=lambda item: (item[0].level, item[0])):
        if _ONLY.value and f"{kind.name}{kind.level}" not in _ONLY.value:
            continue
        cost = compiled(kind, config, topology).cost_analysis()
        arithmetic = cost["flops"] / topology.chip.flops
        estimate = cost["optimal_seconds"]
        total = [total[0] + count * arithmetic, total[1] + count * estimate]
        name = f"{kind.name} {kind.inputs}>{kind.features}, level {kind.level}"
        print(
            f"{name:28s} {count:6d} {1e3 * arithmetic:8.2f} ms {1e3 * estimate:6.2f} ms "
            f"{estimate / arithmetic:6.2f} {cost['bytes accessed'] / 1e9:6.2f} GB",
            flush=True,
        )
    print(
        f"{'all of them':28s} {'':6s} {1e3 * total[0]:8.1f} ms {1e3 * total[1]:6.1f} ms "
        f"{total[1] / total[0]:6.2f}",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
