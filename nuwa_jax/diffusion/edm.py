"""EDM noise (Karras et al. 2022, arXiv 2206.00364): levels, preconditioning and the loss.

Latents are normalised per channel, so that sigma_data = 1 throughout; with the v-prediction scaling
below this is the denoiser of Stable Video Diffusion (`VScalingWithEDMcNoise`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


class Scalings(NamedTuple):
    """D(x; sigma) = skip * x + out * F(c_in * x; noise), F being the network."""

    skip: Float[Array, "..."]
    out: Float[Array, "..."]
    c_in: Float[Array, "..."]
    noise: Float[Array, "..."]


def scalings(sigma: Float[Array, "..."]) -> Scalings:
    """The v-prediction preconditioning with sigma_data = 1 (SVD)."""
    sigma = jnp.asarray(sigma)
    c_in = 1 / jnp.sqrt(sigma**2 + 1)
    return Scalings(skip=c_in**2, out=-sigma * c_in, c_in=c_in, noise=jnp.log(sigma) / 4)


def sample_sigmas(
    key: PRNGKeyArray, shape: tuple[int, ...], p_mean: float, p_std: float
) -> Float[Array, "..."]:
    """Noise levels for training: ln(sigma) ~ N(p_mean, p_std²).

    EDM uses (-1.2, 1.2) for small pictures, SVD (arXiv 2311.15127) (0.7, 1.6) for video, whose
    frames say much of each other, so that little noise leaves little to learn.
    """
    return jnp.exp(p_mean + p_std * jax.random.normal(key, shape))


def karras_sigmas(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> Float[np.ndarray, " n+1"]:
    """The levels of `n` sampling steps, descending, and a trailing 0 (EDM eq. 5).

    float64 on the host: they are constants of a compiled sampler.

    Raises:
      ValueError: `n` < 1 or not 0 < sigma_min < sigma_max.
    """
    if n < 1:
        raise ValueError(f"a sampler takes at least 1 step, got {n}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    root_max, root_min = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = np.linspace(root_max, root_min, n) ** rho
    return np.append(sigmas, 0.0)


def add_noise(
    clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], sigma: Float[Array, "..."]
) -> Float[Array, "b ..."]:
    """`clean` at noise level `sigma`, one for all or one per sample of the batch."""
    return clean + _per_sample(sigma, clean.ndim) * noise


def initial_latents(
    noise: Float[Array, "b ..."], sigma: float | Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Where sampling from nothing starts: data of unit variance at level `sigma`, all unknown.

    sqrt(1 + sigma²) rather than sigma, as SVD does: the variance of noisy data at that level.
    """
    return noise * jnp.sqrt(1 + jnp.asarray(sigma, noise.dtype) ** 2)


def loss_weight(sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / c_out², under which the network's own output has the same weight at every level."""
    return 1 + 1 / jnp.asarray(sigma) ** 2


def denoising_loss(
    denoised: Float[Array, "b ..."], clean: Float[Array, "b ..."], sigma: Float[Array, " b"]
) -> Float[Array, " b"]:
    """Weighted squared error per sample, the mean over everything but the batch; float32 or wider.

    For the network's output F it is mean (F - v)², v being the target of v-prediction.
    """
    wide = jnp.promote_types(denoised.dtype, jnp.float32)
    error = denoised.astype(wide) - clean.astype(wide)
    return loss_weight(sigma) * jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def _per_sample(sigma: Float[Array, "..."], ndim: int) -> Float[Array, "..."]:
    sigma = jnp.asarray(sigma)
    return sigma.reshape(sigma.shape + (1,) * (ndim - sigma.ndim)) if sigma.ndim else sigma
