"""What a block keeps of its forward pass for the backward pass; the rest is computed anew.

By name, from most memory and least work to least memory:

  none       everything
  dots       what matrix products and convolutions give, and attention; norms, activations and small
             attention's weights are made anew
  branches   a block's input, what attention gives, and what attention and feed-forward layers add:
             of these layers the last products and all attention are computed once
  attention  a block's input and what attention gives: no attention is computed twice
  block      a block's input
  offload    a block's input, in the host's memory: TPU and GPU only

Chen et al. 2016 (arXiv 1604.06174) and, for what is kept, Korthikanti et al. 2022 (arXiv
2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from nuwa_jax.errors import UserError
from nuwa_jax.models.attention import OUTPUT
from nuwa_jax.models.layers import BRANCH
from nuwa_jax.models.partition import platform

POLICIES = ("none", "dots", "branches", "attention", "block", "offload")
INPUT = "block_input"
# Offloading is asked of the runtime for these; XLA on CPU has no memory but its own.
OFFLOADING = ("tpu", "gpu")


def block_input(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Names what enters a block, by which a policy may move it to the host."""
    return checkpoint_name(x, INPUT)


def rematerialized(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module whose backward pass is by a policy of `POLICIES`.

    Raises:
      UserError: the platform cannot offload.
    """
    if policy == "none":
        return block
    if policy == "offload" and platform() not in OFFLOADING:
        raise UserError(
            f"model.unet.remat='offload' needs a TPU or GPU beside the host's memory, this program "
            f"is for {platform().upper()}: set it to 'block'"
        )
    return nn.remat(block, policy=policy_of(policy))


def check_policy(name: Any) -> None:
    """Raises a UserError that names the policies, where there is none of that name."""
    if name not in POLICIES:
        new = {True: "; True is now 'block'", False: "; False is now 'none'"}
        hint = new[name] if isinstance(name, bool) else ""
        raise UserError(f"model.unet.remat must be one of {POLICIES}, got {name!r}{hint}")


def policy_of(name: str) -> Callable[..., Any] | None:
    """What `jax.checkpoint` takes for a policy other than "none"; None keeps nothing."""
    policies = jax.checkpoint_policies
    if name == "attention":
        return policies.save_only_these_names(OUTPUT)
    if name == "branches":
        return policies.save_only_these_names(OUTPUT, BRANCH)
    if name == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return _products if name == "dots" else None


def _products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Products with weights, of which none has a batch axis, and attention.

    Products of attention with its own weights would be as many as its scores.
    """
    policies = jax.checkpoint_policies
    return (
        primitive is jax.lax.conv_general_dilated_p
        or policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
        or policies.save_only_these_names(OUTPUT)(primitive, *args, **params)
    )
