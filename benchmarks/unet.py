"""Times our U-Net against diffusers' at the same size, weights, inputs and threads, on this CPU.

    python -m benchmarks.unet [--threads=2] [--repeats=5]

Forward, and forward + backward to every parameter, of the SVD layout (heads of 64 channels, one
context token) in float32. The two run in turns in one process and each turn gives one ratio of
ours to theirs, so that what else the machine does weighs on both; peak memory is that of a process
of its own each. Their GroupNorms get the eps of the released network first, and both outputs must
agree.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from einops import rearrange

from benchmarks.beside import (
    CONTEXT,
    IDS,
    VECTOR,
    Run,
    check_same,
    diffusers_unet,
    limit_threads,
    random_params,
    relative_l2,
    timed,
)
from nuwa_jax.convert.rules import to_state, unet_rows
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.models.layers import sinusoids
from nuwa_jax.models.unet import UNet, UNetConfig

_THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "Threads of either side.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Pairs of timed runs.", lower_bound=1)
_CHANNELS = flags.DEFINE_integer("channels", 128, "Channels of the first level (SVD: 320).")
_FRAMES = flags.DEFINE_integer("frames", 8, "Frames.")
_HEIGHT = flags.DEFINE_integer("height", 24, "Rows of the latents; divisible by 8.")
_WIDTH = flags.DEFINE_integer("width", 40, "Columns of the latents; divisible by 8.")
_CACHE = flags.DEFINE_string("cache", None, "Folder of compiled programs; by default a new one.")
_PEAK = flags.DEFINE_enum(
    "peak", None, ["ours", "theirs"], "Run only one side, once, and print its peak memory as JSON."
)
_BACKWARD = flags.DEFINE_bool("backward", False, "With --peak: forward and backward.")


def main(argv: Sequence[str]) -> None:
    del argv
    if _CHANNELS.value % 64 or _HEIGHT.value % 8 or _WIDTH.value % 8:
        raise UserError(
            f"--channels must be divisible by 64, --height and --width by 8, got "
            f"{_CHANNELS.value}, {_HEIGHT.value} and {_WIDTH.value}: change them"
        )
    limit_threads(_THREADS.value)
    if _PEAK.value:
        return _print_peak(_PEAK.value, backward=_BACKWARD.value)
    with tempfile.TemporaryDirectory() as cache:
        _use_cache(_CACHE.value or cache)
        _compare()
        _compare_peaks(_CACHE.value or cache)


def _compare() -> None:
    params = random_params(_config(), _inputs()["x"].shape)
    theirs, modules = _theirs(params)
    ours = _ours(params)
    print(
        f"{_CHANNELS.value} channels, {_FRAMES.value} frames of {_HEIGHT.value} x {_WIDTH.value}, "
        f"{sum(p.size for p in jax.tree.leaves(params)) / 1e6:.0f} M parameters, float32, "
        f"threads: {_THREADS.value}"
    )
    difference = relative_l2(ours["forward"](), theirs["forward"]())
    check_same("outputs", difference, 1e-5)
    gradients = to_state(ours["forward+backward"](), unet_rows(_config()), "hf")
    theirs["forward+backward"]()
    differences = [
        relative_l2(gradients[name], p.grad.numpy()) for name, p in modules.named_parameters()
    ]
    check_same("gradients (median of all arrays)", statistics.median(differences), 1e-4)
    del gradients
    for name in ours:
        times = [(timed(ours[name]), timed(theirs[name])) for _ in range(_REPEATS.value)]
        for clock, label in enumerate(("wall", "CPU")):
            a, b = ([pair[side][clock] for pair in times] for side in range(2))
            ratios = sorted(x / y for x, y in zip(a, b, strict=True))
            print(
                f"{name:17s} {label:4s}  ours {statistics.median(a):7.2f} s  "
                f"theirs {statistics.median(b):7.2f} s  "
                f"ours/theirs {statistics.median(ratios):5.2f} "
                f"[{ratios[0]:.2f}, {ratios[-1]:.2f}], {len(ratios)} pairs",
                flush=True,
            )


def _compare_peaks(cache: str) -> None:
    """One process for each side and pass: what a process took at most is never given back."""
    given = [f"--{flag.name}={flag.value}" for flag in (_THREADS, _CHANNELS, _FRAMES)]
    given += [f"--{flag.name}={flag.value}" for flag in (_HEIGHT, _WIDTH)]
    for backward in (False, True):
        peaks = {}
        for side in ("ours", "theirs"):
            command = [sys.executable, "-m", "benchmarks.unet", *given, f"--cache={cache}"]
            command += [f"--peak={side}", f"--backward={backward}"]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks[side] = json.loads(out.splitlines()[-1])
        name = "forward+backward" if backward else "forward"
        for key, label in (("peak", "peak memory"), ("above", "of it above idle")):
            a, b = (peaks[side][key] for side in ("ours", "theirs"))
            print(f"{name:17s} {label:16s} ours {a:6.0f} MB  theirs {b:6.0f} MB  {a / b:5.2f}")
        print(f"{name:17s} temporaries that XLA plans {peaks['ours']['planned']:6.0f} MB")


def _print_peak(side: str, *, backward: bool) -> None:
    """Peak resident memory, and how much of it was not there before the run; in MB, as JSON."""
    _use_cache(_CACHE.value)
    name = "forward+backward" if backward else "forward"
    params = random_params(_config(), _inputs()["x"].shape)
    runs = _ours(params, only=name) if side == "ours" else _theirs(params)[0]
    del params
    # The peak is counted from here: compiling may have taken more.
    Path("/proc/self/clear_refs").write_text("5")
    idle = _status("VmRSS")
    runs[name]()
    peak = _status("VmHWM")
    planned = runs.get("planned", lambda: 0)()
    print(json.dumps({"peak": peak, "above": peak - idle, "planned": planned}))


def _ours(params: dict, only: str | None = None) -> dict[str, Run]:
    unet = UNet(_config())
    arrays = jax.tree.map(jnp.asarray, (params, _inputs()))

    def forward(params: dict, inputs: dict) -> jax.Array:
        vector = rearrange(sinusoids(inputs["ids"], VECTOR), "b n c -> b (n c)")
        return unet.apply(
            {"params": params}, inputs["x"], inputs["c_noise"], inputs["context"], vector
        )

    def loss(params: dict, inputs: dict) -> jax.Array:
        return jnp.mean(jnp.square(forward(params, inputs)))

    functions = {"forward": forward, "forward+backward": jax.grad(loss)}
    runs = {}
    for name, function in functions.items():
        if only in (None, name):
            compiled = jax.jit(function).lower(*arrays).compile()
            runs[name] = lambda c=compiled: jax.block_until_ready(c(*arrays))
            planned = compiled.memory_analysis().temp_size_in_bytes / 1e6
    if only:
        runs["planned"] = lambda: planned
    return runs


def _theirs(params: dict) -> tuple[dict[str, Run], Any]:
    model = diffusers_unet(_config(), params, frames=_FRAMES.value, threads=_THREADS.value)
    import torch

    inputs = _inputs()
    arguments = [
        torch.from_numpy(np.ascontiguousarray(a))
        for a in (
            rearrange(inputs["x"], "b t h w c -> b t c h w"),
            inputs["c_noise"],
            inputs["context"],
            inputs["ids"],
        )
    ]

    def forward() -> np.ndarray:
        with torch.no_grad():
            out = model(*arguments).sample
        return rearrange(out.numpy(), "b t c h w -> b t h w c")

    def backward() -> None:
        model.zero_grad(set_to_none=True)
        model(*arguments).sample.square().mean().backward()

    return {"forward": forward, "forward+backward": backward}, model


def _config() -> UNetConfig:
    return UNetConfig(model_channels=_CHANNELS.value)


def _inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, _FRAMES.value, _HEIGHT.value, _WIDTH.value, 8))
    context = rng.normal(size=(1, 1, CONTEXT))
    inputs = {"x": x, "c_noise": [0.3], "context": context, "ids": [IDS]}
    return {name: np.asarray(value, np.float32) for name, value in inputs.items()}


def _use_cache(folder: str | None) -> None:
    """Compiled programs are kept: the processes that measure memory need not compile again."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)


def _status(name: str) -> float:
    """Megabytes, from Linux. `ru_maxrss` would count the process that started this one, too."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


if __name__ == "__main__":
    run_main(main)
