"""Which weight of the released DragNUWA 1.5 / SVD networks is which of our parameters.

One table of rows `(our module, their module, layout)`, built from the sizes in the configs, read in
either direction: `to_params` and `to_state`. Paths are relative to a part of `params` ("unet",
"flow_encoder", ...) on our side and complete on theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from nuwa_jax.models.autoencoder import AutoencoderConfig
from nuwa_jax.models.clip import ClipVisionConfig
from nuwa_jax.models.flow_encoder import FlowEncoderConfig
from nuwa_jax.models.unet import UNetConfig

UNET = "model.diffusion_model"
DECODER = "first_stage_model.decoder"
ENCODER = "conditioner.embedders.3.encoder"
CLIP = "conditioner.embedders.0.open_clip.model.visual"


class Row(NamedTuple):
    """One module of ours, the module of theirs, and how its weights are laid out."""

    ours: str
    theirs: str
    layout: str


class Leaf(NamedTuple):
    """One array of theirs and the einops pattern that brings it into our layout."""

    theirs: str
    pattern: str


# layout: our leaf -> (their leaf, pattern theirs -> ours). einops patterns also read backwards.
BIAS = {"bias": Leaf(".bias", "o -> o")}
LAYOUTS: dict[str, dict[str, Leaf]] = {
    "norm": {"scale": Leaf(".weight", "o -> o")} | BIAS,
    "linear": {"kernel": Leaf(".weight", "o i -> i o")} | BIAS,
    "matrix": {"kernel": Leaf(".weight", "o i -> i o")},
    "conv": {"kernel": Leaf(".weight", "o i h w -> h w i o")} | BIAS,
    "patches": {"kernel": Leaf(".weight", "o i h w -> h w i o")},
    "pointwise": {"kernel": Leaf(".weight", "o i 1 1 -> i o")} | BIAS,
    "time": {"conv/kernel": Leaf(".weight", "o i k -> k i o"), "conv/bias": BIAS["bias"]},
    "time311": {"conv/kernel": Leaf(".weight", "o i k 1 1 -> k i o"), "conv/bias": BIAS["bias"]},
    "fused": {
        "kernel": Leaf("_weight", "o i -> i o"),
        "bias": Leaf("_bias", "o -> o"),
    },
    "bare matrix": {"kernel": Leaf("", "i o -> i o")},
    "scalar": {"mix_factor": Leaf(".mix_factor", "o -> o")},
    "vector": {"": Leaf("", "o -> o")},
    "table": {"": Leaf("", "l c -> l c")},
}

# Blocks, relative to their place.
SPATIAL_RES = (
    Row("norm1", "in_layers.0", "norm"),
    Row("conv1", "in_layers.2", "conv"),
    Row("emb_proj", "emb_layers.1", "linear"),
    Row("norm2", "out_layers.0", "norm"),
    Row("conv2", "out_layers.3", "conv"),
    Row("shortcut", "skip_connection", "conv"),
    Row("flow_injection/flow_norm", "flow_cond_norm", "norm"),
)
TEMPORAL_RES = (
    Row("norm1", "in_layers.0", "norm"),
    Row("conv1", "in_layers.2", "time311"),
    Row("emb_proj", "emb_layers.1", "linear"),
    Row("norm2", "out_layers.0", "norm"),
    Row("conv2", "out_layers.3", "time311"),
)
FLOW_HEADS = (
    Row("gamma_conv", "flow_gamma_spatial", "conv"),
    Row("gamma_time", "flow_gamma_temporal", "time"),
    Row("beta_conv", "flow_beta_spatial", "conv"),
    Row("beta_time", "flow_beta_temporal", "time"),
)
SPATIAL_BLOCK = (
    Row("norm1", "norm1", "norm"),
    Row("self_attention/to_q", "attn1.to_q", "matrix"),
    Row("self_attention/to_k", "attn1.to_k", "matrix"),
    Row("self_attention/to_v", "attn1.to_v", "matrix"),
    Row("self_attention/to_out", "attn1.to_out.0", "linear"),
    Row("norm2", "norm2", "norm"),
    Row("cross_attention/to_q", "attn2.to_q", "matrix"),
    Row("cross_attention/to_k", "attn2.to_k", "matrix"),
    Row("cross_attention/to_v", "attn2.to_v", "matrix"),
    Row("cross_attention/to_out", "attn2.to_out.0", "linear"),
    Row("norm3", "norm3", "norm"),
    Row("feed_forward/proj", "ff.net.0.proj", "linear"),
    Row("feed_forward/out", "ff.net.2", "linear"),
)
TRANSFORMER_ENDS = (
    Row("norm", "norm", "norm"),
    Row("proj_in", "proj_in", "linear"),
    Row("frame_embed/linear_1", "time_pos_embed.0", "linear"),
    Row("frame_embed/linear_2", "time_pos_embed.2", "linear"),
    Row("temporal_block/norm_in", "time_stack.0.norm_in", "norm"),
    Row("temporal_block/feed_forward_in/proj", "time_stack.0.ff_in.net.0.proj", "linear"),
    Row("temporal_block/feed_forward_in/out", "time_stack.0.ff_in.net.2", "linear"),
    Row("time_mixer", "time_mixer", "scalar"),
    Row("proj_out", "proj_out", "linear"),
)
IMAGE_RES = (
    Row("norm1", "norm1", "norm"),
    Row("conv1", "conv1", "conv"),
    Row("norm2", "norm2", "norm"),
    Row("conv2", "conv2", "conv"),
    Row("shortcut", "nin_shortcut", "conv"),
)
DECODER_TIME = (
    Row("time_norm1", "time_stack.in_layers.0", "norm"),
    Row("time_conv1", "time_stack.in_layers.2", "time311"),
    Row("time_norm2", "time_stack.out_layers.0", "norm"),
    Row("time_conv2", "time_stack.out_layers.3", "time311"),
)
IMAGE_ATTENTION = (
    Row("norm", "norm", "norm"),
    Row("q", "q", "pointwise"),
    Row("k", "k", "pointwise"),
    Row("v", "v", "pointwise"),
    Row("out", "proj_out", "pointwise"),
)
CLIP_BLOCK = (
    Row("norm1", "ln_1", "norm"),
    Row("qkv", "attn.in_proj", "fused"),
    Row("out", "attn.out_proj", "linear"),
    Row("norm2", "ln_2", "norm"),
    Row("mlp_1", "mlp.c_fc", "linear"),
    Row("mlp_2", "mlp.c_proj", "linear"),
)


def unet_rows(config: UNetConfig) -> list[Row]:
    """The U-Net without the flow heads, which are `flow_rows`."""
    rows = [
        Row("time_embed/linear_1", f"{UNET}.time_embed.0", "linear"),
        Row("time_embed/linear_2", f"{UNET}.time_embed.2", "linear"),
        Row("vector_embed/linear_1", f"{UNET}.label_emb.0.0", "linear"),
        Row("vector_embed/linear_2", f"{UNET}.label_emb.0.2", "linear"),
        Row("conv_in", f"{UNET}.input_blocks.0.0", "conv"),
        Row("norm_out", f"{UNET}.out.0", "norm"),
        Row("conv_out", f"{UNET}.out.2", "conv"),
    ]
    for name, place in block_places(config).items():
        module = f"{UNET}.{place}"
        if name.endswith("downsample"):
            rows.append(Row(name, f"{module}.0.op", "conv"))
        elif name.endswith("upsample"):
            rows.append(Row(name, f"{module}.conv", "conv"))
        elif name.endswith("_res"):
            rows += res_rows(name, module)
        else:
            rows += transformer_rows(name, module)
    return rows


def flow_rows(
    config: FlowEncoderConfig, unet: UNetConfig, reduction: int, *, heads: bool = True
) -> list[Row]:
    """Flow encoder ("encoder/") and what makes gamma and beta of its maps ("heads/")."""
    rows = []
    blocks = f"{UNET}.flow_blocks"
    stages = (reduction // config.patch_size).bit_length() - 1
    for i in range(stages):
        rows.append(Row(f"encoder/stem_conv_{i}", f"{blocks}.0.{4 * i}", "conv"))
        rows.append(Row(f"encoder/stem_time_{i}", f"{blocks}.0.{4 * i + 1}", "time"))
        if i + 1 < stages:
            rows.append(Row(f"encoder/stem_norm_{i + 1}", f"{blocks}.0.{4 * i + 2}", "norm"))
    for level in range(1, len(unet.channel_mult)):
        ours, theirs = f"encoder/level_{level}", f"{blocks}.{level}"
        rows += [
            Row(f"{ours}_norm", f"{theirs}.0", "norm"),
            Row(f"{ours}_conv", f"{theirs}.2", "conv"),
            Row(f"{ours}_time", f"{theirs}.3", "time"),
            Row(f"{ours}_downsample", f"{theirs}.4.op", "conv"),
        ]
    if heads:
        places = block_places(unet)
        for level in range(len(unet.channel_mult)):
            for side in ("down", "up") if config.where == "encoder+decoder" else ("up",):
                place = places[f"{side}_{level}_0_res"]
                rows += head_rows(f"heads/{side}_{level}", f"{UNET}.{place}")
    return rows


def autoencoder_rows(config: AutoencoderConfig) -> list[Row]:
    """Encoder ("encoder/": the conditioner's, which has the quant_conv) and temporal decoder."""
    rows = encoder_rows("encoder/", f"{ENCODER}.encoder", config)
    if config.quant_conv:
        rows.append(Row("encoder/quant_conv", f"{ENCODER}.quant_conv", "conv"))
    return rows + decoder_rows("decoder/", DECODER, config)


def clip_rows(config: ClipVisionConfig) -> list[Row]:
    """CLIP's image tower."""
    rows = [
        Row("patches", f"{CLIP}.conv1", "patches"),
        Row("class_token", f"{CLIP}.class_embedding", "vector"),
        Row("positions", f"{CLIP}.positional_embedding", "table"),
        Row("norm_in", f"{CLIP}.ln_pre", "norm"),
        Row("norm_out", f"{CLIP}.ln_post", "norm"),
        Row("projection", f"{CLIP}.proj", "bare matrix"),
    ]
    for i in range(config.layers):
        rows += _at(CLIP_BLOCK, f"block_{i}/", f"{CLIP}.transformer.resblocks.{i}.")
    return rows


def block_places(config: UNetConfig) -> dict[str, str]:
    """Our block's name -> where it stands in input_blocks, middle_block and output_blocks."""
    places = {}
    levels, depth = len(config.channel_mult), config.num_res_blocks
    for level in range(levels):
        attend = config.has_attention(level)
        for i in range(depth):
            n = 1 + level * (depth + 1) + i
            places[f"down_{level}_{i}_res"] = f"input_blocks.{n}.0"
            if attend:
                places[f"down_{level}_{i}_transformer"] = f"input_blocks.{n}.1"
        if level < levels - 1:
            places[f"down_{level}_downsample"] = f"input_blocks.{(level + 1) * (depth + 1)}"
        for i in range(depth + 1):
            n = (levels - 1 - level) * (depth + 1) + i
            places[f"up_{level}_{i}_res"] = f"output_blocks.{n}.0"
            if attend:
                places[f"up_{level}_{i}_transformer"] = f"output_blocks.{n}.1"
        if level > 0:
            places[f"up_{level}_upsample"] = f"output_blocks.{n}.{2 if attend else 1}"
    places["mid_0_res"] = "middle_block.0"
    places["mid_0_transformer"] = "middle_block.1"
    places["mid_1_res"] = "middle_block.2"
    return places


def res_rows(ours: str, theirs: str) -> list[Row]:
    """A U-Net res block, without its flow heads."""
    ours = f"{ours}/" if ours else ""
    return [
        *_at(SPATIAL_RES, f"{ours}spatial/", f"{theirs}."),
        *_at(TEMPORAL_RES, f"{ours}temporal/", f"{theirs}.time_stack."),
        Row(f"{ours}time_mixer", f"{theirs}.time_mixer", "scalar"),
    ]


def head_rows(ours: str, theirs: str) -> list[Row]:
    """What makes gamma and beta for the res block `theirs`."""
    return _at(FLOW_HEADS, f"{ours}_", f"{theirs}.")


def transformer_rows(ours: str, theirs: str) -> list[Row]:
    """A U-Net transformer."""
    ours = f"{ours}/" if ours else ""
    return [
        *_at(TRANSFORMER_ENDS, ours, f"{theirs}."),
        *_at(SPATIAL_BLOCK, f"{ours}spatial_block/", f"{theirs}.transformer_blocks.0."),
        *_at(SPATIAL_BLOCK, f"{ours}temporal_block/block/", f"{theirs}.time_stack.0."),
    ]


def encoder_rows(ours: str, theirs: str, config: AutoencoderConfig) -> list[Row]:
    """The autoencoder's encoder without quant_conv."""
    rows = _ends_and_middle(ours, theirs)
    for level in range(len(config.channel_mult)):
        down = f"{theirs}.down.{level}"
        for i in range(config.num_res_blocks):
            rows += _at(IMAGE_RES, f"{ours}down_{level}_res_{i}/", f"{down}.block.{i}.")
        if level < len(config.channel_mult) - 1:
            rows.append(Row(f"{ours}down_{level}_downsample", f"{down}.downsample.conv", "conv"))
    for i in range(2):
        rows += _at(IMAGE_RES, f"{ours}mid_res_{i}/", f"{theirs}.mid.block_{i + 1}.")
    return rows


def decoder_rows(ours: str, theirs: str, config: AutoencoderConfig) -> list[Row]:
    """The temporal decoder."""
    rows = _ends_and_middle(ours, theirs)
    rows.append(Row(f"{ours}time_conv_out", f"{theirs}.conv_out.time_mix_conv", "time311"))
    for level in range(len(config.channel_mult)):
        up = f"{theirs}.up.{level}"
        for i in range(config.num_res_blocks + 1):
            rows += decoder_res_rows(f"{ours}up_{level}_res_{i}/", f"{up}.block.{i}")
        if level > 0:
            rows.append(Row(f"{ours}up_{level}_upsample", f"{up}.upsample.conv", "conv"))
    for i in range(2):
        rows += decoder_res_rows(f"{ours}mid_res_{i}/", f"{theirs}.mid.block_{i + 1}")
    return rows


def decoder_res_rows(ours: str, theirs: str) -> list[Row]:
    """A res block of the temporal decoder."""
    return [
        *_at(IMAGE_RES, f"{ours}spatial/", f"{theirs}."),
        *_at(DECODER_TIME, ours, f"{theirs}."),
        Row(f"{ours}time_mixer", theirs, "scalar"),
    ]


def to_params(
    state: Mapping[str, np.ndarray], rows: Iterable[Row], template: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters shaped like `template` (of `jax.eval_shape`), in float32, from their arrays.

    Rows without a parameter in the template (a shortcut where channels stay, say) are passed over;
    a parameter without a row, a row without an array and a wrong shape are errors.
    """
    leaves = dict(_leaves(rows))
    params = {}
    for name, leaf in flatten_dict(template, sep="/").items():
        theirs, pattern = leaves[name]
        value = rearrange(np.asarray(state[theirs], np.float32), pattern)
        if value.shape != leaf.shape:
            raise ValueError(f"{theirs} is {value.shape} in our layout, {name} is {leaf.shape}")
        params[name] = value
    return unflatten_dict(params, sep="/")


def to_state(params: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """Their arrays from our parameters: undoes `to_params`."""
    leaves = dict(_leaves(rows))
    state = {}
    for name, value in flatten_dict(params, sep="/").items():
        theirs, pattern = leaves[name]
        before, after = pattern.split(" -> ")
        state[theirs] = rearrange(np.asarray(value), f"{after} -> {before}")
    return state


def fold_lora(state: Mapping[str, np.ndarray], scale: float = 1.0) -> dict[str, np.ndarray]:
    """Float32 arrays with each `X.linear` and its low-rank update as one `X`: W + s · up @ down."""
    folded = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        value = np.asarray(value, np.float32)
        module = name.removesuffix(".linear.weight")
        if module != name:
            up, down = (
                np.asarray(state[f"{module}.lora_{part}.weight"], np.float32)
                for part in ("up", "down")
            )
            value = value + scale * (up @ down)
        folded[name.replace(".linear.", ".")] = value
    return folded


def _ends_and_middle(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}conv_in", f"{theirs}.conv_in", "conv"),
        *_at(IMAGE_ATTENTION, f"{ours}mid_attn/", f"{theirs}.mid.attn_1."),
        Row(f"{ours}norm_out", f"{theirs}.norm_out", "norm"),
        Row(f"{ours}conv_out", f"{theirs}.conv_out", "conv"),
    ]


def _at(rows: Iterable[Row], ours: str, theirs: str) -> list[Row]:
    return [Row(ours + row.ours, theirs + row.theirs, row.layout) for row in rows]


def _leaves(rows: Iterable[Row]) -> Iterator[tuple[str, Leaf]]:
    for row in rows:
        for leaf, (suffix, pattern) in LAYOUTS[row.layout].items():
            yield "/".join(filter(None, (row.ours, leaf))), Leaf(row.theirs + suffix, pattern)
