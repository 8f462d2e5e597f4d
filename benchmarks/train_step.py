"""Times training steps against PyTorch's, and the loop against its compiled step, on this CPU.

    python -m benchmarks.train_step [--threads=2] [--part=both] [--repeats=7] [--channels=64]

`--part=step`: a step is this package's own (`make_train_step`): noise, the EDM denoising loss,
gradients, clipping by their global norm, AdamW, the running average of the weights, and the check
that all is finite. The other side is diffusers' U-Net with the same weights, the same loss and
`torch.optim.AdamW` in its fused form, clipping and running average by PyTorch's functions for lists
of tensors. Both start from the same weights and see the same noise in the first steps, whose losses
must agree; then they run in turns, each turn giving one ratio of ours to theirs, so that what else
the machine does weighs on both. Latents are given (`data.format="latents"`), the context is one
token, all in float32.

`--part=loop`: see `benchmarks.loop_overhead`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from einops import rearrange, repeat
from ml_collections import ConfigDict

from benchmarks import loop_overhead
from benchmarks.beside import (
    CONTEXT,
    IDS,
    VECTOR,
    diffusers_unet,
    limit_threads,
    print_pairs,
    random_params,
    timed,
)
from configs import common
from nuwa_jax.data.batch import Batch
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.models.layers import sinusoids
from nuwa_jax.models.video_ldm import Condition, VideoLDM
from nuwa_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from nuwa_jax.parallel.sharding import place
from nuwa_jax.training.curriculum import Stage
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import init_state
from nuwa_jax.training.step import draw, make_train_step, stage_key

CHECKED = 3  # steps whose losses must agree
LOSS_BOUND = 1e-4  # relative

_THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "Threads of either side.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Pairs of timed steps.", lower_bound=2)
_CHANNELS = flags.DEFINE_integer("channels", 64, "Channels of the first level (SVD: 320).")
_LEVELS = flags.DEFINE_integer(
    "levels", 4, "Levels of the U-Net, the last without attention.", 2, 4
)
_FRAMES = flags.DEFINE_integer("frames", 8, "Frames.")
_HEIGHT = flags.DEFINE_integer("height", 24, "Rows of the latents; divisible by 8.")
_WIDTH = flags.DEFINE_integer("width", 40, "Columns of the latents; divisible by 8.")
_KEEP_MEMORY = flags.DEFINE_bool(
    "keep_memory", True, "Between steps, as train.py does; it is for both sides."
)
_BATCH = flags.DEFINE_integer("batch", 1, "Clips per step.")
_PART = flags.DEFINE_enum("part", "both", ["step", "loop", "both"], "What is timed.")
_BLOCKS = flags.DEFINE_integer("blocks", 8, "With loop: pairs of timed blocks.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 10, "With loop: steps of a block.", lower_bound=1)
_CACHE = flags.DEFINE_string("cache", None, "Folder of compiled programs; by default a new one.")


class PlainLDM(VideoLDM):
    """The model with SVD's U-Net alone: its context is what the batch holds as text embedding."""

    def condition(
        self, params: dict, *, image_latents: Any, text_embedding: Any, frames: int, **_: Any
    ) -> Condition:
        ids = repeat(np.asarray(IDS, np.float32), "n -> b n", b=len(image_latents))
        return Condition(
            concat=repeat(image_latents, "b h w c -> b t h w c", t=frames),
            context=text_embedding,
            context_mask=None,
            vector=rearrange(sinusoids(ids, VECTOR), "b n c -> b (n c)"),
            flow=None,
            drags=None,
        )


def main(argv: Sequence[str]) -> None:
    del argv
    limit_threads(_THREADS.value, keep_memory=_KEEP_MEMORY.value)
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", _CACHE.value or cache)
        if _PART.value != "loop":
            compare()
        if _PART.value != "step":
            loop_overhead.measure(_BLOCKS.value, _STEPS.value)


def compare() -> None:
    """Builds both sides, checks that they do the same, and times them in turns."""
    if _CHANNELS.value % 64 or _HEIGHT.value % 8 or _WIDTH.value % 8:
        raise UserError(
            f"--channels must be divisible by 64, --height and --width by 8, got "
            f"{_CHANNELS.value}, {_HEIGHT.value} and {_WIDTH.value}: change them"
        )
    config, stage = _config(), _stage()
    model = PlainLDM.from_config(config.model)
    batch = _batch()
    x_shape = (*batch.latents.shape[:-1], 2 * batch.latents.shape[-1])
    params = random_params(model.unet, x_shape)
    count = sum(p.size for p in jax.tree.leaves(params))
    print(
        f"{_CHANNELS.value} channels, {_LEVELS.value} levels, {_BATCH.value} x {_FRAMES.value} "
        f"frames of {_HEIGHT.value} x {_WIDTH.value}, {count / 1e6:.0f} M parameters, float32, "
        f"threads: {_THREADS.value}",
        flush=True,
    )
    theirs = _Theirs(
        diffusers_unet(model.unet, params, frames=_FRAMES.value, threads=_THREADS.value), config
    )
    ours = _Ours(model, config, stage, params, batch)
    for step in range(CHECKED):
        key = jax.random.fold_in(stage_key(config.seed, stage.index), step)
        drawn = jax.device_get(draw(key, model, stage, batch, config.diffusion))
        a, b = ours.step(), theirs.step(batch, drawn.noise, drawn.sigma)
        print(f"step {step}: loss {a:.6f}, theirs {b:.6f}", flush=True)
        if not abs(a - b) <= LOSS_BOUND * abs(b):
            raise UserError("the losses differ: what would be timed is not the same step")
    times = [(timed(ours.step), timed(lambda: theirs.step(batch))) for _ in range(_REPEATS.value)]
    print_pairs("training step", times, "ours", "theirs")


class _Ours:
    def __init__(
        self, model: VideoLDM, config: ConfigDict, stage: Stage, params: dict, batch: Batch
    ) -> None:
        mesh = make_mesh(MeshConfig())
        latents = {"mean": np.zeros(4, np.float32), "scale": np.ones(4, np.float32)}
        everything = jax.tree.map(jax.numpy.asarray, {"unet": params, "latents": latents})
        self._state = place(init_state(everything, stage, make_optimizer(config.train)), mesh)
        del everything
        self._batch = jax.device_put(batch, batch_sharding(mesh))
        self._rate, self._share = (
            jax.device_put(np.float32(value), replicated(mesh))
            for value in (stage.learning_rate, 0.0)
        )
        self._step = make_train_step(model, config, stage, mesh)

    def step(self) -> float:
        self._state, metrics = self._step(self._state, self._batch, self._rate, self._share)
        return float(jax.block_until_ready(metrics)["loss"])


class _Theirs:
    """The same step in PyTorch, as its own functions do it fastest."""

    def __init__(self, unet: Any, config: ConfigDict) -> None:
        import torch

        self._torch, self._unet, self._config = torch, unet, config
        self._params = list(unet.parameters())
        train = config.train
        decayed = [p for p in self._params if p.ndim > 1]
        rest = [p for p in self._params if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": train.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=_stage().learning_rate,
            betas=(train.adam_b1, train.adam_b2),
            eps=1e-8,
            fused=True,
        )
        self._ema = [p.detach().clone() for p in self._params]
        self._done = 0

    def step(self, batch: Batch, noise: Any = None, sigma: Any = None) -> float:
        """One step; noise [b t h w c] and levels [b] are drawn unless given."""
        torch, config = self._torch, self._config
        clean = torch.from_numpy(np.asarray(batch.latents, np.float32)).permute(0, 1, 4, 2, 3)
        context = torch.from_numpy(np.asarray(batch.text_embedding, np.float32))
        if noise is None:
            noise = torch.randn(clean.shape)
            diffusion = config.diffusion
            sigma = torch.exp(diffusion.p_mean + diffusion.p_std * torch.randn(len(clean)))
        else:
            noise = torch.from_numpy(np.array(noise)).permute(0, 1, 4, 2, 3)
            sigma = torch.from_numpy(np.array(sigma))
        s = sigma[:, None, None, None, None]
        x = clean + s * noise
        c_in = 1 / torch.sqrt(s**2 + 1)
        ids = torch.tensor(IDS).repeat(len(clean), 1)
        inputs = torch.cat([x * c_in, clean[:, :1].expand_as(clean)], dim=2)
        out = self._unet(inputs, torch.log(sigma) / 4, context, ids).sample
        denoised = x / (s**2 + 1) - out * s * c_in
        loss = ((1 + 1 / s**2) * (denoised - clean) ** 2).mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._params, config.train.clip_norm, foreach=True)
        if torch.isfinite(loss) and torch.isfinite(norm):
            self._optimizer.step()
            rate = min(config.train.ema_decay, (1 + self._done) / (10 + self._done))
            torch._foreach_lerp_(self._ema, [p.detach() for p in self._params], 1 - rate)
        self._done += 1
        return float(loss.detach())


def _config() -> ConfigDict:
    config = common.base()
    config.data.update(
        height=8 * _HEIGHT.value, width=8 * _WIDTH.value, frames=_FRAMES.value, format="latents"
    )
    config.model.autoencoder = ConfigDict()
    config.model.unet = ConfigDict(
        dict(
            model_channels=_CHANNELS.value,
            channel_mult=(1, 2, 4, 4)[: _LEVELS.value],
            attention_factors=(1, 2, 4)[: _LEVELS.value - 1],
        )
    )
    config.model.image_mask = False
    return config


def _stage() -> Stage:
    return Stage(
        name="step",
        index=0,
        objective="denoise",
        condition="none",
        steps=1000,
        batch_size=_BATCH.value,
        learning_rate=1e-4,
        warmup_steps=0,
        rules=((r"^unet/", "train"), (r"^latents/", "freeze")),
    )


def _batch() -> Batch:
    rng = np.random.default_rng(1)
    b, t = _BATCH.value, _FRAMES.value
    return Batch(
        video=None,
        flow=None,
        points=np.zeros((b, 1, t, 2), np.float32),
        state=np.zeros((b, 1, t), np.uint8),
        text=np.zeros((b, 1), np.int32),
        fps=np.full(b, 6.0, np.float32),
        latents=rng.normal(size=(b, t, _HEIGHT.value, _WIDTH.value, 4)).astype(np.float16),
        text_embedding=rng.normal(size=(b, 1, CONTEXT)).astype(np.float16),
    )


if __name__ == "__main__":
    run_main(main)
