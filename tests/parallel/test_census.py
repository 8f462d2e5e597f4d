from pathlib import Path

import jax
import numpy as np
import pytest

from nuwa_jax.parallel import sharding
from nuwa_jax.parallel.census import Collective, fsdp_minimum, on_ring, read_hlo

HLO = Path(__file__).parent / "hlo"  # made by the TPU's compiler: hlo/make.py
WEIGHT = 1024 * 512  # values of what is gathered there


def census(name):
    return read_hlo((HLO / f"{name}.hlo").read_text())


def of_four(size):
    return size * 3 // 4


def test_a_gather_and_a_scattered_gradient_count_what_a_ring_sends():
    assert census("scattered").by_kind() == {
        "all-gather": {"count": 1, "traffic": of_four(2 * WEIGHT)},
        "reduce-scatter": {"count": 1, "traffic": of_four(4 * WEIGHT)},
    }


def test_phases_count_as_one_exchange_over_all():
    kinds = ("all-gather", 2**10, 4), ("all-gather", 2**12, 4), ("all-gather", 2**14, 4)
    phases = [Collective(kind, size, group, 3, "") for kind, size, group in kinds]
    together = Collective("all-gather", 2**14, 64, 3, "")
    assert sum(phase.traffic for phase in phases) == together.traffic == 3 * 2**14 * 63 // 64
    assert on_ring(100, 0) == 100  # the group is not known: no less than all
    assert on_ring(100, 1) == 0


@pytest.mark.parametrize(("groups", "sent"), [("{{0},{1}}", 0), ("{{0,1}}", 32), ("{}", 64)])
def test_a_device_that_adds_with_itself_sends_nothing(groups, sent):
    text = f"""
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    assert read_hlo(text).traffic == sent


def test_what_stands_in_a_loop_counts_as_often_as_it_runs():
    found = census("loop")
    assert found.by_kind() == {
        "all-gather": {"count": 7, "traffic": 7 * of_four(2 * WEIGHT)},
        # A reduce-scatter and a gather of 1024 float32 values.
        "all-reduce": {"count": 1, "traffic": 2 * of_four(4 * 1024)},
    }
    assert found.endless == 0
    assert all(collective.group == 4 for collective in found.collectives)
    assert found.cycles > 7 * 1000


def test_an_exchange_keeps_its_own_part_and_a_neighbour_gets_all():
    held = 2 * 64 * 1024
    assert census("exchanged").by_kind() == {
        "all-to-all": {"count": 1, "traffic": of_four(held)},
        "collective-permute": {"count": 1, "traffic": held},
    }


def test_an_asynchronous_collective_counts_once_and_a_fused_one_as_what_it_does():
    """A gather over three fusions and gradients scattered by name, cut from a U-Net's step."""
    gradients = 2 * 128 * 128 + 8 * 9 * 32 * 32 + 2 * 9 * 64 * 32 + 768 * 128
    found = census("unet_excerpt")
    assert found.by_kind() == {
        "all-gather": {"count": 1, "traffic": of_four(2 * 14 * 14 * 3 * 32)},
        "reduce-scatter": {"count": 1, "traffic": of_four(4 * gradients)},
    }
    assert {c.kind: c.group for c in found.collectives} == {"all-gather": 4, "reduce-scatter": 4}


def test_a_loop_of_unknown_length_is_told():
    text = (HLO / "loop.hlo").read_text().replace("direction=LT", "direction=NE")
    assert read_hlo(text).endless == 1
    assert read_hlo(text).by_kind()["all-gather"]["count"] == 1


def sizes(**axes):
    return {"data": 1, "fsdp": 1, "frame": 1, "tensor": 1} | axes


def shapes(**arrays):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in arrays.items()}


def minimum(params, frozen, axes, **kwargs):
    dtypes = dict(compute_dtype="bfloat16", reduce_dtype="float32")
    return fsdp_minimum(params, frozen, axes, **dtypes, **kwargs)


def test_the_minimum_gathers_twice_and_scatters_once():
    size = 256 * 256
    assert size >= sharding.MIN_SIZE
    params = {"unet": shapes(kernel=(256, 256), bias=(256,))}
    found = minimum(params, {}, sizes(fsdp=4))
    # Small ones lie whole on every device: their gradients are added, as an all-reduce.
    assert found == (of_four(2 * 2 * size), of_four(4 * size), of_four(2 * 4 * 256))
    assert minimum(params, {}, sizes(fsdp=4), micro_batches=3)[:2] == (9 * size, 9 * size)
    # Over copies of the model each device adds the part that it keeps.
    copies = 2 * 4 * 256 * 7 // 8 + 2 * (4 * size // 4) // 2
    assert minimum(params, {}, sizes(fsdp=4, data=2)).copies == copies
    assert minimum(params, {}, sizes()).traffic == 0


@pytest.mark.parametrize(("part", "passes"), [("unet", 2), ("image_encoder", 1)])
def test_frozen_parameters_are_gathered_where_gradients_pass_through_them_twice(part, passes):
    frozen = {part: shapes(kernel=(256, 256))}
    assert minimum({}, frozen, sizes(fsdp=4)).traffic == passes * of_four(2 * 256 * 256)
