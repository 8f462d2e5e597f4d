"""The last hop of a batch: onto the devices, and what is made of it there.

The host sends bytes and a few kilobytes of points; to mirror a clip or to enlarge its flow before
would cost it more than decoding the clip, and the bus many times the bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from nuwa_jax.data.batch import Batch
from nuwa_jax.motion.tracks import TrackState


def to_device(
    batch: Batch,
    sharding: jax.sharding.Sharding | None = None,
    batch_size: int | None = None,
) -> Batch:
    """The batch as arrays on devices.

    Args:
      batch: of this host.
      sharding: of the global batch, of which each host gives the rows that lie on its devices, in
        their order; None: on one device.
      batch_size: of the global batch; by default, the hosts have equal and different parts of it.
    """
    if sharding is None:
        return jax.device_put(batch)

    def put(array: np.ndarray) -> Array:
        shape = None if batch_size is None else (batch_size, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    # With several processes JAX takes this for an implicit transfer, which the loop forbids.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, batch)


def complete(batch: Batch, height: int, width: int) -> Batch:
    """What the host left to do: flow at full size, and mirrored clips. For use under jit.

    Args:
      batch: as it came from the host.
      height: of its video in pixels.
      width: of its video in pixels.

    Returns:
      The batch with `flow` float32 [b t h w 2] and all parts mirrored where `flip` says so; `flip`
      is None then.
    """
    if batch.flow is not None:
        batch = batch._replace(flow=_enlarge(batch.flow, height, width))
    if batch.flip is None:
        return batch
    return _mirror(batch._replace(flip=None), batch.flip, width)


def _enlarge(flow: Float[Array, "b t h2 w2 2"], height: int, width: int) -> Float[Array, "..."]:
    flow = flow.astype(jnp.float32)
    if flow.shape[2:4] == (height, width):
        return flow
    # Displacements are in pixels of the whole size already: between them is all there is to do.
    return jax.image.resize(flow, (*flow.shape[:2], height, width, 2), "linear")


def _mirror(batch: Batch, flip: Bool[Array, " b"], width: int) -> Batch:
    """Pixel x goes to width - 1 - x, and what moved to the right moves to the left."""

    def where(mirrored: Array, as_it_is: Array) -> Array:
        return jnp.where(flip.reshape(-1, *[1] * (as_it_is.ndim - 1)), mirrored, as_it_is)

    flow = batch.flow
    if flow is not None:
        flow = where(flow[:, :, :, ::-1] * jnp.array([-1.0, 1.0], flow.dtype), flow)
    return batch._replace(
        video=where(batch.video[:, :, :, ::-1], batch.video),
        points=where(_mirror_points(batch.points, batch.state, width), batch.points),
        flow=flow,
    )


def _mirror_points(
    points: Float[Array, "b k t 2"], state: Integer[Array, "b k t"], width: int
) -> Float[Array, "b k t 2"]:
    mirrored = points.at[..., 0].set(width - 1 - points[..., 0])
    # An unused drag is all zero, mirrored or not.
    used = jnp.any(state != TrackState.UNSPECIFIED, axis=-1)[..., None, None]
    return jnp.where(used, mirrored, points)
