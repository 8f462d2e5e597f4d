"""Which part of every parameter lies where: rules as data, and a report of what they give.

A rule reads the parameter's path and shape alone, and optimizer states and running averages have
the paths of their parameters at their ends: so they lie as these do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nuwa_jax.errors import UserError

# Share of the bytes that may lie whole on every device before that is an error, and the bytes up to
# which it never is: a small model's many small parameters.
MAX_REPLICATED = 0.02
HARMLESS = 2**24
# Values below which a parameter stays whole: gathering it would cost more than it takes.
MIN_SIZE = 2**13


class TensorRule(NamedTuple):
    """Paths that match `pattern` are split over `tensor` along `dimension`."""

    pattern: str
    dimension: int


# Column-parallel into heads or hidden channels, row-parallel out of them (Shoeybi et al. 2019,
# section 3): between the two nothing is exchanged.
TENSOR_RULES = (
    TensorRule(r"/to_[qkv]/kernel$", -1),
    TensorRule(r"/to_out/kernel$", -2),
    TensorRule(r"/feed_forward\w*/proj/(kernel|bias)$", -1),
    TensorRule(r"/feed_forward\w*/out/kernel$", -2),
    TensorRule(r"^(.*/)?image_encoder/.*/mlp_1/(kernel|bias)$", -1),
    TensorRule(r"^(.*/)?image_encoder/.*/mlp_2/kernel$", -2),
)


class Placed(NamedTuple):
    """One line of the report."""

    path: str
    shape: tuple[int, ...]
    bytes: int
    spec: PartitionSpec
    parts: int  # devices over which one copy is spread


def partition_spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How an array is split, by its path (names joined by "/") and shape.

    `tensor` goes where its rule says, if the dimension divides. `fsdp` goes to the largest
    remaining dimension that divides, the last of equals; never to a spatial or temporal one of a
    convolution's kernel `[.. in out]`, which are too short and which every device needs whole.
    """
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) < MIN_SIZE:
        return PartitionSpec()
    if sizes["tensor"] > 1:
        rule = next((rule for rule in TENSOR_RULES if re.search(rule.pattern, path)), None)
        if rule is not None and shape[rule.dimension] % sizes["tensor"] == 0:
            axes[rule.dimension] = "tensor"
    if sizes["fsdp"] > 1:
        free = [
            i
            for i in range(max(0, len(shape) - 2), len(shape))
            if axes[i] is None and shape[i] % sizes["fsdp"] == 0
        ]
        if free:
            axes[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of shardings for a tree of arrays or of their shapes."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(_name(path), leaf.shape, sizes)),
        tree,
    )


def place(tree: Any, mesh: Mesh) -> Any:
    """The arrays on the mesh, each split by its rule; every process gives the same values."""
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def to_host(array: Any) -> np.ndarray:
    """The whole array, on every process; all must ask for it."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def report(tree: Any, sizes: Mapping[str, int]) -> list[Placed]:
    """A line for every array of a tree, the largest first."""
    return sorted(_lines(tree, sizes), key=lambda line: -line.bytes)


def check_replicated(
    lines: list[Placed], sizes: Mapping[str, int], limit: float = MAX_REPLICATED
) -> str:
    """What stays whole on every device, in words.

    Raises:
      UserError: on a mesh with fsdp, more than `limit` of the bytes and more than
        `HARMLESS` bytes stay whole; names the largest.
    """
    total = sum(line.bytes for line in lines)
    whole = [line for line in lines if line.parts == 1]
    kept = sum(line.bytes for line in whole)
    share = kept / max(1, total)
    each = sum(line.bytes / line.parts for line in lines)
    told = (
        f"{len(lines)} arrays of {total / 2**30:.2f} GiB, {each / 2**30:.2f} GiB per device; "
        f"{len(whole)} stay whole, {share:.2%} of the bytes"
    )
    if sizes["fsdp"] > 1 and share > limit and kept > HARMLESS:
        largest = ", ".join(f"{line.path} {line.shape}" for line in whole[:3])
        raise UserError(
            f"{told}, at most {limit:.0%} may: no dimension of {largest} divides by fsdp "
            f"{sizes['fsdp']} (tensor {sizes['tensor']}): make mesh.fsdp smaller and mesh.data "
            "larger"
        )
    return told


def _lines(tree: Any, sizes: Mapping[str, int]) -> Iterator[Placed]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, shape = _name(path), tuple(leaf.shape)
        spec = partition_spec(name, shape, sizes)
        parts = math.prod(sizes[axis] for axis in spec if axis is not None)
        yield Placed(name, shape, math.prod(shape) * np.dtype(leaf.dtype).itemsize, spec, parts)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    """`array` laid out as `sharding` says; copies, so that donating one leaves the other."""
    if jax.process_count() == 1 or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, sharding, may_alias=False)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
