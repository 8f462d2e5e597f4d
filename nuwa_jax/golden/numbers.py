"""What needs no network: noise levels, embeddings, LoRA folding."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nuwa_jax.convert.lora import fold_lora
from nuwa_jax.diffusion import edm
from nuwa_jax.diffusion.guidance import GuidanceScales, guided_denoiser
from nuwa_jax.golden.compare import Item, absolute, elementwise, exact, guarded, relative
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.golden.model import Golden
from nuwa_jax.models.layers import sinusoids
from nuwa_jax.models.lora import merge_lora

SIGMAS = 5e-6  # the reference takes the seventh power in float32
SCALINGS = 2e-6  # the reference's float32 1/(s² + 1) at s = 700 is itself rounded
SINUSOIDS = 2e-5
BLOCK = 1e-6


def check_scalars(golden: Golden) -> Iterator[Item]:
    """Noise levels, preconditioning, guidance scales, sinusoids."""
    arrays = golden.arrays("scalars")
    yield from arrays.require([f"sigmas_{golden.setting('sampler_config.num_steps')}"])
    yield from arrays.require_some({"sigmas_N_sigma_max_S_default": r"sigmas_\d+_sigma_max_.+"})
    low, high, rho = golden.sigma_range
    for key, match in arrays.matching(r"sigmas_(\d+)(?:_sigma_max_([\d.]+)\w*)?").items():
        top = float(match[2]) if match[2] else high
        ours = edm.karras_sigmas(int(match[1]), low, top, rho)
        yield elementwise(arrays.name(key), ours, arrays[key], SIGMAS)
    yield from guarded(arrays.name("sigma"), _scalings(arrays))
    yield from guarded(arrays.name("guider_scale"), check_guider_scale(arrays, golden.guidance))
    yield from guarded(arrays.name("timestep_in"), _sinusoids(arrays))


def check_guider_scale(arrays: Arrays, scales: GuidanceScales) -> Iterator[Item]:
    """The weight of the conditional branch per frame: what guidance makes of 1 and 0."""
    theirs = arrays["guider_scale"]
    branches = scales.branches()
    given = [{"image": jnp.full((1, 1), float(keep.image))} for _, keep in branches]
    guided = guided_denoiser(
        lambda x, sigma, condition: jnp.broadcast_to(condition["image"], x.shape),
        given,
        [coefficient for coefficient, _ in branches],
    )
    ours = guided(jnp.zeros((1, theirs.shape[-1])), jnp.ones(()))
    yield elementwise(arrays.name("guider_scale"), ours, theirs.reshape(1, -1), SCALINGS)


def check_lora(golden: Golden) -> Iterator[Item]:
    """Linear layers with their low-rank update unfolded, folded and left out."""
    arrays = golden.arrays("lora")
    yield from arrays.require_some({"PLACE|key": r".+\|key"})
    for place in arrays.places():
        name = arrays.name(place)
        yield from guarded(name, _check_linear(golden, arrays.at(place)))


def _check_linear(golden: Golden, arrays: Arrays) -> Iterator[Item]:
    module, scale = str(arrays["key"]), float(arrays["scale"])
    x, weight = arrays["x"], arrays["W"]
    linear = f"{module}.linear"
    stored = {
        f"{linear}.weight": weight,
        f"{module}.lora_down.weight": arrays["down"],
        f"{module}.lora_up.weight": arrays["up"],
    }
    # A bias that the layer has must be there, too.
    has_bias = f"{linear}.bias" in golden.weights
    if has_bias or "b" in arrays:
        stored[f"{linear}.bias"] = arrays["b"]
    for key, value in stored.items():
        yield exact(golden.weights.name(key), golden.weights[key].astype(np.float32), value)
    yield exact(arrays.name("scale"), scale, float(golden.setting("lora_scale")))

    folded = fold_lora(stored, scale)
    bias = folded.get(f"{module}.bias", np.float32(0))

    def linear_layer(weight: Float[np.ndarray, "o i"]) -> Array:
        return jnp.matmul(x, weight.T) + bias

    ours = folded[f"{module}.weight"]
    yield relative(arrays.name("W_folded"), ours, arrays["W_folded"], BLOCK)
    yield relative(
        f"{arrays.name('W_folded')} of the weights",
        golden.state[f"{module}.weight"],
        arrays["W_folded"],
        BLOCK,
    )
    kept_apart = merge_lora(
        {
            "unet": {"layer": {"kernel": jnp.asarray(weight.T)}},
            "lora": {"unet": {"layer": {"down": arrays["down"].T, "up": scale * arrays["up"].T}}},
        }
    )["unet"]["layer"]["kernel"]
    name = f"{arrays.name('W_folded')} kept apart"
    yield relative(name, kept_apart.T, arrays["W_folded"], BLOCK)
    for key in ("out_unfolded", "out_folded"):
        yield relative(arrays.name(key), linear_layer(ours), arrays[key], BLOCK)
    yield relative(
        arrays.name("out_base_only"), linear_layer(weight), arrays["out_base_only"], BLOCK
    )


def _scalings(arrays: Arrays) -> Iterator[Item]:
    names = ("c_skip", "c_out", "c_in", "c_noise")
    yield from arrays.require(names)
    ours = edm.scalings(jnp.asarray(arrays["sigma"]))
    for key, value in zip(names, ours, strict=True):
        if key in arrays:
            yield elementwise(arrays.name(key), value, arrays[key], SCALINGS, tiny=0.05)


def _sinusoids(arrays: Arrays) -> Iterator[Item]:
    yield from arrays.require(
        ["timestep_embedding_dim_mc", "frame_embedding_dim_mc", "vector_embedding"]
    )
    for key, numbers in (
        ("timestep_embedding_dim_mc", arrays["timestep_in"]),
        ("frame_embedding_dim_mc", None),
        ("vector_embedding", arrays["vector_ids_fps_motion_aug"]),
    ):
        if key not in arrays:
            continue
        theirs = arrays[key]
        numbers = np.arange(len(theirs)) if numbers is None else numbers
        width = theirs.size // len(numbers)
        ours = jax.jit(sinusoids, static_argnums=1)(jnp.asarray(numbers, jnp.float32), width)
        yield absolute(arrays.name(key), ours.reshape(theirs.shape), theirs, SINUSOIDS)
