"""Tells, as JSON, which collectives a program has that was compiled for many devices.

python fsdp_run.py step     a training step of a stand-in for the model, 8 virtual CPU devices
python fsdp_run.py phases   gathers in one phase and in two: their values and gradients
python fsdp_run.py tpu      gathers and their gradients on 64 chips of a TPU, of which none is there
"""

import json
import math
import os
import re
import sys
from pathlib import Path

# The least effort: else one gather is written many times, as the steps of what overlaps with it.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0",
)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "training")]

import fake_model  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from micro_config import get_config  # noqa: E402

from nuwa_jax.data.batch import Batch  # noqa: E402
from nuwa_jax.parallel import fsdp, sharding  # noqa: E402
from nuwa_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, use_mesh  # noqa: E402
from nuwa_jax.training.curriculum import stages_from_config  # noqa: E402
from nuwa_jax.training.optim import make_optimizer  # noqa: E402
from nuwa_jax.training.state import init_state  # noqa: E402
from nuwa_jax.training.step import make_train_step  # noqa: E402


def collectives(text):
    """`[kind, values in each array, whether it is a part of a reduce-scatter]` of a program."""
    found, fused, seen = [], False, set()
    for line in text.splitlines():
        if line.endswith("{"):
            fused = line.startswith("%all-reduce-scatter")
        match = re.search(r" = (.*?) (all-gather|all-reduce|reduce-scatter)(-start)?\(", line)
        # An asynchronous one is written several times, under one name.
        name = re.search(r'async_collective_name="([^"]*)"', line)
        if match and (name is None or name[1] not in seen):
            seen |= {name[1]} if name else set()
            shapes = re.findall(r"\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", match[1]))
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            found.append([match[2], sizes, fused])
    return found


def step():
    sharding.MIN_SIZE = 1
    config = get_config()
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    model = fake_model.FakeModel()
    stage = next(s for s in stages_from_config(config) if s.name == "drag")
    params = model.init(jax.random.key(0), height=16, width=24, frames=3)
    state = sharding.place(init_state(params, stage, make_optimizer(config.train)), mesh)
    batch = Batch(
        video=np.zeros((8, 3, 16, 24, 3), np.uint8),
        flow=np.zeros((8, 3, 16, 24, 2), np.float16),
        points=np.zeros((8, 2, 3, 2), np.float32),
        state=np.ones((8, 2, 3), np.uint8),
        text=np.zeros((8, 8), np.int32),
        fps=np.full(8, 8.0, np.float32),
    )
    batch = jax.device_put(batch, batch_sharding(mesh))
    made = make_train_step(model, config, stage, mesh)
    traced = made.trace(state, batch, jnp.float32(0), jnp.float32(0))
    with use_mesh(mesh):
        text = traced.lower().compile().as_text()
    return {
        "collectives": collectives(text),
        "trained": [leaf.size for leaf in jax.tree.leaves(state.params)],
    }


def phases():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    rows = tuple(tuple(range(start, start + 4)) for start in (0, 4))
    columns = tuple((start, start + 4) for start in range(4))
    rng = np.random.default_rng(0)
    out = []
    for shape, dimension in (((3, 16, 24), 1), ((256, 128), 0), ((64, 2048), 1)):
        whole = jnp.asarray(rng.normal(size=shape), jnp.float32)
        weights = jnp.asarray(rng.normal(size=(8, *shape)), jnp.float32)
        split = PartitionSpec(*[None] * dimension, "fsdp")
        for rings in ((None,), (rows, columns)):
            how = fsdp.Exchange(jnp.dtype("float32"), jnp.dtype("float32"), rings)

            def each(shard, weight, how=how, dimension=dimension):
                def of(shard):
                    gathered = fsdp.gather(shard, dimension, how)
                    return jnp.sum(gathered * weight[0]), gathered

                gradient, gathered = jax.grad(of, has_aux=True)(shard)
                return gathered, gradient

            run = jax.shard_map(
                each,
                mesh=mesh,
                in_specs=(split, PartitionSpec("fsdp")),
                out_specs=(PartitionSpec(), split),
                check_vma=False,
            )
            gathered, gradient = jax.jit(run)(whole, weights)
            same = np.array_equal(gathered, whole)
            error = np.abs(np.asarray(gradient) - np.asarray(weights.sum(0))).max()
            out.append([bool(same), float(error)])
    return out


def tpu():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8").devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=64), devices)
    how = fsdp.Exchange(jnp.bfloat16, jnp.dtype("float32"), fsdp.rings(mesh))
    shapes = [(1280, 5120), (5120, 1280), (3, 1280, 1280)]
    specs = [PartitionSpec(*[None] * (len(s) - 2), *p) for s, p in zip(
        shapes, [(None, "fsdp"), ("fsdp",), (None, "fsdp")], strict=True
    )]  # fmt: skip

    def each(shards, inputs):
        def loss(shards):
            total = 0.0
            for shard, spec, x in zip(shards, specs, inputs, strict=True):
                out = x @ fsdp.gather(shard, spec.index("fsdp"), how)
                total += jnp.sum(jnp.square(out.astype(jnp.float32)))
            return total

        return jax.grad(loss)(shards)

    def argument(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    over = PartitionSpec("fsdp")
    inputs = [(64 * 128, s[-2]) if len(s) == 2 else (64 * 3, 128, s[-2]) for s in shapes]
    over_samples = [argument(shape, jnp.bfloat16, over) for shape in inputs]
    run = jax.shard_map(
        each, mesh=mesh, in_specs=(specs, [over] * 3), out_specs=specs, check_vma=False
    )
    parameters = [
        argument(*each, s)
        for each, s in zip([(s, jnp.float32) for s in shapes], specs, strict=True)
    ]
    text = jax.jit(run).lower(parameters, over_samples).compile().as_text()
    return {
        "collectives": collectives(text),
        "trained": [math.prod(s) for s in shapes],
        "phases": len(how.rings),
    }


if __name__ == "__main__":
    print(json.dumps({"step": step, "phases": phases, "tpu": tpu}[sys.argv[1]]()))
