"""One training step: losses, gradients, update; all of it inside one compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from nuwa_jax.data.batch import Batch
from nuwa_jax.data.device import complete
from nuwa_jax.diffusion import edm
from nuwa_jax.errors import UserError
from nuwa_jax.models.lora import merge_lora
from nuwa_jax.models.partition import platform
from nuwa_jax.models.video_ldm import Drop, VideoLDM, to_float
from nuwa_jax.motion.raster import rasterize
from nuwa_jax.parallel import fsdp
from nuwa_jax.parallel.mesh import OnMesh
from nuwa_jax.parallel.sharding import shardings
from nuwa_jax.training.curriculum import Params, Stage, merge
from nuwa_jax.training.optim import clip_by_norm, ema_update, make_optimizer
from nuwa_jax.training.state import TrainState

Metrics = dict[str, Array]
Changing = tuple[Params, Params, Any]  # parameters, their running average, optimizer's state
TrainStep = Callable[[TrainState, Batch, float, float], tuple[TrainState, Metrics]]


def make_train_step(
    model: VideoLDM, config: Any, stage: Stage, mesh: Mesh | None = None
) -> TrainStep:
    """Compiles the step of a stage, for the mesh that its arguments lie on.

    Args:
      model: the network.
      config: the run's.
      stage: what is trained, and on what.
      mesh: every part of the state comes back where `parallel.sharding` puts it; None: wherever
        the compiler leaves it, which on one device is there.

    Returns:
      `step(state, batch, learning_rate, progress) -> (state, metrics)`; `state` is donated,
      `progress` in [0, 1] is the share of the stage that is done, and metrics are scalars on the
      device. A step whose loss or gradient is not finite changes neither the parameters nor the
      optimizer nor the running average; `metrics["skipped"]` counts such steps in a row.

    The batch size must be a multiple of `config.train.accumulate`.
    """
    train = config.train
    optimizer = make_optimizer(train)
    loss_fn = make_loss(model, config, stage)
    reduce_dtype = fsdp.reduce_dtype(train.reduce_dtype)

    def gradients(
        params: Params,
        frozen: Params,
        data: tuple[Batch, Draws],
        progress: Array,
        ready: Callable[[Params], Params] = lambda params: params,
    ) -> Any:
        grad_fn = jax.value_and_grad(
            lambda params, b, d: loss_fn(ready(merge(params, frozen)), b, d, progress),
            has_aux=True,
        )
        return _accumulate(grad_fn, params, data, train.accumulate)

    def gradients_of_shards(
        params: Params,
        frozen: Params,
        dimensions: tuple[Params, Params],
        data: tuple[Batch, Draws],
        progress: Array,
    ) -> Any:
        def ready(params: Params) -> Params:
            how = fsdp.Exchange(model.dtype, reduce_dtype, fsdp.rings(mesh))
            return fsdp.boxed(params, merge(*dimensions), how, model.modules)

        return gradients(params, frozen, data, progress, ready)

    def step(
        state: TrainState, batch: Batch, learning_rate: Array, progress: Array
    ) -> tuple[TrainState, Metrics]:
        _check_precomputed(model, config, stage, batch, state)
        batch = complete(batch, config.data.height, config.data.width)
        key = jax.random.fold_in(stage_key(config.seed, stage.index), state.step)
        draws = draw(key, model, stage, batch, config.diffusion)
        if fsdp.is_needed(mesh):
            (loss, metrics), grads = fsdp.over_devices(
                gradients_of_shards,
                mesh,
                state.params,
                state.frozen,
                (batch, draws),
                jnp.asarray(progress, jnp.float32),
            )
        else:
            (loss, metrics), grads = gradients(state.params, state.frozen, (batch, draws), progress)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(changing: Changing, grads: Params) -> Changing:
            params, ema, opt_state = changing
            grads = clip_by_norm(grads, norm, train.clip_norm)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
            return params, ema_update(ema, params, state.step, train.ema_decay), opt_state

        before = (state.params, state.ema, state.opt_state)
        if platform() == "cpu":
            # A choice between new and old arrays makes XLA copy the state there. For a TPU it does
            # not, and to compile a branch takes twice the memory.
            after = jax.lax.cond(finite, update, lambda changing, _: changing, before, grads)
        else:
            choose = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
            after = jax.tree.map(choose, update(before, grads), before)
        params, ema, opt_state = after
        skipped = jnp.where(finite, 0, state.skipped + 1)
        state = TrainState(
            step=state.step + 1,
            skipped=skipped,
            params=params,
            frozen=state.frozen,
            ema=ema,
            opt_state=opt_state,
        )
        return state, {"loss": loss, "grad_norm": norm, "skipped": skipped, **metrics}

    if mesh is None:
        return jax.jit(step, donate_argnums=0)

    def placed(*args: Any) -> tuple[TrainState, Metrics]:
        state, metrics = step(*args)
        where = shardings(state, mesh)
        state = jax.tree.map(jax.lax.with_sharding_constraint, state, where)
        return state, metrics

    return OnMesh(jax.jit(placed, donate_argnums=0), mesh)


class Draws(NamedTuple):
    """All that is random in a step, drawn for the whole batch before it is cut up.

    So micro-batches see exactly what one large batch would.
    """

    noise: Float[Array, "b t h w c"]
    sigma: Float[Array, " b"]
    drop: Drop
    picture: Float[Array, "b h w 3"] | None  # normal; for models that blur what they are shown
    dense: Float[Array, " b"]  # uniform in [0, 1): below the probability, the dense flow is shown


def draw(key: PRNGKeyArray, model: VideoLDM, stage: Stage, batch: Batch, diffusion: Any) -> Draws:
    """Noise (standard normal), noise levels (log-normal), and who goes without what."""
    keys = dict(
        zip(
            ("noise", "sigma", "text", "image", "drag", "dense", "picture"),
            jax.random.split(key, 7),
            strict=True,
        )
    )
    b = batch.fps.shape[0]
    if batch.latents is None:
        shape = (b, *model.latent_shape(*batch.video.shape[2:4], batch.frames))
    else:
        shape = batch.latents.shape

    def dropped(name: str) -> Bool[Array, " b"]:
        return jax.random.bernoulli(keys[name], getattr(stage.drop, name), (b,))

    return Draws(
        noise=jax.random.normal(keys["noise"], shape),
        sigma=edm.sample_sigmas(keys["sigma"], (b,), diffusion.p_mean, diffusion.p_std),
        drop=Drop(text=dropped("text"), image=dropped("image"), drag=dropped("drag")),
        picture=(
            jax.random.normal(keys["picture"], (b, *batch.video.shape[2:]))
            if model.augmentation
            else None
        ),
        dense=jax.random.uniform(keys["dense"], (b,)),
    )


def make_loss(model: VideoLDM, config: Any, stage: Stage) -> Callable[..., Any]:
    """`loss(params, batch, draws, progress) -> (scalar, metrics)` of the stage's objective."""
    if stage.objective == "reconstruct":
        train = config.train

        def reconstruct(
            params: Params, batch: Batch, draws: Draws, progress: Array
        ) -> tuple[Array, Metrics]:
            del progress
            video = to_float(batch.video)
            mean, log_variance = model.posterior(params, video)
            z = mean + jnp.exp(0.5 * log_variance) * draws.noise
            error = model.decode_raw(params, z) - video
            l1, mse = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
            # KL divergence from N(0, 1), per latent value (Kingma & Welling 2014, appendix B).
            kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
            loss = train.l1_weight * l1 + train.mse_weight * mse + train.kl_weight * kl
            return loss, {"l1": l1, "mse": mse, "kl": kl}

        return reconstruct

    def denoise(
        params: Params, batch: Batch, draws: Draws, progress: Array
    ) -> tuple[Array, Metrics]:
        params = merge_lora(params)
        if batch.latents is None:
            clean = jax.lax.stop_gradient(model.encode(params, to_float(batch.video)))
        else:
            clean = batch.latents.astype(jnp.float32)
        x = clean + draws.sigma[:, None, None, None, None] * draws.noise
        condition = training_condition(model, params, config, stage, batch, draws, progress)
        denoised = model.denoise(params, x, draws.sigma, condition)
        return jnp.mean(edm.denoising_loss(denoised, clean, draws.sigma)), {}

    return denoise


def training_condition(
    model: VideoLDM,
    params: Params,
    config: Any,
    stage: Stage,
    batch: Batch,
    draws: Draws,
    progress: Array,
) -> Any:
    """What the model is shown of a batch in this stage (`model.condition`)."""
    h, w = config.data.height, config.data.width
    flow = points = state = None
    if stage.condition == "flow":
        flow = batch.flow.astype(jnp.float32)
    elif stage.condition == "drag":
        points, state = batch.points, batch.state.astype(jnp.int32)
        flow = rasterize(points, state, h, w, **config.raster)
        if stage.needs_flow:
            start, end = stage.dense_to_sparse
            dense = draws.dense < start + (end - start) * progress
            flow = jnp.where(dense[:, None, None, None, None], batch.flow.astype(flow.dtype), flow)
    precomputed = {}
    if batch.latents is not None and not model.augmentation:
        precomputed["image_latents"] = batch.latents[:, 0].astype(jnp.float32)
    if batch.text_embedding is not None:
        precomputed["text_embedding"] = batch.text_embedding.astype(jnp.float32)
    return model.condition(
        params,
        frames=batch.frames,
        size=(h, w),
        image=None if batch.video is None else to_float(batch.video[:, 0]),
        text=batch.text,
        flow=flow,
        points=points,
        state=state,
        fps=batch.fps,
        noise=draws.picture,
        drop=draws.drop,
        **precomputed,
    )


def _check_precomputed(
    model: VideoLDM, config: Any, stage: Stage, batch: Batch, state: TrainState
) -> None:
    """Looks, while the step is traced, at what was prepared for perhaps another model."""
    if batch.latents is not None:
        expected = model.latent_shape(config.data.height, config.data.width, config.data.frames)
        if batch.latents.shape[1:] != expected:
            raise UserError(
                f"the prepared latents have shape {batch.latents.shape[1:]}, this model's are "
                f"{expected}: prepare the clips with its autoencoder, or set "
                'data.format="video"'
            )
    if batch.text_embedding is not None and "text" in state.params:
        raise UserError(
            f"stage {stage.name} trains the text encoder, but the clips hold text embeddings that "
            f"were made beforehand: freeze text/ in stages.{stage.name}.rules, or prepare the "
            "clips without text embeddings"
        )


def init_key(seed: int) -> PRNGKeyArray:
    """The key that initialises the parameters."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def stage_key(seed: int, index: int) -> PRNGKeyArray:
    """The key from which each step of a stage folds its own; never the one of `init_key`."""
    return jax.random.fold_in(jax.random.key(seed), 1 + index)


def _accumulate(grad_fn: Callable[..., Any], params: Params, data: Any, parts: int) -> Any:
    """Mean of `grad_fn(params, *part)` over equal parts of the batch, one part in memory at a time.

    Part i takes every `parts`-th sample, which leaves samples on the devices they are on.
    """
    if parts == 1:
        return grad_fn(params, *data)
    split = jax.tree.map(lambda a: rearrange(a, "(b parts) ... -> parts b ...", parts=parts), data)
    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda a: a[0], split))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, *part)), None

    total, _ = jax.lax.scan(add, zero, split)
    return jax.tree.map(lambda a: a / parts, total)
