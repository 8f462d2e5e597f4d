"""Low-rank updates of the U-Net's matrices (Hu et al. 2021, arXiv 2106.09685).

DragNUWA 1.5 was trained through one of rank 32 on every linear layer. They are kept apart from the
matrices: `params["lora"]` mirrors the paths of what it changes, and a kernel is used as
`kernel + down @ up`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

Params = dict[str, Any]
# Linear layers of the base; flow and drag layers are trained in full.
_BASE_KERNEL = re.compile(r"^unet/(?!.*(flow_|drag_)).*/kernel$")


def init_lora(key: PRNGKeyArray, params: Mapping[str, Any], rank: int) -> Params:
    """Updates of `rank` for every linear layer of the base U-Net in `params`; they start as zero.

    `down` is normal with deviation 1 / rank and `up` is zero, as in the released code.
    """
    kernels = {
        path: leaf.shape
        for path, leaf in flatten_dict(params, sep="/").items()
        if _BASE_KERNEL.match(path) and len(leaf.shape) == 2
    }
    updates = {}
    for one, (path, (inputs, outputs)) in zip(
        jax.random.split(key, len(kernels)), sorted(kernels.items()), strict=True
    ):
        module = path.removesuffix("/kernel")
        updates[f"{module}/down"] = jax.random.normal(one, (inputs, rank)) / rank
        updates[f"{module}/up"] = jnp.zeros((rank, outputs))
    return unflatten_dict(updates, sep="/")


def merge_lora(params: Params) -> Params:
    """`params` without "lora", every update added to its kernel; as they are if there is none."""
    if "lora" not in params:
        return params
    flat = flatten_dict({k: v for k, v in params.items() if k != "lora"}, sep="/")
    updates = flatten_dict(params["lora"], sep="/")
    for path, down in updates.items():
        module, _, half = path.rpartition("/")
        if half == "down":
            kernel = flat[f"{module}/kernel"]
            update = jnp.matmul(down, updates[f"{module}/up"], precision="highest")
            flat[f"{module}/kernel"] = kernel + update.astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")
