"""Where activations lie on a mesh: by frames in spatial layers, by pixels in temporal ones.

Where no mesh is in use, one of a single device, or one that has no such axes, these functions
return their argument.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")  # samples are spread over both
FRAME_AXIS = "frame"


def by_frames(x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
    """Each device of the frame axis holds some frames whole: for layers that see one at a time."""
    return _constrain(x, BATCH_AXES, FRAME_AXIS)


def by_pixels(x: Float[Array, "b t p ..."]) -> Float[Array, "b t p ..."]:
    """Each holds some rows or pixels of all frames: for layers that look along time.

    Between the two, devices of the frame axis exchange their parts once (an all-to-all, as in
    DeepSpeed-Ulysses, arXiv 2309.14509, but of frames for pixels).
    """
    return _constrain(x, BATCH_AXES, None, FRAME_AXIS)


def _constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or FRAME_AXIS not in mesh.axis_names:
        return x
    if mesh.manual_axes:
        # Samples are divided already: what is left to be said is where frames lie.
        axes = [None if axis == BATCH_AXES else axis for axis in axes]
        if mesh.shape[FRAME_AXIS] == 1:
            return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
