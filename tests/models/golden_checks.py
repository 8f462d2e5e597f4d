"""Comparing our blocks with the reference's arrays, which are (b t) c h w, video after video."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from nuwa_jax.convert.rules import UNET, flow_rows, head_rows, res_rows, to_params, transformer_rows
from nuwa_jax.models.flow_encoder import FlowEncoder, FlowEncoderConfig, FlowHeads
from nuwa_jax.models.unet import (
    SpatialResBlock,
    Stream,
    UNetConfig,
    VideoResBlock,
    VideoTransformer,
)

# The rounding is that of any other level, the compilation of a U-Net takes a fraction of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(function):
    """`jax.jit` for functions that run once."""
    return jax.jit(function, compiler_options=QUICK)


def frames_last(x, b):
    """Their (b t) c h w, or (b t) c, as our b t h w c, or b t c."""
    x = np.asarray(x, np.float32)
    if x.ndim == 2:
        return rearrange(x, "(b t) c -> b t c", b=b)
    return rearrange(x, "(b t) c h w -> b t h w c", b=b)


def relative_l2(ours, theirs):
    """|ours - theirs| / |theirs| over all entries, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def check(ours, theirs, bound, name="output"):
    """Prints the relative L2 error (pytest -s) and asserts that it is within the bound."""
    error = relative_l2(ours, theirs)
    print(f"{name}: {error:.2e} (bound {bound:.0e})")
    assert error <= bound, f"{name} is {error:.2e} from the reference"


def load(module, state, rows, *args):
    """The module's parameters from the reference's arrays."""
    template = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return to_params(state, rows, template)


def check_res_block(golden, state):
    """`golden`: module, x, emb, out of 2 videos and, for blocks with flow, flow, ioi, ..."""
    module = f"{UNET}.{golden['module']}"
    x, emb, out = (frames_last(golden[name], 2) for name in ("x", "emb", "out"))
    features, flow = out.shape[-1], None
    block = VideoResBlock(features, "film")
    stream = Stream(emb, None, None, None, np.zeros(x.shape[:2], bool))
    if "flow" in golden:
        heads = FlowHeads(FlowEncoderConfig(where="decoder"), features, (1,))
        inputs = ([frames_last(golden["flow"], 2)], jnp.ones((2,)))
        params = load(heads, state, head_rows("up_0", module), *inputs)
        flow = compiled(heads.apply)({"params": params}, *inputs)["up_0"]
    params = load(block, state, res_rows("", module), x, stream, flow)
    apply = compiled(block.apply)
    check(apply({"params": params}, x, stream, flow), out, 1e-6)
    if flow is None:
        return
    marked = stream._replace(image_only=golden["ioi"] > 0.5)
    ours = apply({"params": params}, x, marked, flow)
    check(ours, frames_last(golden["out_ioi"], 2), 1e-6, "image only")
    ours = compiled(SpatialResBlock(features, "film").apply)(
        {"params": params["spatial"]}, x, emb, flow
    )
    check(ours, frames_last(golden["spatial_only"], 2), 1e-6, "spatial half")


def check_transformer(golden, state, tokens, head_channels):
    """`golden`: module, x, context and out of 2 videos with 1 or 3 tokens of context."""
    x = frames_last(golden["x"], 2)
    t = x.shape[1]
    context = np.asarray(golden[f"context_{tokens}tok"][::t], np.float32)
    module = VideoTransformer(x.shape[-1] // head_channels, 4)
    stream = Stream(np.zeros((2, t, 1)), context, None, None, None)
    rows = transformer_rows("", f"{UNET}.{golden['module']}")
    params = load(module, state, rows, x, stream)
    ours = compiled(module.apply)({"params": params}, x, stream)
    check(ours, frames_last(golden[f"out_{tokens}tok"], 2), 1e-6, f"{tokens} tokens")


def flow_features(state, flow, model_channels, channel_mult):
    """Our flow encoder's maps, one per level, of flow [b t H W 2] (autoencoder reduction 8)."""
    config = FlowEncoderConfig()
    module = FlowEncoder(config, model_channels, channel_mult, 8)
    rows = flow_rows(config, UNetConfig(channel_mult=channel_mult), 8, heads=False)
    rows = [row._replace(ours=row.ours.removeprefix("encoder/")) for row in rows]
    params = load(module, state, rows, flow)
    return compiled(module.apply)({"params": params}, flow)
