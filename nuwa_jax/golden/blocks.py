"""Single blocks, and the flow encoder, which stands alone at a width of its own."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from nuwa_jax.convert.rules import (
    UNET,
    Row,
    flow_rows,
    head_rows,
    res_rows,
    to_params,
    transformer_rows,
)
from nuwa_jax.golden.compare import (
    Item,
    channels_last,
    compiled,
    flow_last,
    guarded,
    relative,
)
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.golden.model import Golden, flow_encoder_config
from nuwa_jax.models.flow_encoder import FlowEncoder, FlowEncoderConfig, FlowHeads
from nuwa_jax.models.unet import (
    SpatialResBlock,
    Stream,
    UNetConfig,
    VideoResBlock,
    VideoTransformer,
)

BLOCK = 1e-6


def load(module: nn.Module, state: Mapping[str, np.ndarray], rows: list[Row], *args: Any) -> Any:
    """The module's parameters from the reference's arrays."""
    template = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return to_params(state, rows, template)


def check_resblock(golden: Golden) -> Iterator[Item]:
    """Res blocks alone: with flow (also where frames are pictures, and its spatial half), plain."""
    arrays = golden.arrays("resblock")
    yield from arrays.require_some(
        {"PLACE|module": r".+\|module", "PLACE|flow": r".+\|flow", "PLACE|ioi": r".+\|ioi"}
    )
    places = arrays.places()
    if places and all("flow" in arrays.at(place) for place in places):
        yield from arrays.require(["plain|module"])
    told = (arrays[f"{place}|ioi"].shape[1] for place in places if f"{place}|ioi" in arrays)
    frames = next(told, golden.frames)
    for place in places:
        checks = check_res_block(arrays.at(place), golden.state, frames)
        yield from guarded(arrays.name(place), checks)


def check_res_block(
    arrays: Arrays, state: Mapping[str, np.ndarray], frames: int, note: str = ""
) -> Iterator[Item]:
    """One res block: module, x, emb, out and, where it has flow: flow, ioi, out_ioi, spatial_only.

    `frames` is the length of a video where no `ioi` [b t] tells it.
    """
    module = f"{UNET}.{arrays['module']}"
    with_flow = f"{module}.flow_gamma_spatial.weight" in state or "flow" in arrays
    if "ioi" in arrays:
        frames = arrays["ioi"].shape[1]
    x, emb = (channels_last(arrays[name], frames) for name in ("x", "emb"))
    out = channels_last(arrays["out"], frames)
    features, flow = out.shape[-1], None
    block = VideoResBlock(features, "film")
    stream = Stream(emb, None, None, None, np.zeros(x.shape[:2], bool))
    if with_flow:
        heads = FlowHeads(FlowEncoderConfig(where="decoder"), features, (1,))
        inputs = ([channels_last(arrays["flow"], frames)], jnp.ones((len(x),)))
        params = load(heads, state, head_rows("up_0", module), *inputs)
        flow = compiled(heads.apply)({"params": params}, *inputs)["up_0"]
    params = load(block, state, res_rows("", module), x, stream, flow)
    apply = compiled(block.apply)
    yield relative(arrays.name("out"), apply({"params": params}, x, stream, flow), out, BLOCK, note)
    if not with_flow:
        return
    yield from arrays.require(["ioi", "out_ioi", "spatial_only"])
    if "ioi" in arrays and "out_ioi" in arrays:
        marked = stream._replace(image_only=arrays["ioi"] > 0.5)
        ours = apply({"params": params}, x, marked, flow)
        theirs = channels_last(arrays["out_ioi"], frames)
        yield relative(arrays.name("out_ioi"), ours, theirs, BLOCK, note)
    if "spatial_only" in arrays:
        apply = compiled(SpatialResBlock(features, "film").apply)
        ours = apply({"params": params["spatial"]}, x, emb, flow)
        theirs = channels_last(arrays["spatial_only"], frames)
        yield relative(arrays.name("spatial_only"), ours, theirs, BLOCK, note)


def check_transformer(golden: Golden) -> Iterator[Item]:
    """Transformers alone, with one and with several tokens of context, also one per frame."""
    arrays = golden.arrays("transformer")
    yield from arrays.require_some(
        {
            "PLACE|module": r".+\|module",
            "PLACE|context_3tok": r".+\|context_\d+tok",
            "PLACE|context_perframe_2tok": r".+\|context_perframe_\d+tok",
        }
    )
    # Contexts of one kind are there at every place, except those of one context per frame.
    found = arrays.matching(r".+\|(?:context|out)_(\d+tok)").values()
    kinds = sorted({match[1] for match in found})
    head_channels = golden.model.unet.head_channels
    for place in arrays.places():
        part = arrays.at(place)
        more = part.matching(r"(?:context|out)_(perframe_\d+tok)").values()
        checks = check_video_transformer(
            part,
            golden.state,
            golden.frames,
            head_channels,
            [*kinds, *sorted({match[1] for match in more})],
            golden.floor("transformer"),
        )
        yield from guarded(arrays.name(place), checks)


def check_video_transformer(
    arrays: Arrays,
    state: Mapping[str, np.ndarray],
    frames: int,
    head_channels: int,
    kinds: list[str],
    note: str = "",
) -> Iterator[Item]:
    """One transformer: module, x and, for each kind, context_KIND and out_KIND."""
    module = f"{UNET}.{arrays['module']}"
    x = channels_last(arrays["x"], frames)
    transformer = VideoTransformer(max(1, x.shape[-1] // head_channels), 4)
    params = None
    for kind in kinds:
        yield from arrays.require([f"context_{kind}", f"out_{kind}"])
        if f"context_{kind}" not in arrays or f"out_{kind}" not in arrays:
            continue
        context = rearrange(arrays[f"context_{kind}"], "(b t) l c -> b t l c", t=frames)
        context = np.asarray(context, np.float32)
        if params is None:
            stream = Stream(np.zeros((*x.shape[:2], 1)), context[:, 0], None, None, None)
            params = load(transformer, state, transformer_rows("", module), x, stream)

        ours = compiled(transformer_call(transformer, differ_by_frame(context)))(params, x, context)
        theirs = channels_last(arrays[f"out_{kind}"], frames)
        yield relative(arrays.name(f"out_{kind}"), ours, theirs, BLOCK, note)


def transformer_call(module: VideoTransformer, per_frame: bool) -> Callable[..., Array]:
    """(params, x [b t h w c], context [b t l c]) to the transformer's output."""

    def call(params: Any, x: Array, context: Array) -> Array:
        emb = jnp.zeros((*x.shape[:2], 1))  # a transformer reads none
        stream = Stream(emb, context[:, 0], None, None, None)
        with one_context_per_frame(context) if per_frame else contextlib.nullcontext():
            return module.apply({"params": params}, x, stream)

    return call


@contextlib.contextmanager
def one_context_per_frame(context: Float[Array, "b t l c"]) -> Iterator[None]:
    """Within it, the attention of our transformers over space reads `context`, frame by frame.

    Our networks take one context per video, all the reference ever samples with. What it would do
    with one per frame is in its arrays: attention over time reads that of the first frame.
    """

    def interceptor(call: Any, args: tuple, kwargs: dict, where: Any) -> Any:
        if where.method_name == "__call__" and where.module.name == "spatial_block":
            args = (args[0], rearrange(context, "b t l c -> (b t) l c"), None)
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield


def differ_by_frame(context: Float[np.ndarray, "b t l c"]) -> bool:
    """Whether `one_context_per_frame` is needed."""
    return bool((context != context[:, :1]).any())


def check_flow_encoder(golden: Golden) -> Iterator[Item]:
    """Every level's features of two videos, and of one with its flow scaled."""
    arrays = golden.arrays("flow_encoder")
    levels = len(golden.setting("flow_encoder_alone.channel_mult"))
    yield from arrays.require([f"f{level}_scale1" for level in range(levels)])
    # The config states what each scale changed; without that, one there must be.
    scales = golden.setting("flow_encoder_alone.rel_change_when_flow_scaled", {"S": None})
    for scale in scales:
        pattern = r"[\d.]+" if scale == "S" else re.escape(scale)
        name = f"f{levels - 1}_video0_scale{scale}"
        yield from arrays.require_some({name: rf"f\d+_video\d+_scale{pattern}"})
    flow = flow_last(arrays["flow"])
    # (name, level, videos, scale); videos do not mix, so one call does for all.
    wanted = []
    for key, match in arrays.matching(r"f(\d+)_(?:video(\d+)_)?scale([\d.]+)").items():
        videos = range(len(flow)) if match[2] is None else [int(match[2])]
        wanted.append((key, int(match[1]), videos, float(match[3])))
    rows = dict.fromkeys((video, scale) for _, _, videos, scale in wanted for video in videos)
    rows = {row: i for i, row in enumerate(rows)}
    flows = np.stack([np.float32(scale) * flow[video] for video, scale in rows])
    alone = golden.setting("flow_encoder_alone")
    key, level, *_ = wanted[0]
    reduction = flow.shape[2] // (arrays[key].shape[2] << level)
    features = flow_features(
        golden.flow_state,
        flows,
        int(alone["model_channels"]),
        tuple(alone["channel_mult"]),
        reduction,
        flow_encoder_config(alone.get("flow_dim_scale", 1)),
    )
    for key, level, videos, scale in wanted:
        ours = features[level][np.array([rows[video, scale] for video in videos])]
        theirs = channels_last(arrays[key], flow.shape[1])
        yield relative(arrays.name(key), ours, theirs, BLOCK)


def flow_features(
    state: Mapping[str, np.ndarray],
    flow: Float[np.ndarray, "b t H W 2"],
    model_channels: int,
    channel_mult: tuple[int, ...],
    reduction: int,
    config: FlowEncoderConfig,
) -> list[Float[Array, "b t h w c"]]:
    """The flow encoder's maps, one per level."""
    module = FlowEncoder(config, model_channels, channel_mult, reduction)
    rows = flow_rows(config, UNetConfig(channel_mult=channel_mult), reduction, heads=False)
    rows = [row._replace(ours=row.ours.removeprefix("encoder/")) for row in rows]
    params = load(module, state, rows, flow)
    return compiled(module.apply)({"params": params}, flow)
