"""What the modules of the U-Net give in one run of it, sampled."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from nuwa_jax.convert.rules import UNET, block_places, flow_rows, unet_rows
from nuwa_jax.golden.compare import (
    SKIPPED,
    Item,
    Missing,
    compiled,
    guarded,
    relative,
)
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.golden.model import Golden
from nuwa_jax.golden.unet import NETWORK, OUTPUT, Case, run_cases, run_unet
from nuwa_jax.models.layers import Mlp, sinusoids

PARTS = ("shape", "stride", "sample", "mean_std_absmax")
SAMPLES = 256  # at most, per module
# The modules that every such file has, by their names in the original U-Net.
TAPPED = (
    r"time_embed|label_emb|out\.0|flow_blocks\.\d+|middle_block\.\d+"
    r"|(input|output)_blocks\.\d+(\.\d+)?"
)


def check_unet_taps(golden: Golden) -> Iterator[Item]:
    """Samples of every block's output, and their mean, deviation and largest absolute value."""
    taps = golden.arrays("unet_taps")
    paths = counterparts(golden)
    known = [module for module in paths if re.fullmatch(TAPPED, module)]
    for module in dict.fromkeys([*known, *taps.places()]):
        yield from taps.at(module).require(PARTS)

    case = _tapped_case(golden, golden.arrays("unet"), taps)
    wanted = frozenset(paths[module] for module in taps.places() if module in paths)
    _, seen = run_unet(golden, [case], wanted)
    floor = golden.floor("unet_b1_sigma1")
    note = f"at the U-Net's end: {floor}" if floor else ""
    for module in taps.places():
        name = taps.name(module)
        if module not in paths:
            yield Item(name, None, None, SKIPPED, "no one module of ours gives this")
            continue
        checks = _compare(taps.at(module), np.asarray(seen[paths[module]]), name, note)
        yield from guarded(name, checks)


def counterparts(golden: Golden) -> dict[str, str]:
    """The original U-Net's modules -> paths of those of ours that give the same."""
    model = golden.model
    rows = [row._replace(ours=f"unet/{row.ours}") for row in unet_rows(model.unet)]
    rows += flow_rows(model.flow_encoder, model.unet, model.autoencoder.reduction)
    paths = {row.sgm.removeprefix(f"{UNET}."): row.ours for row in rows if row.sgm}
    paths |= {"time_embed": "unet/time_embed", "label_emb": "unet/vector_embed"}
    for ours, place in block_places(model.unet).items():
        inner = ".0" if ours.endswith("_downsample") else ""
        paths[f"{place.sgm}{inner}"] = f"unet/{ours}"
    # What consists of others in a row gives what the last of them gives.
    for module in sorted(paths, key=_numerically):
        if match := re.match(r"(flow_blocks\.\d+)\.\d+", module):
            paths[match[1]] = paths[module]
        elif match := re.fullmatch(r"((?:input|output)_blocks\.\d+)\.\d+", module):
            paths[match[1]] = paths[module]
    return paths


def _tapped_case(golden: Golden, arrays: Arrays, taps: Arrays) -> Case:
    """The run of unet.npz that was tapped: its first video at one of its noise levels, or at 1.

    The file does not say which level, so it is the one with the nearest time embedding.
    """
    runs = [m for m in arrays.matching(OUTPUT).values() if m[4] and not m[2] and not m[3]]
    if not runs:
        raise Missing(arrays.name("b1_out_sigma_S"))
    case = run_cases(arrays, runs[0], golden.frames)[0]
    levels = np.log(sorted({float(match[4]) for match in runs} | {1.0})) / 4
    model, params = golden.model.unet, golden.params("unet")["unet"]["time_embed"]
    channels = 4 * model.model_channels
    embed = compiled(Mlp(channels, channels).apply)
    embeddings = embed({"params": params}, sinusoids(levels, model.model_channels))
    theirs = taps.at("time_embed")
    samples = [_sample(np.tile(e, (golden.frames, 1)), theirs) for e in np.asarray(embeddings)]
    errors = [np.linalg.norm(sample - theirs["sample"]) for sample in samples]
    return case._replace(c_noise=np.float32(levels[int(np.argmin(errors))]))


def _compare(
    arrays: Arrays, ours: Float[np.ndarray, "..."], name: str, note: str
) -> Iterator[Item]:
    """The larger one of the errors of the samples and of the numbers about them."""
    ours = _their_layout(ours, tuple(int(n) for n in arrays["shape"]))
    if ours is None:
        yield Item(name, None, None, SKIPPED, "ours is laid out in another way")
        return
    sampled = relative(name, _sample(ours, arrays), arrays["sample"], NETWORK)
    mean, deviation, largest = arrays["mean_std_absmax"]
    scale = max(float(deviation), 1e-30)  # a mean may be zero
    numbers = [
        abs(ours.mean(dtype=np.float64) - mean) / scale,
        abs(ours.std(dtype=np.float64, ddof=1) - deviation) / scale,
        abs(np.abs(ours).max() - largest) / max(float(largest), 1e-30),
    ]
    yield sampled._replace(error=max(sampled.error, *map(float, numbers)), note=note)


def _their_layout(
    ours: Float[np.ndarray, "..."], shape: tuple[int, ...]
) -> Float[np.ndarray, "..."] | None:
    """Our b t h w c, n h w c or b c in the order of (b t) c h w, b c t h w or (b t) c."""
    if ours.ndim == 2 and len(shape) == 2:
        ours = np.repeat(ours, shape[0] // len(ours), axis=0)
    if ours.ndim == 5 and len(shape) == 4:
        ours = ours.reshape(-1, *ours.shape[2:])
    if ours.ndim == len(shape) and ours.ndim >= 4:
        ours = np.moveaxis(ours, -1, 1)
    return ours if ours.shape == shape else None


def _sample(ours: Float[np.ndarray, "..."], arrays: Arrays) -> Float[np.ndarray, " n"]:
    return ours.reshape(-1)[:: int(arrays["stride"])][:SAMPLES]


def _numerically(module: str) -> list[tuple[bool, int, str]]:
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in module.split(".")]
