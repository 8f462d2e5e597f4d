"""What a sampling step costs: the denoiser and nothing that a sample needs only once."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr

from configs import tiny
from nuwa_jax.diffusion.guidance import GuidanceScales
from nuwa_jax.generation.generator import Generator
from nuwa_jax.generation.weights import Model
from nuwa_jax.models.video_ldm import VideoLDM

FRAMES, SIDE, BATCH = 3, 16, 2
STEPS = 4


@pytest.fixture(scope="module")
def generator() -> Generator:
    config = tiny.get_config()
    config.data.update(height=SIDE, width=SIDE, frames=FRAMES, max_drags=2)
    model = VideoLDM.from_config(config.model)
    size = dict(height=SIDE, width=SIDE, frames=FRAMES)
    # Shapes are enough: nothing is run.
    params = jax.eval_shape(lambda key: model.init(key, **size), jax.random.key(0))
    return Generator(Model(params, config, "shapes"))


def heavy(jaxpr: Jaxpr) -> collections.Counter:
    """How many convolutions and matrix products of each shape there are, nested ones included."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            shapes = tuple(v.aval.shape for v in (*equation.invars, *equation.outvars))
            found[(equation.primitive.name, shapes)] += 1
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                found += heavy(value.jaxpr)
    return found


def scans(jaxpr: Jaxpr) -> list:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation)
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                found += scans(value.jaxpr)
    return found


@pytest.mark.parametrize(("scale", "branches"), [(1.0, 1), (2.0, 2)])
def test_a_step_is_one_call_of_the_denoiser_and_nothing_else(generator, scale, branches):
    k, length = 2, generator.config.data.text_length
    shapes = [
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)),
        jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.uint8),
        jax.ShapeDtypeStruct((BATCH, length), jnp.int32),
        jax.ShapeDtypeStruct((BATCH, k, FRAMES, 2), jnp.float32),
        jax.ShapeDtypeStruct((BATCH, k, FRAMES), jnp.int32),
        None,
    ]
    sigmas = tuple(np.linspace(10, 0, STEPS + 1))
    guidance = GuidanceScales(1.0, 1.0, scale)
    run = generator._compile(guidance, sigmas, True)
    jaxpr = run.trace(generator.params, *shapes).jaxpr.jaxpr

    (scan,) = [s for s in scans(jaxpr) if s.params["length"] == STEPS]
    in_step = heavy(scan.params["jaxpr"].jaxpr)

    model, n = generator.model, BATCH * branches

    def condition(params: dict) -> object:
        return model.condition(
            params,
            frames=FRAMES,
            size=(SIDE, SIDE),
            image=jnp.zeros((n, SIDE, SIDE, 3)),
            text=jnp.zeros((n, length), jnp.int32),
            flow=jnp.zeros((n, FRAMES, SIDE, SIDE, 2)),
            points=jnp.zeros((n, k, FRAMES, 2)),
            state=jnp.zeros((n, k, FRAMES), jnp.int32),
            fps=jnp.zeros((n,)),
        )

    x = jnp.zeros((n, *model.latent_shape(SIDE, SIDE, FRAMES)))
    given = jax.eval_shape(condition, generator.params)
    denoise = jax.make_jaxpr(lambda p, c: model.denoise(p, x, jnp.ones((n,)), c))
    assert in_step == heavy(denoise(generator.params, given).jaxpr)
    # There is something that the step was spared.
    assert heavy(jax.make_jaxpr(condition)(generator.params).jaxpr).total() > 10
