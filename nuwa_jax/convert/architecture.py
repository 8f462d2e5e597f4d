"""The sizes of a released network, read off the shapes of its arrays.

Two numbers leave no trace in shapes, the width of an attention head in the U-Net and the number of
heads in CLIP: they come from the folder's config.json, from the caller, or are SVD's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nuwa_jax.convert.rules import CLIP, ENCODER, UNET, Family
from nuwa_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
HEAD_CHANNELS = 64
CLIP_HEADS = {768: 12}  # of ViT-B; ViT-L, ViT-H and ViT-bigG all have 16
VECTOR = ("fps", "motion_bucket", "augmentation")
VECTOR_CHANNELS = 256


def infer_model(
    shapes: Shapes,
    family: Family,
    *,
    head_channels: int | None = None,
    clip_heads: int | None = None,
) -> dict[str, Any]:
    """The `model` section of a config for the arrays of an SVD or DragNUWA 1.5 checkpoint.

    Args:
      shapes: of all arrays; in a diffusers folder names begin with "unet/", "vae/" and
        "image_encoder/". Of LoRA, `X.weight` stands for `X.linear.weight`.
      family: which names these are.
      head_channels: width of the U-Net's attention heads; 64 by default.
      clip_heads: of the image encoder; by default as many as published towers of its width have.

    Raises:
      UserError: an array that tells a size is missing, or sizes contradict one another.
    """
    look = _Look(shapes, family)
    unet, context = _unet(look, head_channels or HEAD_CHANNELS)
    section: dict[str, Any] = {
        "autoencoder": _autoencoder(look),
        "unet": unet,
        "image_encoder": _clip(look, clip_heads),
        "vector": VECTOR,
    }
    adm = look("unet/add_embedding.linear_1.weight", f"{UNET}.label_emb.0.0.weight")[1]
    if adm != len(VECTOR) * VECTOR_CHANNELS:
        raise UserError(
            f"the conditioning vector has {adm} channels; fps, motion bucket and augmentation "
            f"have {len(VECTOR) * VECTOR_CHANNELS}: this is not a checkpoint of SVD"
        )
    projection = section["image_encoder"]["projection"]
    if context != projection:
        raise UserError(
            f"the U-Net's context is {context} wide, the image embedding {projection}: the parts "
            "do not belong together"
        )
    flow = _flow(look, unet["model_channels"])
    if flow is not None:
        section["flow_encoder"] = flow
    return section


def infer_clip_vision(shapes: Shapes, family: Family, heads: int | None = None) -> dict[str, Any]:
    """The `image_encoder` section for the shapes of a file that holds CLIP and nothing else.

    Args:
      shapes: of all arrays: OpenCLIP's "visual.*", or Hugging Face's "vision_model.*".
      family: which of the two.
      heads: of attention; by default as many as published towers of this width have.

    Raises:
      UserError: there is no whole image tower.
    """
    if family == "hf":
        named = {f"image_encoder/{name}": shape for name, shape in shapes.items()}
    else:
        tail = {name.removeprefix("visual"): shape for name, shape in shapes.items()}
        named = {f"{CLIP}{name}": shape for name, shape in tail.items()}
    return _clip(_Look(named, family), heads)


class _Look:
    """Finds a shape under the name that it has in the family at hand."""

    def __init__(self, shapes: Shapes, family: Family) -> None:
        self.shapes, self.family = shapes, family

    def name(self, hf: str, sgm: str) -> str:
        return hf if self.family == "hf" else sgm

    def has(self, hf: str, sgm: str) -> bool:
        return self.name(hf, sgm) in self.shapes

    def __call__(self, hf: str, sgm: str) -> tuple[int, ...]:
        name = self.name(hf, sgm)
        if name not in self.shapes:
            raise UserError(
                f"the checkpoint has no {name}, which tells the size of a network: give a whole "
                "checkpoint of SVD or DragNUWA 1.5, or a diffusers folder with unet, vae and "
                "image_encoder"
            )
        return self.shapes[name]


def _unet(look: _Look, head_channels: int) -> tuple[dict[str, Any], int]:
    """The U-Net's section and the width of its context."""
    width = look("unet/time_embedding.linear_1.weight", f"{UNET}.time_embed.0.weight")[1]
    levels: list[list[tuple[int, bool]]] = [[]]  # per level and block: channels, has attention
    if look.family == "hf":
        while look.has(f"unet/down_blocks.{len(levels) - 1}.resnets.0.time_mixer.mix_factor", ""):
            block = f"unet/down_blocks.{len(levels) - 1}"
            while (
                conv := f"{block}.resnets.{len(levels[-1])}.spatial_res_block.conv2.weight"
            ) in look.shapes:
                attends = f"{block}.attentions.{len(levels[-1])}.norm.weight" in look.shapes
                levels[-1].append((look.shapes[conv][0], attends))
            levels.append([])
        levels.pop()
    else:
        n = 1
        while True:
            block = f"{UNET}.input_blocks.{n}"
            if f"{block}.0.op.weight" in look.shapes:
                levels.append([])
            elif (conv := f"{block}.0.out_layers.3.weight") in look.shapes:
                attends = f"{block}.1.norm.weight" in look.shapes
                levels[-1].append((look.shapes[conv][0], attends))
            else:
                break
            n += 1
    depths = {len(level) for level in levels}
    if depths == {0} or len(depths) != 1 or any(len(set(level)) != 1 for level in levels):
        raise UserError(
            f"the U-Net's levels have blocks of (channels, attention) {levels}: expected the same "
            "number on every level and equal ones on each"
        )
    channels = [level[0][0] for level in levels]
    factors = tuple(2**i for i, level in enumerate(levels) if level[0][1])
    if any(c % width for c in channels) or not factors or factors[0] != 1:
        raise UserError(f"U-Net levels of {channels} channels and base {width} are not SVD's")
    if channels[0] % head_channels:
        raise UserError(
            f"heads of {head_channels} channels do not divide {channels[0]}: give --head_channels"
        )
    first = ("unet/down_blocks.0.attentions.0", f"{UNET}.input_blocks.1.1")
    ff, cross, temporal = (
        tuple(f"{place}.{name}" for place, name in zip(first, names, strict=True))
        for names in (
            ("transformer_blocks.0.ff.net.0.proj.weight",) * 2,
            ("transformer_blocks.0.attn2.to_k.weight",) * 2,
            ("temporal_transformer_blocks.0.attn2.to_k.weight", "time_stack.0.attn2.to_k.weight"),
        )
    )
    context = look(*cross)[1]
    if look(*temporal)[1] != context:
        raise UserError("the temporal blocks have a context of their own: this is not SVD's U-Net")
    section = {
        "model_channels": width,
        "channel_mult": tuple(c // width for c in channels),
        "num_res_blocks": depths.pop(),
        "attention_factors": factors,
        "head_channels": head_channels,
        "ff_multiplier": look(*ff)[0] // (2 * channels[0]),
        "temporal_context": True,
    }
    return section, context


def _flow(look: _Look, width: int) -> dict[str, Any] | None:
    blocks = f"{UNET}.flow_blocks.0"
    convs = [n for n in range(0, 64, 4) if f"{blocks}.{n}.weight" in look.shapes]
    if look.family == "hf" or not convs:
        return None
    both = f"{UNET}.input_blocks.1.0.flow_gamma_spatial.weight" in look.shapes
    return {
        "injection": "film",
        "where": "encoder+decoder" if both else "decoder",
        "channel_scale": look.shapes[f"{blocks}.{convs[-1]}.weight"][0] / width,
    }


def _autoencoder(look: _Look) -> dict[str, Any]:
    hf, sgm = "vae/encoder", f"{ENCODER}.encoder"
    base = look(f"{hf}.conv_in.weight", f"{sgm}.conv_in.weight")[0]
    multipliers: list[int] = []
    depth = 0
    while True:
        level = len(multipliers)
        block = look.name(f"{hf}.down_blocks.{level}.resnets", f"{sgm}.down.{level}.block")
        if f"{block}.0.conv1.weight" not in look.shapes:
            break
        depth = sum(f"{block}.{i}.conv1.weight" in look.shapes for i in range(32))
        multipliers.append(look.shapes[f"{block}.0.conv1.weight"][0] // base)
    moments = look(f"{hf}.conv_out.weight", f"{sgm}.conv_out.weight")[0]
    return {
        "base_channels": base,
        "channel_mult": tuple(multipliers),
        "num_res_blocks": depth,
        "latent_channels": moments // 2,
        "quant_conv": look.has("vae/quant_conv.weight", f"{ENCODER}.quant_conv.weight"),
    }


def _clip(look: _Look, heads: int | None) -> dict[str, Any]:
    hf = "image_encoder/vision_model"
    width, _, patch, _ = look(f"{hf}.embeddings.patch_embedding.weight", f"{CLIP}.conv1.weight")
    positions = look(f"{hf}.embeddings.position_embedding.weight", f"{CLIP}.positional_embedding")[
        0
    ]
    blocks = look.name(f"{hf}.encoder.layers", f"{CLIP}.transformer.resblocks")
    norm = look.name("layer_norm1", "ln_1")
    layers = 0
    while f"{blocks}.{layers}.{norm}.weight" in look.shapes:
        layers += 1
    projection = look("image_encoder/visual_projection.weight", f"{CLIP}.proj")
    hidden = look(f"{blocks}.0.mlp.fc1.weight", f"{blocks}.0.mlp.c_fc.weight")[0]
    heads = heads or CLIP_HEADS.get(width, 16)
    if width % heads:
        raise UserError(f"{heads} heads do not divide CLIP's width {width}: give --clip_heads")
    return {
        "width": width,
        "layers": layers,
        "heads": heads,
        "patch": patch,
        "image_size": patch * math.isqrt(positions - 1),
        "projection": projection[0 if look.family == "hf" else 1],
        "mlp_ratio": hidden // width,
    }
