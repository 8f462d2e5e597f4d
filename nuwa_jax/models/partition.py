"""Where activations lie on a mesh: by frames in spatial layers, by pixels in temporal ones.

Where no mesh is in use, one of a single device, or one that has no such axes, these functions
return their argument. Axes that an enclosing `jax.shard_map` has taken (a device sees its own part
alone) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")  # samples are spread over both
FRAME_AXIS = "frame"
HEAD_AXIS = "tensor"


def by_frames(x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
    """Each device of the frame axis holds some frames whole: for layers that see one at a time."""
    return _constrain(x, BATCH_AXES, FRAME_AXIS)


def by_pixels(x: Float[Array, "b t p ..."]) -> Float[Array, "b t p ..."]:
    """Each holds some rows or pixels of all frames: for layers that look along time.

    Between the two, devices of the frame axis exchange their parts once (an all-to-all, as in
    DeepSpeed-Ulysses, arXiv 2309.14509, but of frames for pixels).
    """
    return _constrain(x, BATCH_AXES, None, FRAME_AXIS)


def by_samples(x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """Each holds some samples whole, where frames or pixels of all clips are one axis.

    For convolutions, forward and backward: of one whose rows or frames are divided, XLA's
    partitioner adds up as many gradients as devices hold the same ones (along `tensor`), without an
    error (jaxlib 0.10.2).
    """
    return _constrain(x, (*BATCH_AXES, FRAME_AXIS))


def each_device(
    function: Callable[..., Array],
    *args: Float[Array, "..."],
    over: Sequence[tuple[int, Sequence[str]]],
    mask: Array | None = None,
) -> Float[Array, "..."]:
    """`function(*args, mask)` on every device for its part of what `over` says may be divided.

    For what the compiler cannot partition by itself, as a kernel. What does not divide, each device
    computes whole.

    Args:
      function: of arrays of one shape each, and `mask`; its result has that shape, too.
      *args: the arrays.
      over: for each of their axes of how many things it consists (samples, heads), and over which
        axes of the mesh these may be spread; as many as divide them are taken.
      mask: for each sample, along its first axis; or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = _automatic(mesh)
    if not automatic:
        return function(*args, mask)
    spec = []
    for things, axes in over:
        taken: list[str] = []
        for axis in axes:
            if axis in automatic and things % mesh.shape[axis] == 0:
                taken.append(axis)
                things //= mesh.shape[axis]
        spec.append(tuple(taken) or None)
    return jax.shard_map(
        function,
        in_specs=(*[PartitionSpec(*spec)] * len(args), PartitionSpec(spec[0])),
        out_specs=PartitionSpec(*spec),
        axis_names=automatic,
        # A kernel does not say over which axes what it returns varies.
        check_vma=False,
    )(*args, mask)


def is_divided() -> bool:
    """Whether the compiler spreads arrays over several devices, which it cannot do for a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in _automatic(mesh))


def undivided(function: Callable[..., Array], *args: Array) -> Array:
    """`function(*args)` of a kernel, where the mesh in use `is_divided` not."""
    automatic = _automatic(jax.sharding.get_abstract_mesh())
    if not automatic:
        return function(*args)
    # Their axes are of one device each, but the compiler does not look at that: were the arrays not
    # called divided, it would add gradients up over them, each device alone with its own.
    divided = PartitionSpec(tuple(sorted(automatic)))
    return jax.shard_map(
        function,
        in_specs=(divided,) * len(args),
        out_specs=divided,
        axis_names=automatic,
        check_vma=False,
    )(*args)


def platform() -> str:
    """Of the mesh in use, which may be of devices that this machine has not, or the machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _automatic(mesh: jax.sharding.AbstractMesh) -> set[str]:
    """The axes over which the compiler partitions, rather than an enclosing `shard_map`."""
    return {
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }


def _constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or FRAME_AXIS not in mesh.axis_names:
        return x
    if mesh.manual_axes and mesh.shape[FRAME_AXIS] == 1:
        return x  # samples are divided already, and frames are not
    automatic = _automatic(mesh)
    kept = [
        tuple(a for a in ((axis,) if isinstance(axis, str) else axis or ()) if a in automatic)
        for axis in axes
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axis or None for axis in kept)))
