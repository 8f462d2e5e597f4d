"""Cuts tests/golden/dragnuwa_blocks.npz out of the reference's arrays (24 MB, not shipped).

python tests/models/cut_golden.py ../shared/golden/small

Weights keep the released names and their float16 values (which the reference ran with, in float32),
LoRA apart. A name `part|array` groups what one test reads.
"""

import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

OUT = pathlib.Path(__file__).parents[1] / "golden" / "dragnuwa_blocks.npz"
UNET = "model.diffusion_model"
BLOCK = "first_stage_model.decoder.mid.block_1"


def main(source: pathlib.Path) -> None:
    weights = load_file(source / "weights.safetensors")
    res, transformer, unet, taps = (
        np.load(source / f"{name}.npz") for name in ("resblock", "transformer", "unet", "unet_taps")
    )
    out = {}
    for name in ("module", "x", "emb", "flow", "out", "ioi", "out_ioi", "spatial_only"):
        out[f"res|{name}"] = res[f"same_ch|{name}"]
    for name in ("module", "x", "context_3tok", "out_3tok"):
        out[f"transformer|{name}"] = transformer[f"first|{name}"]
    out["flow|flow"] = unet["flow"][0]
    for level in range(4):
        for name in ("shape", "stride", "sample"):
            out[f"flow|f{level}_{name}"] = taps[f"flow_blocks.{level}|{name}"]
    kept = (
        f"{UNET}.{out['res|module']}.",
        f"{UNET}.{out['transformer|module']}.",
        f"{UNET}.flow_blocks.",
        f"{BLOCK}.",
    )
    out |= {f"weights|{name}": a for name, a in weights.items() if name.startswith(kept)}
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
