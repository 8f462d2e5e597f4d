"""Gradients where every device holds a part of each parameter: nothing is exchanged but what must.

The compiler, left to itself, sums whole gradients on every device (an all-reduce) and then throws
most of them away, and it may gather float32 parameters only to round them. Here the axes over which
the batch is spread are manual (`jax.shard_map`), so that what is written is what is sent:

  a parameter   is rounded to the compute dtype and gathered where a layer asks for it; under
                rematerialisation that is inside the block, so that the backward pass gathers it
                again and no whole copy of the model stays in memory
  its gradient  is summed and scattered in one (reduce-scatter) as soon as the layer's is known
  over `data`   the parts are summed once a step, whatever the number of micro-batches

That is the traffic of ZeRO's third stage (Rajbhandari et al. 2020, section 7.2) and of FSDP (Zhao
et al. 2023). The axes `frame` and `tensor` stay the compiler's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
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

Params = dict[str, Any]


class Shard(struct.PyTreeNode, meta.AxisMetadata):
    """A device's part of a parameter, in place of the parameter in what Flax modules are given.

    Flax calls `unbox` where a module asks for the parameter, and there it is gathered: modules need
    not know.
    """

    value: Array
    dimension: int = struct.field(pytree_node=False)  # along which it is split
    dtype: Any = struct.field(pytree_node=False)  # of the gathered parameter
    reduce_dtype: Any = struct.field(pytree_node=False)  # in which its gradients are summed

    def unbox(self) -> Array:
        """The whole parameter; every device of the axis must ask for it."""
        return gather(self.value, self.dimension, self.dtype, self.reduce_dtype)

    def replace_boxed(self, val: Array) -> Shard:
        """The same place for another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Shard:
        """Of modules that `nn.scan` or `nn.vmap` stacks: there are none."""
        raise NotImplementedError("stacked modules have no shards: give them whole parameters")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Shard:
        """As `add_axis`."""
        return self.add_axis(index, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(shard: Array, dimension: int, dtype: Any, reduce_dtype: Any) -> Array:
    """The whole of an array of which every device of `fsdp` holds a part, as `dtype`.

    Rounded before it is sent. Its gradient comes back as the device's part of the sum over the
    axis, taken in `reduce_dtype`. For use where the axis is manual.
    """
    return jax.lax.all_gather(shard.astype(dtype), FSDP_AXIS, axis=dimension, tiled=True)


def _gather_forward(shard: Array, *how: Any) -> tuple[Array, None]:
    return gather(shard, *how), None


def _gather_backward(
    dimension: int, dtype: Any, reduce_dtype: Any, saved: None, gradient: Array
) -> tuple[Array]:
    del dtype, saved
    part = jax.lax.psum_scatter(
        gradient.astype(reduce_dtype), FSDP_AXIS, scatter_dimension=dimension, tiled=True
    )
    return (part.astype(jnp.float32),)  # that of parameters


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


def boxed(
    params: Params, dimensions: Params, dtype: Any, reduce_dtype: Any, modules: Collection[str]
) -> Params:
    """Shards of parameters as a model takes them.

    Args:
      params: the device's parts.
      dimensions: the same tree, of the dimension along which each is split; None: it is whole.
      dtype: of the model's computations. Matrices and kernels are gathered as such; vectors,
        which layers add to and multiply with in float32, and low-rank updates with the kernels
        that they are added to, as they are.
      reduce_dtype: in which gradients are summed.
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
        exact = leaf.ndim < 2 or path[0] == "lora" or path in merged
        shard = Shard(leaf, dimensions[path], leaf.dtype if exact else dtype, reduce_dtype)
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
