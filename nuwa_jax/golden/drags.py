"""The demo's drags as tracks, as sparse displacements and as a Gaussian flow map."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float

from nuwa_jax.golden.compare import (
    Item,
    absolute,
    elementwise,
    exact,
    guarded,
    relative,
)
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.golden.model import Golden
from nuwa_jax.motion.dragnuwa import ReferenceTracks, reference_tracks, sparse_displacements
from nuwa_jax.motion.raster import gaussian_kernel_1d, rasterize
from nuwa_jax.motion.tracks import pchip

FILTERED = 2e-5
SUMS = 2e-6
KERNEL = 2e-6  # the reference's exp in float32
PCHIP = 1e-12

# Parts of the filtered map: name -> which part.
STRIDED = r"filtered_off(\d+)_(\d+)_stride(\d+)"
ROWS = r"filtered_frame(\d+)_rows_stride(\d+)"


def demo_tracks(tracks_json: str, frames: int, height: int, width: int) -> ReferenceTracks:
    """The tracks with all that the demo does to them."""
    return reference_tracks(
        tracks_json, frames, height, width, still_points_move=True, overwrite=True, wrap=True
    )


def demo_flow(
    tracks: ReferenceTracks, height: int, width: int, sigma: float, kernel_size: int
) -> Float[np.ndarray, "t h w 2"]:
    """Their flow map by `rasterize`, in float64 and cut to float32."""
    with jax.enable_x64(True):
        flow = rasterize(
            *tracks, height, width, sigma=sigma, kernel_size=kernel_size, snap=True, dtype="float64"
        )
    return np.asarray(flow, np.float32)


def check_drag(golden: Golden) -> Iterator[Item]:
    """Examples at each size of the config (`drag_full`: `full0`, ...), PCHIP alone, the kernel."""
    arrays = golden.arrays("drag")
    kernel = r"kernel_\d+_[\d.]+_"
    yield from arrays.require_some(
        {
            "pchip0|points": r"pchip\d+\|points",
            "SIZE_hwT_kernel_sigma": r".+_hwT_kernel_sigma",
            "kernel_K_S_sum": f"{kernel}sum",
            "kernel_K_S_centre_row": f"{kernel}centre_row",
            "kernel_K_S_centre_edge_corner": f"{kernel}centre_edge_corner",
        }
    )
    sizes = [
        key.removeprefix("drag_")
        for key, value in golden.config.items()
        if key.startswith("drag_") and isinstance(value, dict)
    ]
    examples = sorted(
        {int(match[1]) for size in sizes for match in arrays.matching(rf"{size}(\d+)\|.+").values()}
    )
    for size in sizes:
        yield from arrays.require_some({f"{size}0|filtered": rf"{size}\d+\|filtered.*"})
        # What one example has, each has.
        found = arrays.matching(rf"{size}\d+\|(.+)").values()
        parts = sorted({match[1] for match in found} | {"nz_tyx", "nz_value"})
        for i in examples:
            yield from arrays.at(f"{size}{i}").require(set(parts) - {"tracks_json"})
            name = arrays.name(f"{size}{i}")
            yield from guarded(name, _check_example(golden, arrays, size, i))
    for place in arrays.places():
        if re.fullmatch(r"pchip\d+", place):
            yield from guarded(arrays.name(place), _check_pchip(arrays.at(place)))
    for key, match in arrays.matching(r"kernel_(\d+)_([\d.]+)_(\w+)").items():
        ours = _kernel(int(match[1]), float(match[2]))
        yield from guarded(arrays.name(key), _check_kernel(arrays, key, match[3], ours))
    yield from guarded("weights", _check_stored_kernel(golden))
    for size in sizes:
        key = f"{size}_hwT_kernel_sigma"
        if key in arrays:
            stated = golden.setting(f"drag_{size}")
            order = ("height", "width", "model_length", "kernel_size", "sigma")
            yield exact(arrays.name(key), [stated[part] for part in order], arrays[key])


def _check_example(golden: Golden, arrays: Arrays, size: str, i: int) -> Iterator[Item]:
    height, width, frames, kernel_size = (
        int(golden.setting(f"drag_{size}.{key}"))
        for key in ("height", "width", "model_length", "kernel_size")
    )
    sigma = float(golden.setting(f"drag_{size}.sigma"))
    # One size's examples may be those of another, drawn again.
    keys = [f"{size}{i}|tracks_json", *arrays.matching(rf"[a-z]+{i}\|tracks_json")]
    key = next((key for key in keys if key in arrays), keys[0])
    tracks = demo_tracks(str(arrays[key]), frames, height, width)
    arrays = arrays.at(f"{size}{i}")
    if "nz_tyx" in arrays and "nz_value" in arrays:
        sparse = sparse_displacements(tracks, height, width)
        pixels = np.argwhere(sparse.any(-1))
        yield exact(arrays.name("nz_tyx"), pixels, arrays["nz_tyx"])
        yield exact(arrays.name("nz_value"), sparse[tuple(pixels.T)], arrays["nz_value"])
    flow = demo_flow(tracks, height, width, sigma, kernel_size)[1:]
    for key in arrays:
        part = None
        if key == "filtered":
            part = flow
        elif match := re.fullmatch(STRIDED, key):
            row, column, stride = map(int, match.groups())
            part = flow[:, row::stride, column::stride]
        elif match := re.fullmatch(ROWS, key):
            part = flow[int(match[1]), :: int(match[2])]
        elif key == "filtered_absmax":
            part = np.abs(flow).max((1, 2))
        elif key == "filtered_sum":
            yield relative(arrays.name(key), flow.sum((1, 2), np.float64), arrays[key], SUMS)
        if part is not None:
            yield absolute(arrays.name(key), part, arrays[key], FILTERED)


def _check_pchip(arrays: Arrays) -> Iterator[Item]:
    points, theirs = arrays["points"], arrays["out"]
    ours = pchip(points, np.linspace(0, 1, len(points)), np.linspace(0, 1, len(theirs)))
    yield relative(arrays.name("out"), ours, theirs, PCHIP)


def _check_kernel(arrays: Arrays, key: str, part: str, ours: np.ndarray) -> Iterator[Item]:
    """Sum, centre row, or the weights at the centre, an edge and a corner."""
    middle = len(ours) // 2
    parts = {
        "sum": ours.sum() ** 2,
        "centre_row": ours,
        "centre_edge_corner": [ours[middle] ** 2, ours[middle] * ours[0], ours[0] ** 2],
    }
    if part in parts:
        yield elementwise(arrays.name(key), parts[part], arrays[key], KERNEL)


def _check_stored_kernel(golden: Golden) -> Iterator[Item]:
    """The kernel is a weight of the released checkpoint; here it is computed."""
    name = "guassian_filter.weight"  # theirs
    theirs = golden.weights[name]
    ours = _kernel(
        int(golden.setting("gaussian.kernel_size")), float(golden.setting("gaussian.sigma"))
    )
    ours = np.broadcast_to(ours[:, None] * ours, theirs.shape)
    yield absolute(golden.weights.name(name), ours, theirs, KERNEL)


def _kernel(kernel_size: int, sigma: float) -> Float[np.ndarray, " kernel_size"]:
    with jax.enable_x64(True):
        centre = np.float64(kernel_size // 2)
        kernel = gaussian_kernel_1d(centre, kernel_size, sigma=sigma, kernel_size=kernel_size)
    return np.asarray(kernel, np.float64)
