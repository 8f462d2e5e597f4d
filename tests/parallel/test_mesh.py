import math

import jax
import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.parallel.mesh import AXES, MeshConfig, batch_arithmetic, make_mesh


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"data": 1, "fsdp": -1}, 8, (1, 8, 1, 1)),
        ({"data": -1, "fsdp": 2, "frame": 2, "tensor": 2}, 24, (3, 2, 2, 2)),
        ({"data": 2, "fsdp": 2, "frame": 1, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"data": -1, "fsdp": 4, "slices": 2}, 16, (4, 4, 1, 1)),
    ],
)
def test_one_axis_takes_what_the_others_leave(config, devices, sizes):
    found = MeshConfig.from_config(config).sizes(devices)
    assert tuple(found) == AXES
    assert tuple(found.values()) == sizes
    assert math.prod(sizes) == devices


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        ({"data": 3, "fsdp": 1}, 8, "does not fit 8 devices"),
        ({"data": -1, "fsdp": 3}, 8, "does not fit 8 devices"),
        ({"data": 2}, 8, "does not fit 8 devices"),
        ({"data": 2, "fsdp": 4, "slices": 4}, 8, "divide among 4 slices"),
    ],
)
def test_sizes_that_do_not_fit_are_told(config, devices, message):
    with pytest.raises(UserError, match=message):
        MeshConfig.from_config(config).sizes(devices)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"tensor": 0}, "at least 1"),
        ({"slices": 0}, "mesh.slices"),
        ({"frames": 2}, "no entry frames"),
    ],
)
def test_a_mesh_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        MeshConfig.from_config(config)


def test_the_mesh_spans_all_devices_and_leaves_layouts_to_the_compiler():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == AXES
    assert mesh.size == jax.device_count()
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_slices_that_the_devices_do_not_have_are_refused():
    devices = jax.devices() * 2  # as many as the mesh wants, but of one slice
    with pytest.raises(UserError, match=r"of 1: set it to that"):
        make_mesh(MeshConfig(data=2, slices=2), devices[:2])


def test_batch_arithmetic_is_told_in_full():
    sizes = {"data": 2, "fsdp": 4, "frame": 1, "tensor": 1}
    told = batch_arithmetic(64, 2, sizes, processes=4)
    assert told.startswith("batch 64 = 2 micro-batches x data 2 x fsdp 4 x 4 clips")
    assert told.endswith("16 clips read per host")


@pytest.mark.parametrize(("batch", "near"), [(60, "48 or 64"), (3, "16")])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch, near):
    sizes = {"data": 2, "fsdp": 4, "frame": 1, "tensor": 1}
    with pytest.raises(UserError, match=f"batch_size {near}"):
        batch_arithmetic(batch, 2, sizes)
