"""The whole U-Net with its flow encoder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

from nuwa_jax.diffusion import edm
from nuwa_jax.golden.blocks import differ_by_frame, one_context_per_frame
from nuwa_jax.golden.compare import (
    FAULTS,
    Item,
    as_float,
    channels_last,
    compiled,
    complaint,
    elementwise,
    flow_last,
    guarded,
    relative,
)
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.golden.model import Golden
from nuwa_jax.golden.numbers import SCALINGS
from nuwa_jax.models.flow_encoder import FlowEncoder, FlowHeads
from nuwa_jax.models.unet import UNet

NETWORK = 7e-6
# b{videos}_[ioi_|zero_flow_|ctx{tokens}tok_]out[_sigma_{sigma}][_float64]
OUTPUT = r"b(\d+)_(?:(ioi|zero_flow)_|ctx(\d+)tok_)?out(?:_sigma_([\d.]+))?(?:_float64)?"


class Case(NamedTuple):
    """One video through the U-Net."""

    x: Float[np.ndarray, "t h w c"]
    c_noise: float
    context: Float[np.ndarray, "t l c"]
    vector: Float[np.ndarray, " v"]
    flow: Float[np.ndarray, "t H W 2"]
    image_only: Bool[np.ndarray, " t"]


def check_unet(golden: Golden) -> Iterator[Item]:
    """Every run of the file: noise levels, contexts, frames that are pictures, no flow."""
    arrays, frames = golden.arrays("unet"), golden.frames
    outputs = arrays.matching(OUTPUT)
    yield from _absent(arrays, list(outputs.values()))
    for videos in sorted({match[1] for match in outputs.values() if not match[4]}):
        key = f"b{videos}_c_noise"
        if key in arrays and f"b{videos}_sigma" in arrays:
            ours = edm.scalings(jnp.asarray(arrays[f"b{videos}_sigma"])).noise
            yield elementwise(arrays.name(key), ours, arrays[key], SCALINGS, tiny=0.05)

    cases: list[Case] = []
    spans: dict[str, slice] = {}
    for key, match in outputs.items():
        try:
            made = run_cases(arrays, match, frames)
        except FAULTS as fault:
            yield complaint(arrays.name(key), fault)
            continue
        spans[key] = slice(len(cases), len(cases) + len(made))
        cases += made
    ours: list[Array | None] = [None] * len(cases)
    for tokens in {case.context.shape[1] for case in cases}:  # the videos of many runs in one call
        chosen = [i for i, case in enumerate(cases) if case.context.shape[1] == tokens]
        made, _ = run_unet(golden, [cases[i] for i in chosen])
        for i, video in zip(chosen, made, strict=True):
            ours[i] = video
    for key, span in spans.items():
        floor = golden.floor("unet_b1_sigma1" if "sigma" in key else "unet_b2")
        yield from guarded(
            arrays.name(key), _compare(arrays, key, np.stack(ours[span]), frames, floor)
        )


def run_cases(arrays: Arrays, output: re.Match[str], frames: int) -> list[Case]:
    """The videos of one run, named by a match of `OUTPUT`: the first ones of the file."""
    videos, kind, tokens, sigma = int(output[1]), output[2], output[3], output[4]
    if sigma:
        c_noise = np.full((videos,), np.log(float(sigma)) / 4)
    else:
        c_noise = _per_video(arrays, f"b{videos}_c_noise", frames)
    image_only = np.zeros((videos, frames), bool)
    if kind == "ioi":
        image_only = arrays[f"b{videos}_ioi_indicator"].reshape(videos, frames) > 0.5
    flow = flow_last(arrays["flow"])
    if kind == "zero_flow":
        flow = np.zeros_like(flow)
    context = as_float(arrays[f"context_{tokens}tok" if tokens else "context"])
    parts = (
        channels_last(arrays["x"], frames)[:videos],
        c_noise.astype(np.float32)[:videos],
        rearrange(context, "(b t) l c -> b t l c", t=frames)[:videos],
        _per_video(arrays, "y", frames)[:videos],
        flow[:videos],
        image_only,
    )
    return [Case(*video) for video in zip(*parts, strict=True)]


def run_unet(
    golden: Golden, cases: Sequence[Case], taps: frozenset[str] = frozenset()
) -> tuple[Float[np.ndarray, "b t h w c"], dict[str, np.ndarray]]:
    """What our U-Net makes of cases with equally many tokens of context.

    Also what our modules give on the way, by their paths: `unet/...`, `encoder/...` (of the flow),
    `heads/...`; those in `taps`.
    """
    batch = Case(*(np.stack(part) for part in zip(*cases, strict=True)))
    per_frame = differ_by_frame(batch.context)
    model = golden.model
    sizes = (model.unet.model_channels, model.unet.channel_mult)
    modules = {
        "encoder": FlowEncoder(model.flow_encoder, *sizes, model.autoencoder.reduction),
        "heads": FlowHeads(model.flow_encoder, *sizes),
        "unet": UNet(model.unet),
    }

    @compiled
    def run(params: Any, batch: Case) -> tuple[Array, dict[str, Array]]:
        seen = {}

        def apply(name: str, *args: Any) -> Any:
            def tapped(module: Any, method: str) -> bool:
                return method == "__call__" and "/".join((name, *module.path)) in taps

            out, state = modules[name].apply(
                {"params": params[name]},
                *args,
                capture_intermediates=tapped,
                mutable=["intermediates"],
            )
            for path, values in flatten_dict(state.get("intermediates", {})).items():
                seen["/".join((name, *path[:-1]))] = values[-1]
            return out

        sites = apply("heads", apply("encoder", batch.flow), jnp.ones((len(batch.flow),)))
        inputs = (batch.x, batch.c_noise, batch.context[:, 0], batch.vector, sites, None, None)
        with one_context_per_frame(batch.context) if per_frame else contextlib.nullcontext():
            return apply("unet", *inputs, batch.image_only), seen

    params = golden.params("unet", "flow_encoder")
    return run({"unet": params["unet"]} | params["flow_encoder"], batch)


def _absent(arrays: Arrays, outputs: list[re.Match[str]]) -> Iterator[Item]:
    yield from arrays.require_some(
        {
            "b2_out": r"b\d+_out",
            "b1_out_sigma_S": r"b\d+_out_sigma_[\d.]+",
            "b1_ioi_out_sigma_S": r"b\d+_ioi_out.*",
            "b1_zero_flow_out_sigma_S": r"b\d+_zero_flow_out.*",
            "b2_ctx3tok_out": r"b\d+_ctx\d+tok_out.*",
            "b1_out_sigma_S_float64": r"b\d+_out.*_float64",
        }
    )
    # What differs from a run in one thing, or only in precision, has that run beside it.
    names = []
    for match in outputs:
        names += [f"b{match[1]}_out" + (f"_sigma_{match[4]}" if match[4] else "")]
        names += [] if match[4] else [f"b{match[1]}_sigma"]
    yield from arrays.require(dict.fromkeys(names))
    for match in arrays.matching(r"context_(\d+)tok").values():
        pattern = rf"b\d+_ctx{match[1]}tok_out.*"
        yield from arrays.require_some({f"b2_ctx{match[1]}tok_out": pattern})


def _compare(arrays: Arrays, key: str, ours: Array, frames: int, note: str) -> Iterator[Item]:
    yield relative(arrays.name(key), ours, channels_last(arrays[key], frames), NETWORK, note)


def _per_video(arrays: Arrays, key: str, frames: int) -> Float[np.ndarray, "b ..."]:
    """What the reference repeats for every frame."""
    value = as_float(arrays[key]).reshape(-1, frames, *arrays[key].shape[1:])
    if (value != value[:, :1]).any():
        raise ValueError(f"{key} differs between the frames of a video; our U-Net takes one")
    return value[:, 0]
