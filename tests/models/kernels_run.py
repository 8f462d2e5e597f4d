"""Runs or compiles what the TPU's kernels compute where a test's own process cannot.

python kernels_run.py mesh    on eight virtual CPU devices, step by step: prints the errors
python kernels_run.py tpu     compiles for a TPU that is not there: prints which kernels are used
"""

import functools
import json
import re
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from nuwa_jax.models import attention, remat, splash  # noqa: E402
from nuwa_jax.models.partition import (  # noqa: E402
    BATCH_AXES,
    by_frames,
    by_pixels,
    each_device,
)
from nuwa_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh  # noqa: E402

attention.DIRECT_SCORES = 2000
splash.BLOCKS, splash.MIN_KEYS = (128,), 16


def on_mesh() -> dict:
    """Largest errors of outputs and gradients, for their size, against one device and no kernel."""
    rng = np.random.default_rng(0)
    kernel = functools.partial(splash.splash_attention, interpret=True)

    def spatial(*x):
        return each_device(kernel, *x, over=attention.samples_and_heads(x[0]))

    def over_frames(attend, q, k, v, weight):
        # Clips and their frames are one axis in attention, as in the U-Net.
        flat = (by_frames(x).reshape(-1, *x.shape[2:]) for x in (q, k, v))
        out = attend(*flat).reshape(q.shape)
        return jnp.sum(by_frames(out) * weight)

    def over_pixels(attend, q, k, v, weight):
        out = attend(*(by_pixels(x) for x in (q, k, v)), 2)
        return jnp.sum((by_pixels(out) * weight).astype(jnp.float32))

    temporal = functools.partial(attention.kernel_over_time, interpret=True)
    arrays = [rng.normal(size=(2, 2, 19, 4, 8)).astype(np.float32) for _ in range(4)]
    halves = [rng.normal(size=(2, 3, 22, 128)).astype(jnp.bfloat16) for _ in range(4)]
    return errors(over_frames, spatial, jax.nn.dot_product_attention, arrays) | {
        f"{name} over time": error
        for name, error in errors(
            over_pixels, temporal, attention.attention_over_time, halves
        ).items()
    }


def errors(loss, attend, plain, arrays) -> dict:
    """Of a loss by `attend`, and its gradients to the first three arrays, on a mesh."""
    mesh = make_mesh(MeshConfig(fsdp=2, frame=2, tensor=2, data=1))
    spec = PartitionSpec(BATCH_AXES)
    differentiated = jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2))

    # As in a training step: each device's samples are its own, the other axes the compiler's.
    @functools.partial(
        jax.shard_map,
        in_specs=spec,
        out_specs=(PartitionSpec(), spec),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )
    def nested(*args):
        value, found = differentiated(*args)
        return jax.lax.psum(value, BATCH_AXES), found

    expected = jax.value_and_grad(functools.partial(loss, plain), (0, 1, 2))(
        *(x.astype(np.float32) for x in arrays)
    )
    worst = {}
    for name, function in (("automatic", differentiated), ("nested", nested)):
        with use_mesh(mesh):
            placed = jax.device_put(tuple(arrays), NamedSharding(mesh, spec))
            found = jax.jit(function)(*placed)
        worst[name] = max(
            float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max())
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        )
    return worst


def for_tpu() -> dict:
    """How many of each kernel a gradient has, and bytes on the host, by remat policy and place."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = make_mesh(MeshConfig(fsdp=2, data=1, tensor=2), topology.devices)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    x = jax.ShapeDtypeStruct((2, 96, 128), jnp.bfloat16, sharding=sharding)

    def block(x):
        x = remat.block_input(x)
        heads = jnp.sin(x).reshape(*x.shape[:2], 2, 64)
        return x + jnp.tanh(attention.dot_product_attention(heads, heads, heads)).reshape(x.shape)

    found = {}
    for policy, place in (("attention", "nested"), ("offload", "automatic")):
        kept = jax.checkpoint(block, policy=remat.policy_of(policy))

        def loss(x, kept=kept):
            return jnp.sum(jnp.square(kept(kept(x)).astype(jnp.float32)))

        with use_mesh(mesh), attention.implementation("splash"):
            gradient = jax.grad(loss)
            if place == "nested":
                gradient = jax.shard_map(
                    gradient,
                    in_specs=sharding.spec,
                    out_specs=sharding.spec,
                    axis_names=set(BATCH_AXES),
                    check_vma=False,
                )
            compiled = jax.jit(gradient).lower(x).compile()
        text = compiled.as_text()
        found[policy] = {
            kernel: len(set(re.findall(rf"%(splash_mha_{kernel}_[\w.]+) = ", text)))
            for kernel in ("fwd", "dq", "dkv")
        }
        found[policy]["host"] = compiled.memory_analysis().host_temp_size_in_bytes

    # Over time, of which memory in the core is what may be short.
    x = jax.ShapeDtypeStruct((2, 32, 40, 320), jnp.bfloat16, sharding=sharding)

    def over_time(x):
        kept = jax.checkpoint(
            lambda x: attention.attention_over_time(jnp.sin(x), x, x, 5),
            policy=remat.policy_of("attention"),
        )
        return jnp.sum(jnp.square(kept(kept(x)).astype(jnp.float32)))

    with use_mesh(mesh):
        text = jax.jit(jax.grad(over_time)).lower(x).compile().as_text()
    found["over time"] = {
        way: len(set(re.findall(rf"%([\w.]*attention_over_time_{way}[\w.]*) = ", text)))
        for way in ("forward", "backward")
    }
    return found | {"fed forward": feed_forward_for_tpu(topology)}


def feed_forward_for_tpu(topology) -> dict:
    """Kernels of a block, where chips share no sample, and where they share its heads."""
    from nuwa_jax.models.unet import SpatialBlock

    net = SpatialBlock(5, 4, jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, 40, 320), jnp.bfloat16)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(x.shape), None, None))
    found = {}
    for name, sizes in (("alone", {"data": 4}), ("divided", {"data": 2, "tensor": 2})):
        mesh = make_mesh(MeshConfig(**sizes), topology.devices)
        whole, split = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), (BATCH_AXES,)))

        @functools.partial(
            jax.shard_map,
            in_specs=(PartitionSpec(), split.spec),
            out_specs=PartitionSpec(),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
        def gradient(params, x):
            def loss(params):
                return jnp.sum(jnp.square(net.apply(params, x, None, None).astype(jnp.float32)))

            return jax.lax.psum(jax.grad(loss)(params), BATCH_AXES)

        def abstract(a, where):
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

        with use_mesh(mesh):
            params = jax.tree.map(lambda a, where=whole: abstract(a, where), shapes)
            text = jax.jit(gradient).lower(params, abstract(x, split)).compile().as_text()
        found[name] = len(set(re.findall(r"%([\w.]*fed_forward_(?:for|back)ward[\w.]*) = ", text)))
    return found


if __name__ == "__main__":
    print(json.dumps({"mesh": on_mesh, "tpu": for_tpu}[sys.argv[1]]()))
