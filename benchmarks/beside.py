"""What benchmarks need that run our U-Net beside diffusers' at the same size, in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nuwa_jax.convert.rules import to_state, unet_rows
from nuwa_jax.errors import UserError
from nuwa_jax.host_memory import keep_host_memory
from nuwa_jax.models.unet import RES_EPS, UNet, UNetConfig

CONTEXT, VECTOR = 1024, 256  # channels of the context, of the embedding of one number
IDS = (6.0, 127.0, 0.02)  # frames per second, motion bucket, augmentation

Run = Callable[[], Any]


def limit_threads(threads: int, *, keep_memory: bool = True) -> None:
    """XLA makes as many threads as the process may use cores when its backend starts.

    With `keep_memory` both sides have memory as `train.py` has it (`nuwa_jax.host_memory`).
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("threads are limited through the CPU affinity: this benchmark needs Linux")
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UserError(f"--threads={threads}, but there are {len(cores)} cores: give fewer")
    os.sched_setaffinity(0, cores[:threads])
    if keep_memory:
        keep_host_memory()


def random_params(config: UNetConfig, x_shape: tuple[int, ...]) -> dict:
    """Weights about as large as trained ones; with fresh ones most blocks would add nothing.

    Args:
      config: of the U-Net.
      x_shape: of its input, `[b t h w c]`.
    """
    b = x_shape[0]
    given = [(x_shape), (b,), (b, 1, CONTEXT), (b, len(IDS) * VECTOR)]
    arguments = [np.zeros(shape, np.float32) for shape in given]
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        value = rng.standard_normal(leaf.shape, np.float32) / np.float32(fan_in**0.5)
        return value if len(leaf.shape) > 1 else np.float32(1) + np.float32(0.1) * value

    return jax.tree.map(draw, shapes)


def diffusers_unet(config: UNetConfig, params: dict, *, frames: int, threads: int) -> Any:
    """diffusers' U-Net with these weights.

    Raises:
      UserError: PyTorch or diffusers is not installed.
    """
    try:
        import torch
        from diffusers import UNetSpatioTemporalConditionModel
        from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, and this benchmark compares with it: "
            "pip install -e '.[torch]'"
        ) from error
    torch.set_num_threads(threads)
    levels = len(config.channel_mult)
    widths = tuple(config.channels(level) for level in range(levels))
    model = UNetSpatioTemporalConditionModel(
        down_block_types=_blocks("CrossAttnDown", "Down", levels),
        up_block_types=_blocks("CrossAttnUp", "Up", levels)[::-1],
        block_out_channels=widths,
        num_attention_heads=tuple(width // config.head_channels for width in widths),
        cross_attention_dim=CONTEXT,
        addition_time_embed_dim=VECTOR,
        projection_class_embeddings_input_dim=len(IDS) * VECTOR,
        num_frames=frames,
    ).eval()
    for module in model.modules():
        # 1e-6 in their blocks with attention: not what the weights were trained with.
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            module.norm1.eps = module.norm2.eps = RES_EPS
    state = to_state(params, unet_rows(config), "hf")
    model.load_state_dict(
        {n: torch.from_numpy(np.array(a, order="C")) for n, a in state.items()}, assign=True
    )
    return model


def _blocks(with_attention: str, without: str, levels: int) -> tuple[str, ...]:
    """Attention on all levels but the last."""
    names = [with_attention] * (levels - 1) + [without]
    return tuple(f"{name}BlockSpatioTemporal" for name in names)


def timed(run: Run) -> tuple[float, float]:
    """Seconds by the clock and of CPU time."""
    start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def relative_l2(ours: Any, theirs: Any) -> float:
    """Relative L2 difference of two arrays."""
    ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def check_same(what: str, difference: float, bound: float) -> None:
    """Prints a difference and refuses one beyond its bound."""
    print(f"{what}: relative L2 difference {difference:.1e}, at most {bound:.0e}", flush=True)
    if not difference <= bound:
        raise UserError(f"the two networks' {what} differ: what was timed is not the same network")


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Geometric mean of first / second, and its 95 % confidence interval (Student's t, of logs)."""
    from scipy import stats

    logs = np.log([a / b for a, b in pairs])
    mean = float(logs.mean())
    if len(logs) < 2:
        return float(np.exp(mean)), 0.0, float("inf")
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


Times = tuple[float, float]  # by the clock, of CPU time


def print_pairs(name: str, times: Sequence[tuple[Times, Times]], first: str, second: str) -> None:
    """A line each for wall and CPU time of what was timed in turns (`timed`)."""
    for clock, label in enumerate(("wall", "CPU")):
        pairs = [(a[clock], b[clock]) for a, b in times]
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio, low, high = ratio_interval(pairs)
        print(
            f"{name:17s} {label:4s}  {first} {a:8.3f} s  {second} {b:8.3f} s  "
            f"{first}/{second} {ratio:5.3f} [{low:.3f}, {high:.3f}], {len(pairs)} pairs",
            flush=True,
        )
