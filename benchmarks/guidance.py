"""What each guidance scale does to a sample of a model, alone and beside the others.

    python -m benchmarks.guidance --checkpoint=model --steps=5

Samples one picture and one drag from the same noise under different scales, and prints how far the
frames are from those with every scale at 1 (root mean square, of 255), how far withholding that
condition takes them in the same measure, and how many branches the network runs per step. The
released DragNUWA 1.5 never dropped its drags in training, so that its estimate without drags is of
a network that was never shown a missing one; this shows how strongly the scale acts all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Float, UInt8

from nuwa_jax.diffusion.guidance import GuidanceScales
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.generation.generator import Generator

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model; the shipped one by default.")
_STEPS = flags.DEFINE_integer("steps", 5, "Sampling steps.", lower_bound=1)
_SCALES = flags.DEFINE_list("scales", ["0", "2", "4"], "Scales to try for each condition.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise and of the picture.")


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    try:
        scales = [float(scale) for scale in _SCALES.value]
    except ValueError as error:
        raise UserError(f"--scales is a list of numbers such as 0,2,4: {error}") from error
    generator = Generator.load(_CHECKPOINT.value)
    image, points, state = _example(generator)

    def run(guidance: GuidanceScales) -> Float[np.ndarray, "t h w 3"]:
        made = generator.generate(
            image, points, state, seed=_SEED.value, steps=_STEPS.value, guidance=guidance
        )
        return made[0].astype(np.float64)

    plain = run(GuidanceScales(1.0, 1.0, 1.0))
    conditions = ["image", "drag"]
    if generator.model.text is not None:
        conditions.insert(1, "text")
    print(
        f"{'condition':10s} {'scale':>6s} {'branches':>9s} {'rms of 255':>11s} {'per frame':>11s}"
    )
    for name in conditions:
        for scale in scales:
            guidance = GuidanceScales(**{name: scale})
            made = run(guidance)
            frames = np.sqrt(((made - plain) ** 2).mean(axis=(1, 2, 3)))
            rms = np.sqrt((frames**2).mean())
            each = " ".join(f"{frame:.1f}" for frame in frames)
            branches = len(guidance.branches())
            print(f"{name:10s} {scale:6.1f} {branches:9d} {rms:11.2f}   {each}", flush=True)


def _example(
    generator: Generator,
) -> tuple[UInt8[np.ndarray, "1 h w 3"], Float[np.ndarray, "1 1 t 2"], np.ndarray]:
    """A smooth random picture and one drag across half of it."""
    rng = np.random.default_rng(_SEED.value)
    height, width, frames = generator.height, generator.width, generator.frames
    coarse = rng.uniform(0, 255, (1, height // 8 or 1, width // 8 or 1, 3))
    image = np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2)[:, :height, :width]
    start, end = np.array([width, height]) * 0.25, np.array([width, height]) * (0.75, 0.5)
    share = np.linspace(0, 1, frames)[:, None]
    points = (start * (1 - share) + end * share)[None, None].astype(np.float32)
    return image.astype(np.uint8), points, np.ones((1, 1, frames), np.uint8)


if __name__ == "__main__":
    run_main(main)
