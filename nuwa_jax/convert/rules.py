"""Which weight of the released DragNUWA 1.5 / SVD networks is which of our parameters.

One table of rows `(our module, layout, name in Stability's files, name in a diffusers folder)`,
built from the sizes in the configs and read in either direction. Paths are relative to a part of
`params` ("unet", "flow_encoder", ...) on our side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from nuwa_jax.models.autoencoder import AutoencoderConfig
from nuwa_jax.models.clip import ClipVisionConfig
from nuwa_jax.models.flow_encoder import FlowEncoderConfig
from nuwa_jax.models.unet import UNetConfig

Family = Literal["sgm", "hf"]
UNET = "model.diffusion_model"
DECODER = "first_stage_model.decoder"
ENCODER = "conditioner.embedders.3.encoder"
CLIP = "conditioner.embedders.0.open_clip.model.visual"


class Row(NamedTuple):
    """One module of ours and what it is called in each family of checkpoints.

    `sgm` is its complete name in the files of Stability's code (SVD, DragNUWA 1.5), `hf` its name
    within the file of its part in a diffusers folder; None where that family has no such module.
    """

    ours: str
    layout: str
    sgm: str | None
    hf: str | None
    hf_layout: str | None = None  # where it is stored in another layout there


class Leaf(NamedTuple):
    """Arrays of theirs, joined along their first axis, and the einops pattern to our layout."""

    theirs: tuple[str, ...]
    pattern: str


def _leaf(suffixes: str | tuple[str, ...], pattern: str) -> Leaf:
    return Leaf((suffixes,) if isinstance(suffixes, str) else suffixes, pattern)


# layout: our leaf -> (suffixes of their arrays, pattern theirs -> ours); read backwards, too.
BIAS = {"bias": _leaf(".bias", "o -> o")}
LAYOUTS: dict[str, dict[str, Leaf]] = {
    "norm": {"scale": _leaf(".weight", "o -> o")} | BIAS,
    "linear": {"kernel": _leaf(".weight", "o i -> i o")} | BIAS,
    "matrix": {"kernel": _leaf(".weight", "o i -> i o")},
    "conv": {"kernel": _leaf(".weight", "o i h w -> h w i o")} | BIAS,
    "patches": {"kernel": _leaf(".weight", "o i h w -> h w i o")},
    "pointwise": {"kernel": _leaf(".weight", "o i 1 1 -> i o")} | BIAS,
    "time": {"conv/kernel": _leaf(".weight", "o i k -> k i o"), "conv/bias": BIAS["bias"]},
    "time311": {"conv/kernel": _leaf(".weight", "o i k 1 1 -> k i o"), "conv/bias": BIAS["bias"]},
    "fused": {"kernel": _leaf("_weight", "o i -> i o"), "bias": _leaf("_bias", "o -> o")},
    "q k v": {
        leaf: _leaf(tuple(f".{name}_proj.{theirs}" for name in "qkv"), pattern)
        for leaf, theirs, pattern in (
            ("kernel", "weight", "o i -> i o"),
            ("bias", "bias", "o -> o"),
        )
    },
    "bare matrix": {"kernel": _leaf("", "i o -> i o")},
    "scalar": {"mix_factor": _leaf(".mix_factor", "o -> o")},
    "vector": {"": _leaf("", "o -> o")},
    "table": {"": _leaf("", "l c -> l c")},
    "embedding": {"": _leaf(".weight", "l c -> l c")},
}

# Blocks, relative to their place.
SPATIAL_RES = (
    Row("norm1", "norm", "in_layers.0", "norm1"),
    Row("conv1", "conv", "in_layers.2", "conv1"),
    Row("emb_proj", "linear", "emb_layers.1", "time_emb_proj"),
    Row("norm2", "norm", "out_layers.0", "norm2"),
    Row("conv2", "conv", "out_layers.3", "conv2"),
    Row("shortcut", "conv", "skip_connection", "conv_shortcut"),
    Row("flow_injection/flow_norm", "norm", "flow_cond_norm", None),
)
TEMPORAL_RES = (
    Row("norm1", "norm", "in_layers.0", "norm1"),
    Row("conv1", "time311", "in_layers.2", "conv1"),
    Row("emb_proj", "linear", "emb_layers.1", "time_emb_proj"),
    Row("norm2", "norm", "out_layers.0", "norm2"),
    Row("conv2", "time311", "out_layers.3", "conv2"),
)
FLOW_HEADS = (
    Row("gamma_conv", "conv", "flow_gamma_spatial", None),
    Row("gamma_time", "time", "flow_gamma_temporal", None),
    Row("beta_conv", "conv", "flow_beta_spatial", None),
    Row("beta_time", "time", "flow_beta_temporal", None),
)
SPATIAL_BLOCK = (
    Row("norm1", "norm", "norm1", "norm1"),
    Row("self_attention/to_q", "matrix", "attn1.to_q", "attn1.to_q"),
    Row("self_attention/to_k", "matrix", "attn1.to_k", "attn1.to_k"),
    Row("self_attention/to_v", "matrix", "attn1.to_v", "attn1.to_v"),
    Row("self_attention/to_out", "linear", "attn1.to_out.0", "attn1.to_out.0"),
    Row("norm2", "norm", "norm2", "norm2"),
    Row("cross_attention/to_q", "matrix", "attn2.to_q", "attn2.to_q"),
    Row("cross_attention/to_k", "matrix", "attn2.to_k", "attn2.to_k"),
    Row("cross_attention/to_v", "matrix", "attn2.to_v", "attn2.to_v"),
    Row("cross_attention/to_out", "linear", "attn2.to_out.0", "attn2.to_out.0"),
    Row("norm3", "norm", "norm3", "norm3"),
    Row("feed_forward/proj", "linear", "ff.net.0.proj", "ff.net.0.proj"),
    Row("feed_forward/out", "linear", "ff.net.2", "ff.net.2"),
)
TRANSFORMER_ENDS = (
    Row("norm", "norm", "norm", "norm"),
    Row("proj_in", "linear", "proj_in", "proj_in"),
    Row("frame_embed/linear_1", "linear", "time_pos_embed.0", "time_pos_embed.linear_1"),
    Row("frame_embed/linear_2", "linear", "time_pos_embed.2", "time_pos_embed.linear_2"),
    Row("time_mixer", "scalar", "time_mixer", "time_mixer"),
    Row("proj_out", "linear", "proj_out", "proj_out"),
)
TEMPORAL_BLOCK = (
    Row("norm_in", "norm", "norm_in", "norm_in"),
    Row("feed_forward_in/proj", "linear", "ff_in.net.0.proj", "ff_in.net.0.proj"),
    Row("feed_forward_in/out", "linear", "ff_in.net.2", "ff_in.net.2"),
)
IMAGE_RES = (
    Row("norm1", "norm", "norm1", "norm1"),
    Row("conv1", "conv", "conv1", "conv1"),
    Row("norm2", "norm", "norm2", "norm2"),
    Row("conv2", "conv", "conv2", "conv2"),
    Row("shortcut", "conv", "nin_shortcut", "conv_shortcut"),
)
DECODER_TIME = (
    Row("time_norm1", "norm", "time_stack.in_layers.0", "temporal_res_block.norm1"),
    Row("time_conv1", "time311", "time_stack.in_layers.2", "temporal_res_block.conv1"),
    Row("time_norm2", "norm", "time_stack.out_layers.0", "temporal_res_block.norm2"),
    Row("time_conv2", "time311", "time_stack.out_layers.3", "temporal_res_block.conv2"),
)
IMAGE_ATTENTION = (
    Row("norm", "norm", "norm", "group_norm"),
    Row("q", "pointwise", "q", "to_q", "linear"),
    Row("k", "pointwise", "k", "to_k", "linear"),
    Row("v", "pointwise", "v", "to_v", "linear"),
    Row("out", "pointwise", "proj_out", "to_out.0", "linear"),
)
CLIP_BLOCK = (
    Row("norm1", "norm", "ln_1", "layer_norm1"),
    Row("qkv", "fused", "attn.in_proj", "self_attn", "q k v"),
    Row("out", "linear", "attn.out_proj", "self_attn.out_proj"),
    Row("norm2", "norm", "ln_2", "layer_norm2"),
    Row("mlp_1", "linear", "mlp.c_fc", "mlp.fc1"),
    Row("mlp_2", "linear", "mlp.c_proj", "mlp.fc2"),
)


def unet_rows(config: UNetConfig) -> list[Row]:
    """The U-Net without the flow heads, which are `flow_rows`."""
    rows = _at(
        (
            Row("time_embed/linear_1", "linear", "time_embed.0", "time_embedding.linear_1"),
            Row("time_embed/linear_2", "linear", "time_embed.2", "time_embedding.linear_2"),
            Row("vector_embed/linear_1", "linear", "label_emb.0.0", "add_embedding.linear_1"),
            Row("vector_embed/linear_2", "linear", "label_emb.0.2", "add_embedding.linear_2"),
            Row("conv_in", "conv", "input_blocks.0.0", "conv_in"),
            Row("norm_out", "norm", "out.0", "conv_norm_out"),
            Row("conv_out", "conv", "out.2", "conv_out"),
        ),
        "",
        f"{UNET}.",
        "",
    )
    for name, place in block_places(config).items():
        sgm, hf = f"{UNET}.{place.sgm}", place.hf
        if name.endswith("downsample"):
            rows.append(Row(name, "conv", f"{sgm}.0.op", f"{hf}.conv"))
        elif name.endswith("upsample"):
            rows.append(Row(name, "conv", f"{sgm}.conv", f"{hf}.conv"))
        elif name.endswith("_res"):
            rows += res_rows(name, sgm, hf)
        else:
            rows += transformer_rows(name, sgm, hf)
    return rows


def flow_rows(
    config: FlowEncoderConfig, unet: UNetConfig, reduction: int, *, heads: bool = True
) -> list[Row]:
    """Flow encoder ("encoder/") and what makes gamma and beta of its maps ("heads/")."""
    rows = []
    blocks = f"{UNET}.flow_blocks"
    stages = (reduction // config.patch_size).bit_length() - 1
    for i in range(stages):
        rows.append(Row(f"encoder/stem_conv_{i}", "conv", f"{blocks}.0.{4 * i}", None))
        rows.append(Row(f"encoder/stem_time_{i}", "time", f"{blocks}.0.{4 * i + 1}", None))
        if i + 1 < stages:
            rows.append(Row(f"encoder/stem_norm_{i + 1}", "norm", f"{blocks}.0.{4 * i + 2}", None))
    for level in range(1, len(unet.channel_mult)):
        ours, theirs = f"encoder/level_{level}", f"{blocks}.{level}"
        rows += [
            Row(f"{ours}_norm", "norm", f"{theirs}.0", None),
            Row(f"{ours}_conv", "conv", f"{theirs}.2", None),
            Row(f"{ours}_time", "time", f"{theirs}.3", None),
            Row(f"{ours}_downsample", "conv", f"{theirs}.4.op", None),
        ]
    if heads:
        places = block_places(unet)
        for level in range(len(unet.channel_mult)):
            for side in ("down", "up") if config.where == "encoder+decoder" else ("up",):
                place = places[f"{side}_{level}_0_res"].sgm
                rows += head_rows(f"heads/{side}_{level}", f"{UNET}.{place}")
    return rows


def autoencoder_rows(config: AutoencoderConfig) -> list[Row]:
    """Encoder ("encoder/": the conditioner's, which has the quant_conv) and temporal decoder."""
    rows = encoder_rows("encoder/", f"{ENCODER}.encoder", config)
    if config.quant_conv:
        rows.append(Row("encoder/quant_conv", "conv", f"{ENCODER}.quant_conv", "quant_conv"))
    return rows + decoder_rows("decoder/", DECODER, config)


def clip_rows(config: ClipVisionConfig, prefix: str = CLIP) -> list[Row]:
    """CLIP's image tower; OpenCLIP's own files have the prefix "visual"."""
    hf = "vision_model"
    rows = [
        Row("patches", "patches", f"{prefix}.conv1", f"{hf}.embeddings.patch_embedding"),
        Row(
            "class_token", "vector", f"{prefix}.class_embedding", f"{hf}.embeddings.class_embedding"
        ),
        Row(
            "positions",
            "table",
            f"{prefix}.positional_embedding",
            f"{hf}.embeddings.position_embedding",
            "embedding",
        ),
        Row("norm_in", "norm", f"{prefix}.ln_pre", f"{hf}.pre_layrnorm"),
        Row("norm_out", "norm", f"{prefix}.ln_post", f"{hf}.post_layernorm"),
        Row("projection", "bare matrix", f"{prefix}.proj", "visual_projection", "matrix"),
    ]
    for i in range(config.layers):
        sgm, layer = f"{prefix}.transformer.resblocks.{i}.", f"{hf}.encoder.layers.{i}."
        rows += _at(CLIP_BLOCK, f"block_{i}/", sgm, layer)
    return rows


class Place(NamedTuple):
    """Where a block of ours stands in either family's U-Net."""

    sgm: str
    hf: str


def block_places(config: UNetConfig) -> dict[str, Place]:
    """Our block's name -> where it stands in input_blocks, middle_block and output_blocks."""
    places = {}
    levels, depth = len(config.channel_mult), config.num_res_blocks
    for level in range(levels):
        attend = config.has_attention(level)
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        for i in range(depth):
            n = 1 + level * (depth + 1) + i
            block = f"down_{level}_{i}"
            places[f"{block}_res"] = Place(f"input_blocks.{n}.0", f"{down}.resnets.{i}")
            if attend:
                place = Place(f"input_blocks.{n}.1", f"{down}.attentions.{i}")
                places[f"{block}_transformer"] = place
        if level < levels - 1:
            place = Place(f"input_blocks.{(level + 1) * (depth + 1)}", f"{down}.downsamplers.0")
            places[f"down_{level}_downsample"] = place
        for i in range(depth + 1):
            n = (levels - 1 - level) * (depth + 1) + i
            block = f"up_{level}_{i}"
            places[f"{block}_res"] = Place(f"output_blocks.{n}.0", f"{up}.resnets.{i}")
            if attend:
                place = Place(f"output_blocks.{n}.1", f"{up}.attentions.{i}")
                places[f"{block}_transformer"] = place
        if level > 0:
            place = Place(f"output_blocks.{n}.{2 if attend else 1}", f"{up}.upsamplers.0")
            places[f"up_{level}_upsample"] = place
    places["mid_0_res"] = Place("middle_block.0", "mid_block.resnets.0")
    places["mid_0_transformer"] = Place("middle_block.1", "mid_block.attentions.0")
    places["mid_1_res"] = Place("middle_block.2", "mid_block.resnets.1")
    return places


def res_rows(ours: str, sgm: str, hf: str = "") -> list[Row]:
    """A U-Net res block, without its flow heads."""
    ours = f"{ours}/" if ours else ""
    return [
        *_at(SPATIAL_RES, f"{ours}spatial/", f"{sgm}.", f"{hf}.spatial_res_block."),
        *_at(TEMPORAL_RES, f"{ours}temporal/", f"{sgm}.time_stack.", f"{hf}.temporal_res_block."),
        Row(f"{ours}time_mixer", "scalar", f"{sgm}.time_mixer", f"{hf}.time_mixer"),
    ]


def head_rows(ours: str, sgm: str) -> list[Row]:
    """What makes gamma and beta for the res block `sgm`."""
    return _at(FLOW_HEADS, f"{ours}_", f"{sgm}.", "")


def transformer_rows(ours: str, sgm: str, hf: str = "") -> list[Row]:
    """A U-Net transformer."""
    ours = f"{ours}/" if ours else ""
    spatial, time = "transformer_blocks.0.", "time_stack.0."
    hf_time = f"{hf}.temporal_{spatial}"
    return [
        *_at(TRANSFORMER_ENDS, ours, f"{sgm}.", f"{hf}."),
        *_at(TEMPORAL_BLOCK, f"{ours}temporal_block/", f"{sgm}.{time}", hf_time),
        *_at(SPATIAL_BLOCK, f"{ours}spatial_block/", f"{sgm}.{spatial}", f"{hf}.{spatial}"),
        *_at(SPATIAL_BLOCK, f"{ours}temporal_block/block/", f"{sgm}.{time}", hf_time),
    ]


def encoder_rows(ours: str, sgm: str, config: AutoencoderConfig) -> list[Row]:
    """The autoencoder's encoder without quant_conv."""
    rows = _ends_and_middle(ours, sgm, "encoder")
    for level in range(len(config.channel_mult)):
        down, hf = f"{sgm}.down.{level}", f"encoder.down_blocks.{level}"
        for i in range(config.num_res_blocks):
            place = f"{ours}down_{level}_res_{i}/"
            rows += _at(IMAGE_RES, place, f"{down}.block.{i}.", f"{hf}.resnets.{i}.")
        if level < len(config.channel_mult) - 1:
            name = f"{ours}down_{level}_downsample"
            rows.append(Row(name, "conv", f"{down}.downsample.conv", f"{hf}.downsamplers.0.conv"))
    for i in range(2):
        place, hf = f"{ours}mid_res_{i}/", f"encoder.mid_block.resnets.{i}."
        rows += _at(IMAGE_RES, place, f"{sgm}.mid.block_{i + 1}.", hf)
    return rows


def decoder_rows(ours: str, sgm: str, config: AutoencoderConfig) -> list[Row]:
    """The temporal decoder."""
    rows = _ends_and_middle(ours, sgm, "decoder")
    time_conv = f"{ours}time_conv_out"
    rows.append(Row(time_conv, "time311", f"{sgm}.conv_out.time_mix_conv", "decoder.time_conv_out"))
    levels = len(config.channel_mult)
    for level in range(levels):
        up, hf = f"{sgm}.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(config.num_res_blocks + 1):
            place = f"{ours}up_{level}_res_{i}/"
            rows += decoder_res_rows(place, f"{up}.block.{i}", f"{hf}.resnets.{i}")
        if level > 0:
            name = f"{ours}up_{level}_upsample"
            rows.append(Row(name, "conv", f"{up}.upsample.conv", f"{hf}.upsamplers.0.conv"))
    for i in range(2):
        place, hf = f"{ours}mid_res_{i}/", f"decoder.mid_block.resnets.{i}"
        rows += decoder_res_rows(place, f"{sgm}.mid.block_{i + 1}", hf)
    return rows


def decoder_res_rows(ours: str, sgm: str, hf: str = "") -> list[Row]:
    """A res block of the temporal decoder."""
    return [
        *_at(IMAGE_RES, f"{ours}spatial/", f"{sgm}.", f"{hf}.spatial_res_block."),
        *_at(DECODER_TIME, ours, f"{sgm}.", f"{hf}."),
        Row(f"{ours}time_mixer", "scalar", sgm, f"{hf}.time_mixer"),
    ]


def leaves(rows: Iterable[Row], family: Family = "sgm") -> dict[str, Leaf]:
    """Our parameter -> what it is made of in a family; rows that the family lacks are left out."""
    found = {}
    for row in rows:
        module = row.sgm if family == "sgm" else row.hf
        if module is None:
            continue
        layout = row.hf_layout if family == "hf" and row.hf_layout else row.layout
        for leaf, (suffixes, pattern) in LAYOUTS[layout].items():
            name = "/".join(filter(None, (row.ours, leaf)))
            found[name] = Leaf(tuple(module + suffix for suffix in suffixes), pattern)
    return found


def read_leaf(read: Callable[[str], np.ndarray], leaf: Leaf) -> np.ndarray:
    """Our array from theirs, of the dtype that `read(name)` gives."""
    parts = [read(name) for name in leaf.theirs]
    return rearrange(parts[0] if len(parts) == 1 else np.concatenate(parts), leaf.pattern)


def write_leaf(value: np.ndarray, leaf: Leaf) -> dict[str, np.ndarray]:
    """Their arrays from ours: undoes `read_leaf`."""
    before, after = leaf.pattern.split(" -> ")
    value = rearrange(np.asarray(value), f"{after} -> {before}")
    return dict(zip(leaf.theirs, np.split(value, len(leaf.theirs)), strict=True))


def to_params(
    state: Mapping[str, np.ndarray],
    rows: Iterable[Row],
    template: Mapping[str, Any],
    family: Family = "sgm",
) -> dict[str, Any]:
    """Parameters shaped like `template` (of `jax.eval_shape`), in float32, from their arrays.

    Rows without a parameter in the template (a shortcut where channels stay, say) are passed over;
    a parameter without a row, a row without an array and a wrong shape are errors.
    """
    table = leaves(rows, family)
    params = {}
    for name, wanted in flatten_dict(template, sep="/").items():
        value = read_leaf(lambda n: np.asarray(state[n], np.float32), table[name])
        if value.shape != wanted.shape:
            raise ValueError(
                f"{table[name].theirs} is {value.shape} in our layout, {name} is {wanted.shape}"
            )
        params[name] = value
    return unflatten_dict(params, sep="/")


def to_state(
    params: Mapping[str, Any], rows: Iterable[Row], family: Family = "sgm"
) -> dict[str, np.ndarray]:
    """Their arrays from our parameters: undoes `to_params`."""
    table = leaves(rows, family)
    state = {}
    for name, value in flatten_dict(params, sep="/").items():
        state |= write_leaf(value, table[name])
    return state


def _ends_and_middle(ours: str, sgm: str, hf: str) -> list[Row]:
    attention = f"{hf}.mid_block.attentions.0."
    return [
        Row(f"{ours}conv_in", "conv", f"{sgm}.conv_in", f"{hf}.conv_in"),
        *_at(IMAGE_ATTENTION, f"{ours}mid_attn/", f"{sgm}.mid.attn_1.", attention),
        Row(f"{ours}norm_out", "norm", f"{sgm}.norm_out", f"{hf}.conv_norm_out"),
        Row(f"{ours}conv_out", "conv", f"{sgm}.conv_out", f"{hf}.conv_out"),
    ]


def _at(rows: Iterable[Row], ours: str, sgm: str, hf: str) -> list[Row]:
    return [
        row._replace(
            ours=ours + row.ours,
            sgm=None if row.sgm is None else sgm + row.sgm,
            hf=None if row.hf is None else hf + row.hf,
        )
        for row in rows
    ]
