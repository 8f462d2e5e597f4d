"""The mesh of devices, and how a batch divides over it.

Four axes, whatever the run; those of size 1 cost nothing:

  data    whole copies of the model, each with its part of the batch; over several slices of a TPU
          this is the axis that crosses the slow network between them
  fsdp    a part of the batch each, too, and a part of every parameter (Zhao et al. 2023)
  frame   a part of the frames of each clip
  tensor  a part of the attention heads and of the hidden channels of each feed-forward layer
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nuwa_jax.errors import UserError
from nuwa_jax.models.partition import BATCH_AXES, FRAME_AXIS

AXES = (*BATCH_AXES, FRAME_AXIS, "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes; at most one is -1 and takes the devices that the others leave.

    `slices` is the number of TPU slices; `data` counts over all of them.
    """

    data: int = -1
    fsdp: int = 1
    frame: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh sizes are at least 1, at most one of them -1 (what is left), got "
                f"{dict(zip(AXES, sizes, strict=True))}"
            )
        if self.slices < 1:
            raise UserError(f"mesh.slices is at least 1, got {self.slices}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MeshConfig:
        """From the `mesh` part of a config.

        Raises:
          UserError: an entry is unknown, or the sizes make no sense.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(config) - known)
        if unknown:
            raise UserError(f"mesh has no entry {', '.join(unknown)}: it has {sorted(known)}")
        return cls(**{name: int(value) for name, value in config.items()})

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis on so many devices.

        Raises:
          UserError: the product of the axes is not the number of devices, or `data` does not
            divide among the slices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        given = math.prod(size for size in sizes.values() if size != -1)
        open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
        if devices % given or (open_axis is None and given != devices):
            told = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise UserError(
                f"a mesh of {told} does not fit {devices} devices: the sizes must multiply to "
                f"{devices}; one of them may be -1"
            )
        if open_axis is not None:
            sizes[open_axis] = devices // given
        if sizes["data"] % self.slices:
            raise UserError(
                f"mesh.data={sizes['data']} does not divide among {self.slices} slices: whole "
                "copies of the model must fit each slice"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of the job, or over those given (a topology's, for instance).

    Raises:
      UserError: the sizes do not fit, or several slices are asked for and the devices have none.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    shape = tuple(sizes.values())
    if config.slices > 1:
        found = len({getattr(device, "slice_index", 0) for device in devices})
        if found != config.slices:
            raise UserError(
                f"mesh.slices is {config.slices}, these devices are of {found}: set it to that"
            )
        per_slice = (shape[0] // config.slices, *shape[1:])
        # An axis of 64 on a torus of 16x16 takes a part of one of its dimensions.
        array = mesh_utils.create_hybrid_device_mesh(
            per_slice, (config.slices, 1, 1, 1), devices=devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True
        )
    else:
        # Hosts in order: the batch that a host reads stays on its own devices.
        array = np.array(devices).reshape(shape)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` the one that the models' sharding constraints speak of, if it is not already.

    A function that does so can then be traced, within this, by another transformation.
    """
    if jax.sharding.get_abstract_mesh() == mesh.abstract_mesh:
        yield mesh
        return
    with jax.set_mesh(mesh):
        yield mesh


class OnMesh:
    """A jitted function that is always traced with `mesh` in use."""

    def __init__(self, jitted: jax.stages.Wrapped, mesh: Mesh) -> None:
        self._jitted, self._mesh = jitted, mesh

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        with use_mesh(self._mesh):
            return self._jitted(*args)

    def trace(self, *args: Any) -> jax.stages.Traced:
        """The function traced, not run: its jaxpr, and what is lowered (with the mesh in use)."""
        with use_mesh(self._mesh):
            return self._jitted.trace(*args)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over `BATCH_AXES`, whatever follows the first axis whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(sharding: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that lie on this process' devices, in order.

    Usually one block; but where the torus of a TPU pod orders devices, or frames or channels are
    split over hosts, rows may come from several places, and several hosts may need the same.
    """
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    blocks = {index.indices(batch_size)[:2] for (index,) in indices}
    return tuple(row for start, stop in sorted(blocks) for row in range(start, stop))


def reading_hosts(mesh: Mesh) -> int:
    """Into how many parts the processes divide a batch among them: one each, but see above."""
    copies = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return max(1, copies // len(local_rows(batch_sharding(mesh), copies)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_arithmetic(
    batch_size: int, accumulate: int, sizes: Mapping[str, int], processes: int = 1
) -> str:
    """How a batch divides, in words, for the log.

    Args:
      batch_size: clips per step over all devices.
      accumulate: micro-batches per step.
      sizes: of the mesh's axes.
      processes: hosts, each of which reads an equal part.

    Raises:
      UserError: it does not divide; names the nearest sizes that do.
    """
    copies = math.prod(sizes[axis] for axis in BATCH_AXES)
    unit = math.lcm(copies * accumulate, processes)
    if batch_size < 1 or batch_size % unit:
        below = batch_size // unit * unit
        near = " or ".join(str(size) for size in (below, below + unit) if size > 0)
        raise UserError(
            f"a batch of {batch_size} does not divide into {accumulate} micro-batches over data "
            f"{sizes['data']} x fsdp {sizes['fsdp']} devices and {processes} hosts: make "
            f"batch_size {near}, change train.accumulate or the mesh, or let the program see fewer "
            "devices (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS)"
        )
    each = batch_size // (copies * accumulate)
    return (
        f"batch {batch_size} = {accumulate} micro-batches x data {sizes['data']} x fsdp "
        f"{sizes['fsdp']} x {each} clips; each clip over frame {sizes['frame']} x tensor "
        f"{sizes['tensor']} devices; {batch_size // processes} clips read per host"
    )
