"""The demo's whole run: conditions, flow, sampler, frames."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jax.experimental import io_callback
from jaxtyping import Array, Float

from nuwa_jax.diffusion import edm, samplers
from nuwa_jax.diffusion.guidance import guided_denoiser
from nuwa_jax.golden.compare import (
    Item,
    absolute,
    channels_last,
    compiled,
    elementwise,
    flow_last,
    guarded,
    relative,
    sums,
)
from nuwa_jax.golden.drags import FILTERED, demo_flow, demo_tracks
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.golden.model import Golden
from nuwa_jax.golden.numbers import SIGMAS, SINUSOIDS, check_guider_scale
from nuwa_jax.golden.pictures import AUTOENCODER, CLIP
from nuwa_jax.models.video_ldm import Condition, Drop, Params, to_float

START = 1e-6
SAMPLER = 2e-5
FRAMES = 1e-4
FRAMES_PART = r"frames_rows_off(\d+)_cols_off(\d+)_stride(\d+)"


class WatchedSampler:
    """The demo's sampler, compiled once; keeps what went in and out at every step of a run."""

    def __init__(self, golden: Golden) -> None:
        steps = int(golden.setting("sampler_config.num_steps"))
        self.sigmas = edm.karras_sigmas(steps, *golden.sigma_range)
        self.branches = golden.guidance.branches()
        self.x: list[np.ndarray] = []  # [b t h w c] at the start of every step
        self.raw: list[np.ndarray] = []  # [(branch b) t h w c], with the picture last
        self.guided: list[np.ndarray] = []
        self._model = golden.model
        self._compiled = compiled(self._run)

    def run(
        self, params: Params, conditions: Sequence[Condition], noise: Float[np.ndarray, "b t h w c"]
    ) -> Float[np.ndarray, "b t h w c"]:
        """Latents from standard normal noise; the conditions are without and with the picture."""
        self.x, self.raw, self.guided = [], [], []
        given = [conditions[keep.image] for _, keep in self.branches]
        latents = np.asarray(self._compiled(params, given, noise))
        jax.effects_barrier()
        return latents

    def _run(self, params: Params, conditions: list[Condition], noise: Array) -> Array:
        def denoise(x: Array, sigma: Array, condition: Condition) -> Array:
            out = self._model.denoise(params, x, sigma, condition)
            io_callback(lambda out: self.raw.append(np.asarray(out)), None, out, ordered=True)
            return out

        guided = guided_denoiser(denoise, conditions, [weight for weight, _ in self.branches])

        def watched(x: Array, sigma: Array) -> Array:
            out = guided(x, sigma)
            io_callback(self._keep, None, x, out, ordered=True)
            return out

        start = edm.initial_latents(noise, self.sigmas[0])
        return samplers.sample(watched, start, self.sigmas, method="euler")

    def _keep(self, x: Any, guided: Any) -> None:
        self.x.append(np.asarray(x))
        self.guided.append(np.asarray(guided))


sampler_of = functools.cache(WatchedSampler)  # both checks use the same compiled program


def check_sampler(golden: Golden) -> Iterator[Item]:
    """The demo's sampling run from its own conditions: every step of it."""
    arrays = golden.arrays("sampler")
    yield from arrays.require(
        [
            "init_noise",
            "sigmas",
            "sigma_next_gamma",
            "guider_scale",
            "x",
            "model_out_uncond_then_cond",
            "denoised_guided",
        ]
    )
    sigmas = sampler_of(golden).sigmas
    if "sigmas" in arrays:
        yield from guarded(arrays.name("sigmas"), _check_levels(arrays, "sigmas", sigmas))
    # gamma, the share of noise added anew, is zero: our sampler adds none.
    levels = np.stack([sigmas[:-1], sigmas[1:], np.zeros(len(sigmas) - 1)], axis=-1)
    if "sigma_next_gamma" in arrays:
        checks = _check_levels(arrays, "sigma_next_gamma", levels)
        yield from guarded(arrays.name("sigma_next_gamma"), checks)
    if "guider_scale" in arrays:
        checks = check_guider_scale(arrays, golden.guidance)
        yield from guarded(arrays.name("guider_scale"), checks)
    yield from guarded(arrays.name("x"), _check_steps(golden, arrays))


def _check_levels(arrays: Arrays, key: str, ours: Float[np.ndarray, "..."]) -> Iterator[Item]:
    yield elementwise(arrays.name(key), ours, arrays[key], SIGMAS)


def _check_steps(golden: Golden, arrays: Arrays) -> Iterator[Item]:
    given, sampler = golden.arrays("e2e"), sampler_of(golden)
    noise = channels_last(arrays["init_noise"])[None]
    params = golden.params("unet", "flow_encoder")

    @compiled
    def encode(params: Params, flow: Array) -> Any:
        model = golden.model
        return model.condition(params, flow=flow, frames=golden.frames, size=golden.size).flow

    features = encode(params, flow_last(given["flow"]))
    conditions = [
        Condition(
            concat=channels_last(given[f"{side}_concat"])[None],
            context=given[f"{side}_crossattn"][:1],
            context_mask=None,
            vector=given[f"{side}_vector"][:1],
            flow=features,
            drags=None,
        )
        for side in ("uc", "c")
    ]
    final = sampler.run(params, conditions, noise)
    steps = len(sampler.sigmas) - 1
    if "x" in arrays:
        reached = [*sampler.x, final]
        for i, theirs in enumerate(arrays["x"]):
            bound = SAMPLER if i > 0 else START
            note = golden.floor(f"sampler_final_latent_{steps}_steps") if i == steps else ""
            theirs = channels_last(theirs)[None]
            yield relative(f"{arrays.name('x')} {i}", reached[i], theirs, bound, note)
    for key, ours in (
        ("model_out_uncond_then_cond", sampler.raw),
        ("denoised_guided", sampler.guided),
    ):
        for i, theirs in enumerate(arrays[key] if key in arrays else ()):
            # Guidance of weight 1 throughout leaves one branch: the last.
            theirs = channels_last(theirs, golden.frames)[-len(ours[i]) :]
            yield relative(f"{arrays.name(key)} {i}", ours[i], theirs, SAMPLER)


def check_e2e(golden: Golden) -> Iterator[Item]:
    """From the demo's tracks, picture and noises to its frames, all by our own code."""
    arrays = golden.arrays("e2e")
    sides = [f"{side}_{part}" for side in ("c", "uc") for part in ("crossattn", "concat", "vector")]
    yield from arrays.require(["flow", *sides, "frames_sum_sumsq_per_frame"])
    yield from arrays.require_some({"frames_rows_offN_cols_offN_strideN": FRAMES_PART})
    (height, width), frames = golden.size, golden.frames
    gaussian = {key: golden.setting(f"gaussian.{key}") for key in ("sigma", "kernel_size")}
    tracks = demo_tracks(str(arrays["tracks_json"]), frames, height, width)
    flow = demo_flow(tracks, height, width, **gaussian)[None]
    if "flow" in arrays:
        yield absolute(arrays.name("flow"), flow, flow_last(arrays["flow"]), FILTERED)

    params = golden.params("autoencoder", "unet", "flow_encoder", "image_encoder")
    kept = Drop(*(jnp.zeros((1,), bool) for _ in range(3)))

    @compiled
    def both(params: Params, flow: Array, image: Array, noise: Array) -> list[Condition]:
        drops = (kept._replace(image=jnp.ones((1,), bool)), kept)
        given = {"image": image, "noise": noise, "flow": flow}
        return [golden.condition(params, drop=drop, **given) for drop in drops]

    image = to_float(jnp.asarray(arrays["first_frame_u8"]))[None]
    noise = channels_last(arrays["cond_aug_noise"])
    conditions = both(params, flow, image, noise)
    for side, condition in zip(("uc", "c"), conditions, strict=True):
        yield from _check_condition(arrays, side, condition, frames)

    noise = channels_last(arrays["init_noise"])[None]
    latents = sampler_of(golden).run(params, conditions, noise)
    decode = functools.partial(golden.model.decode, frames_per_call=1)  # as the demo
    video = np.asarray(compiled(decode)(params, latents))[0]
    for key, match in arrays.matching(FRAMES_PART).items():
        row, column, stride = map(int, match.groups())
        theirs = np.moveaxis(arrays[key], 2, -1)
        part = video[None, :, row::stride, column::stride]
        yield relative(arrays.name(key), part, theirs, FRAMES)
    key = "frames_sum_sumsq_per_frame"
    if key in arrays:
        yield sums(arrays.name(key), video, arrays[key], FRAMES)


def _check_condition(
    arrays: Arrays, side: str, condition: Condition, frames: int
) -> Iterator[Item]:
    for part, ours, bound in (
        ("crossattn", condition.context, CLIP),
        ("concat", np.moveaxis(condition.concat[0], -1, 1), AUTOENCODER),
        ("vector", condition.vector, SINUSOIDS),
    ):
        key = f"{side}_{part}"
        if key not in arrays:
            continue
        if len(ours) == 1:  # ours is one for all frames
            ours = repeat(np.asarray(ours), "1 ... -> t ...", t=frames)
        compare = absolute if part == "vector" else relative
        yield compare(arrays.name(key), ours, arrays[key], bound)
