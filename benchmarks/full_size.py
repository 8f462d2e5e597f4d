"""The model at full size on one CPU: convert, load, sample; the peak memory of each, measured.

    python -m benchmarks.full_size --dir=/path/with/20/GB --steps=2

Writes random weights under the released names and in the released layout (3,495 arrays, LoRA of
rank 32 unfolded; 5 GB in float16), converts them with `nuwa_jax.convert`, and samples 14 frames of
320x576 with `sample.py`, each in a process of its own whose largest resident size is reported. The
pictures are noise: this shows that it fits and what it costs, not what it makes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from nuwa_jax.convert.released import parameter_shapes, table
from nuwa_jax.convert.rules import write_leaf
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.presets import load_preset
from nuwa_jax.tensor_files import Spec, write_safetensors

_DIR = flags.DEFINE_string("dir", None, "Folder for weights and results; files there are reused.")
_STEPS = flags.DEFINE_integer("steps", 2, "Sampling steps.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the weights.")
_WRITE_ONLY = flags.DEFINE_bool("write_only", False, "Only write the random weights.")
_RANK = 32


def main(argv: Sequence[str]) -> None:
    """Runs what has not been run."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    if not _DIR.value:
        raise UserError("give --dir=FOLDER with room for 20 GB")
    folder = Path(_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    if _WRITE_ONLY.value:
        return write_released(folder / "released.safetensors")
    released, model = folder / "released.safetensors", folder / f"model_{_DTYPE.value}"
    if not released.exists():
        _measured("random weights", ["-m", __spec__.name, f"--dir={folder}", "--write_only"])
    if not (model / "model.safetensors").exists():
        flags_ = [f"--from={released}", f"--out={model}", f"--dtype={_DTYPE.value}"]
        _measured("convert", ["-m", "nuwa_jax.convert", *flags_])
    picture, drags = folder / "picture.png", folder / "drags.json"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 36, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((576, 320), Image.Resampling.BICUBIC).save(picture)
    drag = {"id": "d1", "kind": "drag", "points": [[150, 100], [400, 200]]}
    head = {"version": 1, "width": 576, "height": 320, "frames": 14, "fps": 4}
    drags.write_text(json.dumps(head | {"drags": [drag]}))
    _measured(
        f"sample, {_STEPS.value} steps",
        [
            "sample.py",
            f"--checkpoint={model}",
            f"--image={picture}",
            f"--drags={drags}",
            f"--out={folder / 'out.mp4'}",
            f"--steps={_STEPS.value}",
            f"--param_dtype={_DTYPE.value}",
            "--dtype=float32",
        ],
    )


def write_released(path: Path) -> None:
    """Random weights of DragNUWA 1.5: the names and shapes of its state dict, float16."""
    model = VideoLDM.from_config(load_preset("dragnuwa_svd").model)
    shapes, leaves = parameter_shapes(model), table(model, "sgm")
    specs: dict[str, Spec] = {}
    for ours, shape in shapes.items():
        if ours.startswith("latents/"):
            continue
        for name, value in write_leaf(np.broadcast_to(np.int8(0), shape), leaves[ours]).items():
            linear = ours.startswith("unet/") and ours.endswith("/kernel") and len(shape) == 2
            if not linear:
                specs[name] = Spec(value.shape, np.dtype(np.float16))
                continue
            module = name.removesuffix(".weight")
            specs[f"{module}.linear.weight"] = Spec(value.shape, np.dtype(np.float16))
            outputs, inputs = value.shape
            specs[f"{module}.lora_down.weight"] = Spec((_RANK, inputs), np.dtype(np.float16))
            specs[f"{module}.lora_up.weight"] = Spec((outputs, _RANK), np.dtype(np.float16))
    # The bias of a layer with an update is X.linear.bias.
    updated = {n.removesuffix(".linear.weight") for n in specs if n.endswith(".linear.weight")}
    specs = {
        f"{name.removesuffix('.bias')}.linear.bias"
        if name.removesuffix(".bias") in updated
        else name: spec
        for name, spec in specs.items()
    }
    write_safetensors(path, specs, _random_arrays(specs))


def _random_arrays(specs: dict[str, Spec]) -> Iterator[tuple[str, np.ndarray]]:
    """Matrices and kernels that keep the size of what passes through; norms that do nothing."""
    rng = np.random.default_rng(0)
    for name, spec in specs.items():
        if name.endswith("mix_factor"):
            value = np.zeros(spec.shape)
        elif len(spec.shape) < 2:
            value = np.full(spec.shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            value = rng.standard_normal(spec.shape, np.float32)
            value *= 0.5 / math.sqrt(math.prod(spec.shape[1:]))
        yield name, value.astype(spec.dtype)


def _measured(name: str, arguments: list[str]) -> None:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{name} failed: see above")
    seconds = time.perf_counter() - start
    print(
        f"{name:20s} {seconds / 60:6.1f} min, {(usage.ru_utime + usage.ru_stime) / 60:6.1f} "
        f"CPU-min, peak {usage.ru_maxrss / 2**20:5.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
