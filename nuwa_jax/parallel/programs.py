"""The programs of a run as the compiler gets them: shapes and shardings in place of arrays."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, Sharding

from nuwa_jax.data.batch import Batch
from nuwa_jax.data.config import DataConfig
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.parallel.mesh import OnMesh, batch_sharding, replicated
from nuwa_jax.parallel.sharding import shardings
from nuwa_jax.training.curriculum import Params, Stage
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import TrainState, fresh_state
from nuwa_jax.training.step import init_key, make_train_step


def abstract_params(config: ml_collections.ConfigDict) -> Params:
    """The shapes of the model's parameters."""
    config = copy.deepcopy(config)
    with config.unlocked():
        config.model.unet.remat = "none"  # no matter for shapes, and some ask for the real device
    model, data = VideoLDM.from_config(config.model), config.data
    size = dict(height=data.height, width=data.width, frames=data.frames)
    return jax.eval_shape(lambda: model.init(init_key(config.seed), **size))


def abstract_state(config: ml_collections.ConfigDict, stage: Stage) -> TrainState:
    """The shapes of what a stage's step carries forward.

    Raises:
      UserError: the stage's rules do not fit the parameters.
    """
    params, optimizer = abstract_params(config), make_optimizer(config.train)
    return jax.eval_shape(lambda params: fresh_state(params, stage, optimizer), params)


def abstract_batch(config: ml_collections.ConfigDict, stage: Stage) -> Batch:
    """The shapes of a batch over all hosts, as the data pipeline makes it.

    Clips with text embeddings are not thought of: the text encoder runs.
    """
    model, data = VideoLDM.from_config(config.model), DataConfig.from_config(config.data)
    b, t, h, w = stage.batch_size, data.frames, data.height, data.width
    latents = data.format == "latents"
    shown = 1 if latents else t
    picture = not latents or model.image_encoder is not None or model.augmentation > 0
    divisor = data.flow_divisor
    array = jax.ShapeDtypeStruct
    return Batch(
        video=array((b, shown, h, w, 3), jnp.uint8) if picture else None,
        flow=(
            array((b, t, h // divisor, w // divisor, 2), jnp.float16) if stage.needs_flow else None
        ),
        points=array((b, data.max_drags, t, 2), jnp.float32),
        state=array((b, data.max_drags, t), jnp.uint8),
        text=array((b, data.text_length), jnp.int32),
        fps=array((b,), jnp.float32),
        flip=array((b,), bool) if data.flip_probability else None,
        latents=array((b, *model.latent_shape(h, w, t)), jnp.float16) if latents else None,
    )


def train_step(
    config: ml_collections.ConfigDict, stage: Stage, mesh: Mesh
) -> tuple[OnMesh, tuple[Any, ...]]:
    """A stage's step, as the training loop makes it, and its arguments on a mesh."""
    step = make_train_step(VideoLDM.from_config(config.model), config, stage, mesh)
    state = abstract_state(config, stage)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return step, (
        _on(state, shardings(state, mesh)),
        _on_all(abstract_batch(config, stage), batch_sharding(mesh)),
        scalar,
        scalar,
    )


def sampler(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[OnMesh, tuple[Any, ...]]:
    """What samples videos with drags, and its arguments: one video for every part of the batch."""
    from nuwa_jax.generation.generator import Generator
    from nuwa_jax.generation.weights import Model

    params = abstract_params(config)
    generator = Generator(Model(params, config, "abstract"))
    data, each = config.data, batch_sharding(mesh)
    b = mesh.shape["data"] * mesh.shape["fsdp"]
    array = jax.ShapeDtypeStruct
    inputs = (
        array((b,), jax.eval_shape(lambda: jax.random.key(0)).dtype),
        array((b, data.height, data.width, 3), jnp.uint8),
        array((b, data.text_length), jnp.int32),
        array((b, data.max_drags, data.frames, 2), jnp.float32),
        array((b, data.max_drags, data.frames), jnp.int32),
    )
    arguments = (_on(params, shardings(params, mesh)), *_on_all(inputs, each), None)
    return OnMesh(generator.program(), mesh), arguments


def _on(tree: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree, where
    )


def _on_all(tree: Any, sharding: Sharding) -> Any:
    return _on(tree, jax.tree.map(lambda _: sharding, tree))
