"""From a picture and drags to a video: loads a model, compiles once per shape, samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from nuwa_jax.data.tokenizer import tokenizer_of
from nuwa_jax.diffusion import edm
from nuwa_jax.diffusion.guidance import GuidanceScales, guided_denoiser
from nuwa_jax.diffusion.samplers import sample
from nuwa_jax.errors import UserError
from nuwa_jax.generation.weights import Model, load_model
from nuwa_jax.models.lora import merge_lora
from nuwa_jax.models.video_ldm import Drop, VideoLDM, to_float, to_uint8
from nuwa_jax.motion.raster import rasterize
from nuwa_jax.parallel.sharding import to_host


class Generator:
    """A model that is ready to sample; `height`, `width` and `frames` are those of its videos."""

    def __init__(self, model: Model) -> None:
        if "data" not in model.config:
            raise UserError(
                f"{model.source} holds {', '.join(model.params)} alone, for train.init_from: "
                "give a whole model"
            )
        self.config: ml_collections.ConfigDict = model.config
        self.params = model.params
        self.source = model.source
        self.model = VideoLDM.from_config(self.config.model)
        data = self.config.data
        self.height, self.width, self.frames = data.height, data.width, data.frames
        self.fps = data.fps
        self._tokenize = tokenizer_of(self.config, folder=self.source)
        self.guidance = GuidanceScales(**{k: _scale(v) for k, v in self._sampling.guidance.items()})
        self._compiled = functools.cache(self._compile)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | None = None,
        stage: str | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        dtype: str | None = None,
    ) -> Generator:
        """The generator of `nuwa_jax.generation.weights.load_model`'s model.

        Args:
          checkpoint: see there.
          stage: see there.
          param_dtype: see there.
          dtype: to compute in; the config's `model.dtype` by default.
        """
        model = load_model(checkpoint, stage, param_dtype)
        if dtype is not None:
            model.config.model.dtype = dtype
        return cls(model)

    @property
    def _sampling(self) -> ml_collections.ConfigDict:
        return self.config.sampling

    def generate(
        self,
        image: UInt8[np.ndarray, "b h w 3"],
        points: Float[np.ndarray, "b k t 2"] | None = None,
        state: Int[np.ndarray, "b k t"] | None = None,
        text: Sequence[str] | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: GuidanceScales | None = None,
        video: UInt8[np.ndarray, "b t h w 3"] | None = None,
        strength: float = 1.0,
    ) -> UInt8[np.ndarray, "b t h w 3"]:
        """Samples one video per picture.

        Args:
          image: the first frames, at the model's size.
          points: drags in pixels of the model's size, or None to withhold them.
          state: their states (`nuwa_jax.motion.tracks.TrackState`).
          text: captions; none by default.
          seed: of the noise; sample i of a batch depends on the seed and on i alone.
          steps: sampling steps; the config's by default.
          guidance: scales; the config's by default.
          video: a clip to start from instead of noise alone, at the model's size.
          strength: with `video`, how much of it is remade: 1 all of it, near 0 almost nothing.

        Raises:
          ValueError: an array has another shape than the model's videos.
        """
        b = image.shape[0]
        size = (self.height, self.width)
        if image.shape[1:] != (*size, 3):
            raise ValueError(f"expected pictures [b {size[0]} {size[1]} 3], got {image.shape}")
        if points is not None and (points.shape[0] != b or points.shape[2] != self.frames):
            raise ValueError(
                f"expected drags [{b} k {self.frames} 2], got {points.shape}: the model makes "
                f"{self.frames} frames"
            )
        if video is not None and video.shape != (b, self.frames, *size, 3):
            raise ValueError(f"expected clips {(b, self.frames, *size, 3)}, got {video.shape}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength is in (0, 1], got {strength}")

        steps = steps or self._sampling.steps
        sigmas = self._sigmas(steps, strength if video is not None else 1.0)
        captions = text if text is not None else [""] * b
        tokens = np.stack([self._tokenize(t, self.config.data.text_length) for t in captions])
        run = self.program(sigmas, points is not None, guidance)
        if points is None:
            points = np.zeros((b, 1, self.frames, 2))
            state = np.zeros((b, 1, self.frames))
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(b))
        start = None if video is None else jnp.asarray(video)
        out = run(
            self.params,
            keys,
            jnp.asarray(image),
            jnp.asarray(tokens),
            jnp.asarray(points, jnp.float32),
            jnp.asarray(state, jnp.int32),
            start,
        )
        return to_host(out)

    def program(
        self,
        sigmas: Sequence[float] | None = None,
        with_drags: bool = True,
        guidance: GuidanceScales | None = None,
    ) -> jax.stages.Wrapped:
        """What `generate` runs, jitted: `run(params, keys, image, tokens, points, state, video)`.

        Args:
          sigmas: noise levels; the config's by default.
          with_drags: or they are withheld.
          guidance: scales; the config's by default.
        """
        if sigmas is None:
            sigmas = self._sigmas(self._sampling.steps, 1.0)
        return self._compiled(guidance or self.guidance, tuple(sigmas), with_drags)

    def _sigmas(self, steps: int, strength: float) -> Float[np.ndarray, " n+1"]:
        diffusion = self.config.diffusion
        sigmas = edm.karras_sigmas(steps, diffusion.sigma_min, diffusion.sigma_max)
        # A part of the schedule, from a lower level on: what is above that level stays the clip's.
        skipped = min(steps - 1, round(steps * (1 - strength)))
        return sigmas[skipped:]

    def _compile(
        self, guidance: GuidanceScales, sigmas: tuple[float, ...], with_drags: bool
    ) -> jax.stages.Wrapped:
        levels = np.asarray(sigmas)
        method = self._sampling.method
        temperature = self._sampling.get("temperature", 1.0)
        decode_frames = self._sampling.get("decode_frames", 0)
        branches = guidance.branches()
        raster = self.config.raster.to_dict()
        size = (self.height, self.width)
        model = self.model

        def run(
            params: dict,
            keys: PRNGKeyArray,
            image: UInt8[Array, "b h w 3"],
            tokens: Int[Array, "b l"],
            points: Float[Array, "b k t 2"],
            state: Int[Array, "b k t"],
            video: UInt8[Array, "b t h w 3"] | None,
        ) -> UInt8[Array, "b t h w 3"]:
            b = image.shape[0]
            params = merge_lora(params)
            flow = None
            if with_drags:
                flow = rasterize(points, state, *size, **raster)
            # Keys 0 and 1 of a sample: its latents' noise, the noise on its picture.
            latent_keys, picture_keys = (
                jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(keys) for n in range(2)
            )
            picture_noise = jax.vmap(lambda key: jax.random.normal(key, (*size, 3)))(picture_keys)
            conditions = [
                model.condition(
                    params,
                    frames=self.frames,
                    size=size,
                    image=to_float(image),
                    text=tokens,
                    flow=flow,
                    points=points if with_drags else None,
                    state=state if with_drags else None,
                    fps=jnp.full((b,), self.fps),
                    noise=picture_noise,
                    drop=Drop(*(jnp.full((b,), not kept) for kept in keep)),
                )
                for _, keep in branches
            ]
            denoise = guided_denoiser(
                functools.partial(model.denoise, params),
                conditions,
                [coefficient for coefficient, _ in branches],
            )
            shape = model.latent_shape(*size, self.frames)
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(latent_keys)
            if video is None:
                # Less noise to start from: fewer kinds of samples, but more likely ones.
                x = edm.initial_latents(temperature * noise, levels[0])
            else:
                x = edm.add_noise(model.encode(params, to_float(video)), noise, levels[0])
            latents = sample(denoise, x, levels, method=method)
            return to_uint8(model.decode(params, latents, decode_frames))

        return jax.jit(run)


def _scale(value: float | tuple[float, float] | None) -> float | tuple[float, float] | None:
    return tuple(value) if isinstance(value, list | tuple) else value
