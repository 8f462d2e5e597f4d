"""Makes a folder with one file of weights of a training run, to ship or to pass on.

python -m nuwa_jax.generation.export --checkpoint=runs/tiny --out=model
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from nuwa_jax.errors import UserError, run_main
from nuwa_jax.generation.weights import load_model, save_model

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The --workdir of train.py.")
STAGE = flags.DEFINE_string("stage", None, "The model after this stage; the last by default.")
OUT = flags.DEFINE_string("out", None, "Folder for model.safetensors and config.json.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of weights.")


def main(argv: Sequence[str]) -> None:
    """Exports the averaged parameters."""
    del argv
    if not CHECKPOINT.value or not OUT.value:
        raise UserError("give --checkpoint=DIR (a run of train.py) and --out=DIR")
    path = save_model(load_model(CHECKPOINT.value, STAGE.value), OUT.value, DTYPE.value)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_main(main)
