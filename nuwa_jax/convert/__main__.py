"""Released PyTorch checkpoints to our weights, and our weights to the names of others.

python -m nuwa_jax.convert --from=drag_nuwa_svd.safetensors --out=model
python -m nuwa_jax.convert --from=stable-video-diffusion-img2vid --out=model --dtype=bfloat16
python -m nuwa_jax.convert --from=model --to=diffusers --out=folder

Reads DragNUWA 1.5 and Stability's SVD (.safetensors; .pth and .ckpt need PyTorch) and diffusers
folders of SVD. Every array is mapped, folded or ignored for a stated reason; one that is left over
or missing is an error that names it.

python -m nuwa_jax.convert --part=text --from=open_clip_model.safetensors --out=text
python -m nuwa_jax.convert --part=gmflow --from=gmflow.pth --out=gmflow.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from nuwa_jax.convert.export import export
from nuwa_jax.convert.gmflow import convert_gmflow
from nuwa_jax.convert.released import Report, convert
from nuwa_jax.convert.towers import convert_tower
from nuwa_jax.errors import UserError, run_main

FROM = flags.DEFINE_string("from", None, "A checkpoint, a diffusers folder or a model of ours.")
OUT = flags.DEFINE_string("out", None, "Folder to write; with --part=gmflow a file.")
TO = flags.DEFINE_enum(
    "to",
    "nuwa_jax",
    ["nuwa_jax", "sgm", "diffusers"],
    "Whose names: ours, those of Stability's code (SVD, DragNUWA 1.5), or a diffusers folder.",
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; float32, or as they are."
)
LORA = flags.DEFINE_enum(
    "lora", "fold", ["fold", "keep"], "Low-rank updates: added in, or kept apart to train them on."
)
LORA_SCALE = flags.DEFINE_float("lora_scale", 1.0, "Of the low-rank updates.")
HEIGHT = flags.DEFINE_integer("height", 320, "Pixels of the videos the model is to make.")
WIDTH = flags.DEFINE_integer("width", 576, "Pixels of the videos the model is to make.")
FRAMES = flags.DEFINE_integer("frames", 14, "Of the videos the model is to make.")
HEAD_CHANNELS = flags.DEFINE_integer(
    "head_channels", None, "Width of the U-Net's attention heads, which no shape tells; 64."
)
CLIP_HEADS = flags.DEFINE_integer(
    "clip_heads", None, "Heads of the image encoder, which no shape tells; as published."
)
PART = flags.DEFINE_enum(
    "part",
    "all",
    ["all", "image_encoder", "text", "gmflow"],
    "Only one tower of CLIP, of an OpenCLIP file or a Hugging Face folder, for train.init_from; or "
    "the optical flow of GMFlow, for preparing clips.",
)
CLIP_ACTIVATION = flags.DEFINE_enum(
    "clip_activation", "gelu", ["gelu", "quick_gelu"], "Of a text tower; OpenAI's: quick_gelu."
)
CLIP_LAYER = flags.DEFINE_enum(
    "clip_layer", "last", ["last", "penultimate"], "Whose features of a text tower are read."
)
CLIP_PADDING = flags.DEFINE_enum(
    "clip_padding", "zero", ["zero", "end"], "What follows a caption; OpenAI's: end."
)
REPORT = flags.DEFINE_string("report", None, "Write what became of the arrays here, as JSON.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    if not FROM.value or not OUT.value:
        raise UserError("give --from=FILE or folder and --out=DIR")
    if TO.value == "nuwa_jax":
        report = _convert()
        print("\n".join(report.lines()))
        if REPORT.value:
            Path(REPORT.value).write_text(json.dumps(report.to_json(), indent=1) + "\n")
        return
    family = "hf" if TO.value == "diffusers" else "sgm"
    print("\n".join(export(FROM.value, OUT.value, family, DTYPE.value).lines()))


def _convert() -> Report:
    if PART.value == "all":
        return convert(
            FROM.value,
            OUT.value,
            dtype=DTYPE.value or "float32",
            fold_lora=LORA.value == "fold",
            lora_scale=LORA_SCALE.value,
            size=(HEIGHT.value, WIDTH.value),
            frames=FRAMES.value,
            head_channels=HEAD_CHANNELS.value,
            clip_heads=CLIP_HEADS.value,
        )
    if PART.value == "gmflow":
        return convert_gmflow(FROM.value, OUT.value)
    untold = {
        "activation": CLIP_ACTIVATION.value,
        "layer": CLIP_LAYER.value,
        "padding": CLIP_PADDING.value,
    }
    return convert_tower(
        FROM.value,
        OUT.value,
        PART.value,
        dtype=DTYPE.value or "float32",
        heads=CLIP_HEADS.value,
        **untold if PART.value == "text" else {},
    )


if __name__ == "__main__":
    run_main(main)
