"""bfloat16 is for activations and products: sums of many, statistics and state are float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from micro_config import get_config

from nuwa_jax.data.batch import Batch
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.training.curriculum import partition_for, stages_from_config
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import TrainState
from nuwa_jax.training.step import make_train_step

HALF = (jnp.bfloat16, jnp.float16)
SIZE = dict(height=16, width=24, frames=3)


def abstract_step(stage_name):
    """The jaxpr of a bfloat16 training step; nothing is computed."""
    config = get_config()
    config.model.dtype = "bfloat16"
    config.model.drag.forms = ("query_key", "tokens")
    model = VideoLDM.from_config(config.model)
    stage = {stage.name: stage for stage in stages_from_config(config)}[stage_name]
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **SIZE))
    trained, frozen = partition_for(stage, params)
    shape = jax.ShapeDtypeStruct
    count = shape((), np.int32)
    moments = jax.eval_shape(make_optimizer(config.train).init, trained)
    batch = Batch(
        video=shape((2, 3, 16, 24, 3), np.uint8),
        flow=shape((2, 3, 16, 24, 2), np.float16),
        points=shape((2, 2, 3, 2), np.float32),
        state=shape((2, 2, 3), np.uint8),
        text=shape((2, 8), np.int32),
        fps=shape((2,), np.float32),
    )
    state = TrainState(count, count, trained, frozen, trained, moments)
    rate = shape((), np.float32)
    step = make_train_step(model, config, stage)
    return jax.make_jaxpr(step)(state, batch, rate, rate)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def accumulates(equation):
    """Whether it makes one number of several in half precision, other than as a matrix product."""
    given = [v.aval for v in equation.invars if getattr(v.aval, "dtype", None) in HALF]
    name = equation.primitive.name
    if not given or not name.startswith(("reduce_", "cumsum", "scatter-add")):
        return False
    # Leaving out an axis of length one sums nothing.
    return name == "cumsum" or given[0].size > equation.outvars[0].aval.size or "add" in name


@pytest.mark.parametrize("stage", ["autoencoder", "drag"])
def test_nothing_is_summed_in_half_precision(stage):
    jaxpr = abstract_step(stage)
    found = list(equations(jaxpr.jaxpr))
    wrong = [str(e.source_info.name_stack) + ": " + str(e)[:200] for e in found if accumulates(e)]
    assert not wrong, "\n".join(wrong)
    # The forward pass is half precision nevertheless.
    kinds = {"dot_general", "conv_general_dilated"}
    products = [e for e in found if e.primitive.name in kinds]
    narrow = [e for e in products if e.invars[0].aval.dtype == jnp.bfloat16]
    assert len(narrow) > len(products) / 2
    assert {out.dtype for out in jaxpr.out_avals} == {np.dtype(np.float32), np.dtype(np.int32)}
