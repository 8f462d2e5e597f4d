"""Makes the video in which the dragged points of a picture follow the drags.

python sample.py --image=picture.png --drags=drags.json --out=out.mp4
python sample.py --checkpoint=runs/tiny --image=picture.png --drags=drags.json --out=out.mp4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags

from nuwa_jax.errors import UserError, run_main
from nuwa_jax.host_memory import keep_host_memory

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Workdir of train.py or exported model; the shipped model by default."
)
IMAGE = flags.DEFINE_string("image", None, "Picture to animate.")
VIDEO = flags.DEFINE_string("video", None, "Clip whose motion is kept as far as --strength says.")
STRENGTH = flags.DEFINE_float("strength", 0.7, "With --video: how much is remade, in (0, 1].")
DRAGS = flags.DEFINE_string("drags", None, "Drags, a JSON file (see README).")
DEMO_TRACKS = flags.DEFINE_string(
    "dragnuwa_tracks", None, "Instead of --drags: a JSON file of tracks of the DragNUWA 1.5 demo."
)
DEMO_DEFECTS = flags.DEFINE_list(
    "dragnuwa_defects",
    [],
    "With --dragnuwa_tracks, what to do as the demo does it: still_points_move, overwrite, wrap, "
    "crash (see nuwa_jax/motion/dragnuwa.py).",
)
OUT = flags.DEFINE_string("out", None, "The .mp4 to write; an overlay is written beside it.")
TEXT = flags.DEFINE_string("text", "", "Caption.")
SEED = flags.DEFINE_integer("seed", 0, "Of the noise.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; the model's own by default.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "To compute in; the model's own by default."
)
PARAM_DTYPE = flags.DEFINE_enum(
    "param_dtype", "float32", ["float32", "bfloat16"], "Of the weights in memory."
)
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache", "", "Folder or URL that keeps compiled programs for the next time."
)
GUIDANCE = {
    name: flags.DEFINE_float(f"{name}_guidance", None, f"Guidance scale of the {name}.")
    for name in ("text", "image", "drag")
}


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    if bool(DRAGS.value) == bool(DEMO_TRACKS.value) or not OUT.value:
        raise UserError("give --drags=FILE.json (or --dragnuwa_tracks) and --out=FILE.mp4")

    from nuwa_jax.generation.animate import DragNuwaTracks, animate
    from nuwa_jax.generation.generator import Generator
    from nuwa_jax.watching.compile_cache import use_compile_cache

    keep_host_memory()
    use_compile_cache(COMPILE_CACHE.value)
    generator = Generator.load(CHECKPOINT.value, param_dtype=PARAM_DTYPE.value, dtype=DTYPE.value)
    scales = {name: flag.value for name, flag in GUIDANCE.items() if flag.value is not None}
    drags = DRAGS.value or DragNuwaTracks(DEMO_TRACKS.value, tuple(DEMO_DEFECTS.value))
    written = animate(
        generator,
        image=IMAGE.value,
        drags=drags,
        out=OUT.value,
        video=VIDEO.value,
        strength=STRENGTH.value if VIDEO.value else 1.0,
        text=TEXT.value,
        seed=SEED.value,
        steps=STEPS.value,
        guidance=dataclasses.replace(generator.guidance, **scales),
    )
    print(written.video)
    print(written.overlay)


if __name__ == "__main__":
    run_main(main)
