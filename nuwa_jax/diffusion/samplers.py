"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma.

Both are one step of the same form, x <- ratio x + (1 - ratio) E with ratio = sigma_next / sigma:
exact if D were constant over the step. Euler takes E = D, of first order; DPM-Solver++(2M)
(arXiv 2211.01095 algorithm 2) extrapolates E from the last two D, of second order at the same cost.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

METHODS = ("euler", "dpmpp_2m")


def sample(
    denoise: Callable[[Array, Array], Array],
    x: Float[Array, "b ..."],
    sigmas: Float[np.ndarray | Array, " n+1"],
    *,
    method: str = "dpmpp_2m",
) -> Float[Array, "b ..."]:
    """Takes noisy latents from level `sigmas[0]` to `sigmas[-1]`, in one `lax.scan`.

    Args:
      denoise: `(x, sigma scalar) -> x`, the estimate of the clean latents; called once per step.
      x: latents that are already at level `sigmas[0]` (`edm.initial_latents`, or `edm.add_noise`
        where a video is edited); their dtype is the sampler's.
      sigmas: strictly descending; the last may be 0 (`edm.karras_sigmas`).
      method: one of `METHODS`.

    Raises:
      ValueError: the method is unknown or there is no step.
    """
    if method not in METHODS:
        raise ValueError(f"expected a sampling method of {METHODS}, got {method!r}")
    if np.ndim(sigmas) != 1 or len(sigmas) < 2:
        raise ValueError(f"expected sigmas [n+1] of at least one step, got {np.shape(sigmas)}")
    sigmas = jnp.asarray(sigmas, jnp.promote_types(x.dtype, jnp.float32))
    ratio = sigmas[1:] / sigmas[:-1]
    past = jnp.zeros_like(ratio) if method == "euler" else _extrapolation(sigmas)

    def step(carry: tuple[Array, Array], level: tuple[Array, Array, Array]):
        x, previous = carry
        sigma, ratio, past = level
        denoised = denoise(x, sigma).astype(x.dtype)
        estimate = denoised + past * (denoised - previous)
        following = ratio * x + (1 - ratio) * estimate
        return (following.astype(x.dtype), denoised), None

    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), (sigmas[:-1], ratio, past))
    return x


def _extrapolation(sigmas: Float[Array, " n+1"]) -> Float[Array, " n"]:
    """How far each step of DPM-Solver++(2M) goes beyond D along its last change: h / (2 h_last).

    h is the step in -ln(sigma). The first step has no past, and one to sigma = 0 is infinitely
    long: both are of first order, which for the latter is x = D.
    """
    h = jnp.log(sigmas[:-1]) - jnp.log(jnp.where(sigmas[1:] > 0, sigmas[1:], sigmas[:-1]))
    past = jnp.concatenate([jnp.zeros((1,), h.dtype), h[1:] / (2 * h[:-1])])
    return jnp.where(sigmas[1:] > 0, past, 0)
