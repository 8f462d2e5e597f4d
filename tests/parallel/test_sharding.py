import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nuwa_jax.errors import UserError
from nuwa_jax.parallel.mesh import MeshConfig, make_mesh
from nuwa_jax.parallel.sharding import check_replicated, partition_spec, place, report


def sizes(**axes):
    return {"data": 1, "fsdp": 1, "frame": 1, "tensor": 1} | axes


@pytest.mark.parametrize(
    ("path", "shape", "axes", "spec"),
    [
        # The larger of in and out; the last of equals; never the window of a convolution.
        ("unet/conv_in/kernel", (3, 3, 320, 640), {"fsdp": 4}, P(None, None, None, "fsdp")),
        ("unet/conv_in/kernel", (3, 3, 640, 320), {"fsdp": 4}, P(None, None, "fsdp")),
        ("unet/time_embed/linear_1/kernel", (320, 320), {"fsdp": 4}, P(None, "fsdp")),
        ("unet/x/kernel", (512, 3, 64, 9), {"fsdp": 3}, P(None, None, None, "fsdp")),
        # The largest that divides, and none if none does.
        ("unet/x/kernel", (320, 1000), {"fsdp": 64}, P("fsdp")),
        ("unet/x/kernel", (321, 1001), {"fsdp": 64}, P()),
        # Small ones stay whole.
        ("unet/x/bias", (1280,), {"fsdp": 4}, P()),
        ("step", (), {"fsdp": 4}, P()),
        # Heads and hidden channels; fsdp takes the other dimension.
        ("unet/b/to_q/kernel", (640, 320), {"tensor": 2}, P(None, "tensor")),
        ("unet/b/to_out/kernel", (320, 320), {"tensor": 2}, P("tensor")),
        ("unet/b/to_v/kernel", (640, 320), {"tensor": 2, "fsdp": 4}, P("fsdp", "tensor")),
        ("unet/b/feed_forward_in/proj/kernel", (320, 2560), {"tensor": 4}, P(None, "tensor")),
        ("unet/b/feed_forward/out/kernel", (1280, 320), {"tensor": 4, "fsdp": 2},
         P("tensor", "fsdp")),
        # An optimizer's moments lie as their parameters do.
        ("opt_state/0/mu/unet/b/to_q/kernel", (640, 320), {"tensor": 2, "fsdp": 4},
         P("fsdp", "tensor")),
        # A rule whose dimension does not divide gives way to fsdp.
        ("unet/b/to_q/kernel", (640, 321), {"tensor": 2, "fsdp": 4}, P("fsdp")),
    ],
)  # fmt: skip
def test_where_a_parameter_lies(path, shape, axes, spec):
    assert partition_spec(path, shape, sizes(**axes)) == spec


def shapes(**arrays):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in arrays.items()}


def test_the_report_counts_bytes_and_what_stays_whole():
    tree = {"unet": shapes(kernel=(3, 3, 64, 128), bias=(128,))}
    lines = report(tree, sizes(fsdp=4))
    assert [(line.path, line.bytes, line.parts) for line in lines] == [
        ("unet/kernel", 4 * 9 * 64 * 128, 4),
        ("unet/bias", 512, 1),
    ]
    assert "1 stay whole, 0.17% of the bytes" in check_replicated(lines, sizes(fsdp=4))


def test_too_much_that_stays_whole_is_an_error_that_names_it():
    tree = {"unet": shapes(odd=(4001, 2001), kernel=(4096, 4096))}
    with pytest.raises(UserError, match=r"unet/odd \(4001, 2001\) divides by fsdp 4"):
        check_replicated(report(tree, sizes(fsdp=4)), sizes(fsdp=4))
    # The rules of tensor are about some layers only: the others stay whole, as they should.
    check_replicated(report(tree, sizes(tensor=2)), sizes(tensor=2))
    # Whole copies are what a mesh without fsdp and tensor is for.
    check_replicated(report(tree, sizes(data=4)), sizes(data=4))


def test_placed_arrays_are_copies_with_the_same_values():
    mesh = make_mesh(MeshConfig())
    tree = {"unet": {"kernel": jax.numpy.arange(2**14).reshape(128, 128)}}
    placed = place(tree, mesh)
    np.testing.assert_array_equal(placed["unet"]["kernel"], tree["unet"]["kernel"])
    tree["unet"]["kernel"].delete()
    assert float(placed["unet"]["kernel"][-1, -1]) == 2**14 - 1
