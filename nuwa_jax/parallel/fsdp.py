"""Gradients where every device holds a part of each parameter: nothing is exchanged but what must.

The compiler, left to itself, sums whole gradients on every device (an all-reduce) and then throws
most of them away, and it may gather float32 parameters only to round them. Here the axes over which
the batch is spread are manual (`jax.shard_map`), so that what is written is what is sent:

  a parameter   is rounded to the compute dtype and gathered where a layer asks for it; under
                rematerialisation that is inside the block, so that the backward pass gathers it
                again and no whole copy of the model stays in memory (but of kernels to which
                low-rank updates are added: all of them at once, in float32)
  its gradient  is summed and scattered in one (reduce-scatter) as soon as the layer's is known
  over `data`   the parts are summed once a step, whatever the number of micro-batches

That is the traffic of ZeRO's third stage (Rajbhandari et al. 2020, section 7.2) and of FSDP (Zhao
et al. 2023). The axes `frame` and `tensor` stay the compiler's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from nuwa_jax.errors import UserError
from nuwa_jax.models.partition import BATCH_AXES
from nuwa_jax.parallel.sharding import shardings

FSDP_AXIS = "fsdp"
REDUCE_DTYPES = ("float32", "bfloat16")
# Devices up to which one phase is reduce-scattered over any torus.
ONE_PHASE = 8
# Of a TPU's memory, in float32 values: a row of a tile, and a tile.
LANES, TILE = 128, 1024

Params = dict[str, Any]
# Groups of devices, by their places along the axis, that exchange among themselves; None: all.
Ring = tuple[tuple[int, ...], ...] | None


class Exchange(NamedTuple):
    """How a parameter is gathered.

    Attributes:
      dtype: of what is sent, and of the gathered parameter.
      reduce_dtype: in which its gradients are summed.
      rings: as `rings` gives them.
    """

    dtype: Any
    reduce_dtype: Any
    rings: tuple[Ring, ...] = (None,)


class Shard(struct.PyTreeNode, meta.AxisMetadata):
    """A device's part of a parameter, in place of the parameter in what Flax modules are given.

    Flax calls `unbox` where a module asks for the parameter, and there it is gathered: modules need
    not know.
    """

    value: Array
    dimension: int = struct.field(pytree_node=False)  # along which it is split
    how: Exchange = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        """The whole parameter; every device of the axis must ask for it."""
        return gather(self.value, self.dimension, self.how)

    def replace_boxed(self, val: Array) -> Shard:
        """The same place for another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Shard:
        """Of modules that `nn.scan` or `nn.vmap` stacks: there are none."""
        raise NotImplementedError("stacked modules have no shards: give them whole parameters")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Shard:
        """As `add_axis`."""
        return self.add_axis(index, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(shard: Array, dimension: int, how: Exchange) -> Array:
    """The whole of an array of which every device of `fsdp` holds a part, as `how.dtype`.

    Rounded before it is sent. Its gradient comes back as the device's part of the sum over the
    axis, taken in `how.reduce_dtype`. For use where the axis is manual.
    """
    whole = shard.astype(how.dtype)
    for ring in how.rings:
        whole = jax.lax.all_gather(
            whole, FSDP_AXIS, axis=dimension, tiled=True, axis_index_groups=ring
        )
    return whole


def _gather_forward(shard: Array, *how: Any) -> tuple[Array, None]:
    return gather(shard, *how), None


def _gather_backward(dimension: int, how: Exchange, saved: None, gradient: Array) -> tuple[Array]:
    del saved
    # Split along the first of two axes, and that in whole tiles: others the TPU's compiler does not
    # scatter.
    front = jnp.moveaxis(gradient.astype(how.reduce_dtype), dimension, 0)
    part = front.reshape(len(front), -1)
    for phase, ring in enumerate(reversed(how.rings)):
        if phase and part.size % (len(ring[0]) * TILE) == 0:
            part = part.reshape(-1, LANES)
        part = jax.lax.psum_scatter(
            part, FSDP_AXIS, scatter_dimension=0, tiled=True, axis_index_groups=ring
        )
    part = part.astype(jnp.float32)  # as parameters are
    return (jnp.moveaxis(part.reshape(-1, *front.shape[1:]), 0, dimension),)


gather.defvjp(_gather_forward, _gather_backward)


def is_needed(mesh: Mesh | None) -> bool:
    """Whether a batch is spread over several devices of the mesh, so that gradients must meet."""
    return mesh is not None and math.prod(mesh.shape[axis] for axis in BATCH_AXES) > 1


def reduce_dtype(name: str) -> Any:
    """`train.reduce_dtype`, the dtype in which gradients are summed over devices.

    Raises:
      UserError: it is none of `REDUCE_DTYPES`.
    """
    if name not in REDUCE_DTYPES:
        raise UserError(f"train.reduce_dtype must be one of {REDUCE_DTYPES}, got {name!r}")
    return jnp.dtype(name)


def rings(mesh: Mesh) -> tuple[Ring, ...]:
    """The phases of a gather: of rings along each side of the torus that the axis fills.

    Over a large two-dimensional group the TPU's compiler has no reduce-scatter: it sums whole
    gradients (all-reduce) and takes a slice. Along one side of the torus after the other it
    has, and as much is sent as in one phase: (n - 1) / n of the array.
    """
    axis = mesh.axis_names.index(FSDP_AXIS)
    line = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis])[0]
    if len(line) <= ONE_PHASE or not hasattr(line[0], "coords"):
        return (None,)
    coords = np.array([device.coords for device in line])
    sides = []
    for along in coords.T:
        size = len(set(along.tolist()))
        if size > 1:
            sides.append((int(np.argmax(along != along[0])), size))
    sides.sort()
    # Devices must follow each other side by side, the first side fastest.
    expected = 1
    for stride, size in sides:
        if stride != expected:
            return (None,)
        expected *= size
    if expected != len(line) or len(sides) == 1:
        return (None,)
    places = range(len(line))
    return tuple(
        tuple(
            tuple(start + i * stride for i in range(size))
            for start in places
            if start // stride % size == 0
        )
        for stride, size in sides
    )


def boxed(params: Params, dimensions: Params, how: Exchange, modules: Collection[str]) -> Params:
    """Shards of parameters as a model takes them.

    Args:
      params: the device's parts.
      dimensions: the same tree, of the dimension along which each is split; None: it is whole.
      how: they are exchanged; `how.dtype` is that of the model's computations. Matrices and
        kernels are gathered as such; vectors, which layers add to and multiply with in float32,
        embeddings, whose rows' gradients are sums over tokens, and low-rank updates with the
        kernels that they are added to, as they are.
      modules: top-level parts that Flax modules read, each parameter when its layer runs; of
        others all are gathered here.
    """
    flat, dimensions = flatten_dict(params), flatten_dict(dimensions)
    # `merge_lora` needs these whole, and exact: the updates are small against the kernels.
    merged = {(*path[1:-1], "kernel") for path in flat if path[0] == "lora"}
    out = {}
    for path, leaf in flat.items():
        if dimensions[path] is None:
            out[path] = leaf
            continue
        exact = leaf.ndim < 2 or path[-1] == "embedding" or path[0] == "lora" or path in merged
        shard = Shard(leaf, dimensions[path], how._replace(dtype=leaf.dtype) if exact else how)
        lazy = path[0] in modules and path not in merged
        out[path] = shard if lazy else shard.unbox()
    return unflatten_dict(out)


def over_devices(
    compute: Callable[..., Any],
    mesh: Mesh,
    params: Params,
    frozen: Params,
    data: Any,
    *replicated: Any,
) -> Any:
    """Runs `compute` on each device's samples and shards, and brings the gradients together.

    Args:
      compute: `(params, frozen, dimensions, data, *replicated) -> (means, gradients)`: all of the
        device's own; `dimensions` mirrors the parameters (`boxed`), `means` are averages over
        samples, and `gradients`, those of the average of the device's samples, mirror `params`
        and are already summed over `fsdp` where these are split.
      mesh: with several devices along `BATCH_AXES` together.
      params: global arrays, trained.
      frozen: global arrays, not trained.
      data: a tree of global arrays, samples first.
      *replicated: whole on every device.

    Returns:
      `(means, gradients)` over the whole batch, the gradients split as the parameters are.
    """
    specs = jax.tree.map(_manual, (shardings(params, mesh), shardings(frozen, mesh)))
    dimensions = jax.tree.map(_dimension, specs, is_leaf=_is_spec)
    copies = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def on_each(params: Params, frozen: Params, data: Any, *replicated: Any) -> Any:
        means, grads = compute(params, frozen, dimensions, data, *replicated)
        means = jax.lax.pmean(means, BATCH_AXES)
        flat, tree = jax.tree.flatten(grads)
        split = [d is not None for d in tree.flatten_up_to(dimensions[0])]
        whole = jax.lax.psum([g for g, s in zip(flat, split, strict=True) if not s], BATCH_AXES)
        parts = [g for g, s in zip(flat, split, strict=True) if s]
        if mesh.shape["data"] > 1:
            parts = jax.lax.psum(parts, "data")
        whole, parts = iter(whole), iter(parts)
        flat = [next(parts if s else whole) / copies for s in split]
        return means, tree.unflatten(flat)

    return jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(*specs, PartitionSpec(BATCH_AXES), *[PartitionSpec()] * len(replicated)),
        out_specs=(PartitionSpec(), specs[0]),
        axis_names=set(BATCH_AXES),
        check_vma=False,  # gradients are taken inside, where each device's are its own
    )(params, frozen, data, *replicated)


def _manual(sharding: jax.sharding.NamedSharding) -> PartitionSpec:
    """The part of a sharding that is not left to the compiler."""
    return PartitionSpec(*(axis if axis == FSDP_AXIS else None for axis in sharding.spec))


def _dimension(spec: PartitionSpec) -> int | None:
    return spec.index(FSDP_AXIS) if FSDP_AXIS in spec else None


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
