"""A fresh flow encoder or drag layer changes no bit of a trained base; a dropped one neither."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from micro_model import denoiser, drops, initial, inputs, make, random_params, randomize

PARTS = {
    f"{kind}, {where}": {"flow_encoder": {"injection": kind, "where": where}}
    for kind in ("film", "concat", "cross_attention")
    for where in ("encoder+decoder", "decoder")
}
PARTS["drag tokens"] = {"drag": {"forms": ("tokens",)}}
PARTS["drag query_key"] = {"drag": {"forms": ("query_key",)}}


@pytest.fixture(scope="module")
def base():
    """The base's parameters, all of them random, and what it makes of the inputs."""
    model = make(attention_factors=())
    params = random_params(model, seed=1)
    none = [False, False]
    return params, denoiser(model)(params, inputs(), drops(none, none, none))


SLOW = ("concat, decoder", "cross_attention, decoder")  # film tells the decoder's sites apart


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PARTS]
)
def test_new_part_starts_from_the_base_and_leaves_it_when_dropped(base, part):
    base_params, expected = base
    assert np.std(expected) > 0.1  # or the base itself would say nothing
    model = make(attention_factors=(), **PARTS[part])
    apply = denoiser(model)
    old = flatten_dict(base_params, sep="/")
    new = initial(model, seed=2, only=lambda path: path not in old)
    assert new and all("flow" in path or "drag" in path for path in new)
    none = [False, False]

    params = unflatten_dict(old | new, sep="/")
    out = apply(params, inputs(), drops(none, none, none))
    np.testing.assert_array_equal(out, expected)

    trained = unflatten_dict(old | randomize(new, seed=3), sep="/")
    out = apply(trained, inputs(), drops(none, none, [True, False]))
    np.testing.assert_array_equal(out[0], expected[0])
    assert np.std(out[1] - expected[1]) > 1e-3
