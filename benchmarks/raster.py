"""Times rasterising drags against the direct Gaussian convolution that it replaces.

    python -m benchmarks.raster

Both draw the same 8 drags at 320 x 576, 14 frames, with the 199 x 199 kernel of sigma 20, at whole
pixels, as DragNUWA does, in one process. The convolution takes minutes on a CPU; it costs the same
for every frame, so that `--slow_frames=1` convolves one frame and states 14 times its time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from einops import rearrange
from jaxtyping import Array, Float

from nuwa_jax.errors import run_main
from nuwa_jax.motion.raster import rasterize

HEIGHT, WIDTH, FRAMES, DRAGS = 320, 576, 14, 8
SIGMA, KERNEL_SIZE = 20.0, 199

_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs of the sum of outer products.")
_SLOW_REPEATS = flags.DEFINE_integer("slow_repeats", 1, "Timed runs of the convolution.")
_SLOW_FRAMES = flags.DEFINE_integer(
    "slow_frames", FRAMES, "Frames convolved; time is scaled.", lower_bound=1, upper_bound=FRAMES
)


def main(argv: Sequence[str]) -> None:
    del argv
    points = _random_drags(np.random.default_rng(0))
    state = np.ones(points.shape[:2], np.uint8)
    fast = jax.jit(
        lambda p: rasterize(
            p, state, HEIGHT, WIDTH, sigma=SIGMA, kernel_size=KERNEL_SIZE, snap=True
        )
    )
    sparse = jnp.asarray(_sparse_map(points))
    slow = jax.jit(_convolve)

    fast_map, fast_time = _time(fast, jnp.asarray(points), _REPEATS.value)
    _report("sum of outer products", fast_time, _REPEATS.value)
    frames = _SLOW_FRAMES.value
    # The last frames: the first holds no motion.
    slow_map, slow_time = _time(slow, sparse[-frames:], _SLOW_REPEATS.value)
    slow_time = tuple(seconds * FRAMES / frames for seconds in slow_time)
    _report("direct convolution", slow_time, _SLOW_REPEATS.value)
    wall, cpu = (slow / fast for slow, fast in zip(slow_time, fast_time, strict=True))
    print(f"ratio                  {wall:12.0f}     {cpu:12.0f}")
    difference = float(jnp.abs(fast_map[-frames:] - slow_map).max())
    print(
        f"largest difference     {difference:12.1e} px of {float(jnp.abs(slow_map).max()):.1f} px"
    )


def _random_drags(rng: np.random.Generator) -> Float[np.ndarray, "k t 2"]:
    ends = rng.uniform(0, (WIDTH - 1, HEIGHT - 1), (2, DRAGS, 1, 2))
    share = np.linspace(0, 1, FRAMES)[:, None]
    return (ends[0] * (1 - share) + ends[1] * share).astype(np.float32)


def _sparse_map(points: Float[np.ndarray, "k t 2"]) -> Float[np.ndarray, "t h w 2"]:
    sparse = np.zeros((FRAMES, HEIGHT, WIDTH, 2), np.float32)
    for track in points:
        for i in range(1, FRAMES):
            x, y = track[i - 1].astype(int)
            sparse[i, y, x] += track[i] - track[i - 1]
    return sparse


def _convolve(sparse: Float[Array, "t h w 2"]) -> Float[Array, "t h w 2"]:
    offsets = jnp.arange(KERNEL_SIZE) - KERNEL_SIZE // 2
    kernel = jnp.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * SIGMA**2))
    # The two channels as two pictures: XLA on CPU runs grouped convolutions far more slowly.
    pictures = rearrange(sparse, "t h w c -> (t c) h w 1")
    blurred = jax.lax.conv_general_dilated(
        pictures,
        kernel[..., None, None],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return rearrange(blurred, "(t c) h w 1 -> t h w c", c=2)


def _time(function: Callable, argument: Array, repeats: int) -> tuple[Array, tuple[float, float]]:
    """The result and the median seconds, by the clock and of CPU time, without compilation.

    CPU time is the one to compare on a machine that others use.
    """
    compiled = function.lower(argument).compile()
    if repeats > 1:
        compiled(argument).block_until_ready()
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        result = compiled(argument).block_until_ready()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return result, (statistics.median(wall), statistics.median(cpu))


def _report(name: str, seconds: tuple[float, float], repeats: int) -> None:
    wall, cpu = (1e3 * each for each in seconds)
    print(f"{name:22s} {wall:12.2f} ms, {cpu:12.2f} CPU-ms, median of {repeats}", flush=True)


if __name__ == "__main__":
    run_main(main)
