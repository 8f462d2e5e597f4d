"""Whole networks against arrays made by the original DragNUWA 1.5 code, where those are at hand.

They are 24 MB and not part of the repository (`test_reference_blocks.py` needs none of them).
Bounds are relative L2 errors in float32; the reference's own rounding is about half of them.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from golden_checks import (
    check,
    check_res_block,
    check_transformer,
    compiled,
    flow_features,
    frames_last,
    load,
)
from safetensors.numpy import load_file

from nuwa_jax.convert.rules import (
    CLIP,
    autoencoder_rows,
    clip_rows,
    encoder_rows,
    flow_rows,
    fold_lora,
    to_params,
    to_state,
    unet_rows,
)
from nuwa_jax.models.autoencoder import AutoencoderConfig, Encoder, TemporalDecoder
from nuwa_jax.models.clip import ClipVision, ClipVisionConfig, preprocess
from nuwa_jax.models.flow_encoder import FlowEncoder, FlowEncoderConfig, FlowHeads
from nuwa_jax.models.layers import sinusoids
from nuwa_jax.models.unet import UNet, UNetConfig

GOLDEN = pathlib.Path(__file__).parents[3] / "shared" / "golden" / "small"
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "weights.safetensors").is_file(),
    reason=f"the reference's arrays are not at {GOLDEN}",
)

FRAMES = 5
UNET_CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 1, 2, 2),
    head_channels=16,
    flow_injection="film",
)
FLOW_CONFIG = FlowEncoderConfig()
REDUCTION = 8
VAE_CONFIG = AutoencoderConfig(base_channels=32, channel_mult=(1, 1, 2, 1))
CLIP_CONFIG = ClipVisionConfig(width=64, layers=2, heads=4, projection=64)


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def state():
    return fold_lora(load_file(GOLDEN / "weights.safetensors"))


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def entries(name, place):
    """The arrays `place|...` of a file, without the prefix."""
    prefix = f"{place}|"
    found = arrays(name).items()
    return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}


@pytest.mark.parametrize("place", ["same_ch", "skip_conv", "up_deep", "plain"])
def test_res_block(state, place):
    check_res_block(entries("resblock", place), state)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_transformer(state, place, tokens):
    golden = entries("transformer", place)
    check_transformer(golden, state, tokens, UNET_CONFIG.head_channels)


def test_flow_encoder():
    golden = arrays("flow_encoder")
    state = fold_lora(load_file(GOLDEN / "flow_encoder_weights.safetensors"))
    flow = rearrange(golden["flow"].astype(np.float32), "b t c h w -> b t h w c")
    scales = (0.0, 0.1, 10.0)
    # Videos do not mix, so one call does for all.
    flows = np.concatenate([flow, *(scale * flow[:1] for scale in scales)])
    features = flow_features(state, flows, 128, (1, 1))
    # A chain of ten convolutions: XLA's float32 is 1.1e-6 from float64 here, the reference's 5e-7.
    for level in range(2):
        theirs = frames_last(golden[f"f{level}_scale1"], 2)
        check(features[level][:2], theirs, 2e-6, f"f{level}")
    for i, scale in enumerate(scales):
        theirs = frames_last(golden[f"f1_video0_scale{scale}"], 1)
        check(features[1][2 + i][None], theirs, 2e-6, f"f1 of the flow times {scale}")


def test_unet(state):
    golden = arrays("unet")
    unet = UNet(UNET_CONFIG)
    x, theirs = frames_last(golden["x"], 2), frames_last(golden["b2_out"], 2)
    vector = golden["y"][::FRAMES]
    context = np.zeros((2, 3, golden["context"].shape[-1]), np.float32)
    context[:, :1] = golden["context"][::FRAMES]
    flow = rearrange(golden["flow"].astype(np.float32), "b t c h w -> b t h w c")

    # (name, video, c_noise, tokens, context, image only, flow, theirs): one row, one video.
    none = np.zeros((FRAMES,), bool)
    c_noise = golden["b2_c_noise"][::FRAMES]
    cases = [(f"b2 video {v}", v, c_noise[v], 1, context, none, v, theirs[v]) for v in range(2)]
    for sigma in (0.002, 0.1, 1.0, 25.0, 700.0):
        out = frames_last(golden[f"b1_out_sigma_{sigma}"], 1)[0]
        cases.append((f"sigma {sigma}", 0, np.log(sigma) / 4, 1, context, none, 0, out))
    marked = golden["b1_ioi_indicator"][0] > 0.5
    out = frames_last(golden["b1_ioi_out_sigma_1.0"], 1)[0]
    cases.append(("image only", 0, 0.0, 1, context, marked, 0, out))
    out = frames_last(golden["b1_zero_flow_out_sigma_1.0"], 1)[0]
    cases.append(("zero flow", 0, 0.0, 1, context, none, 2, out))
    out = frames_last(golden["b1_out_sigma_1.0_float64"], 1)[0]
    cases.append(("float64", 0, 0.0, 1, context, none, 0, out))
    three, out = golden["context_3tok"][::FRAMES], frames_last(golden["b2_ctx3tok_out"], 2)
    for v in range(2):
        cases.append((f"3 tokens, video {v}", v, c_noise[v], 3, three, none, v, out[v]))

    names, videos, c_noise, tokens, contexts, image_only, flows, theirs = zip(*cases, strict=True)
    videos, flows = np.array(videos), np.array(flows)
    flow = np.concatenate([flow, np.zeros_like(flow[:1])])
    sites = injection(state, flow)
    batch = (
        x[videos],
        np.array(c_noise, np.float32),
        np.stack([c[v] for c, v in zip(contexts, videos, strict=True)]),
        vector[videos],
        jax.tree.map(lambda a: a[flows], sites),
        None,
        np.arange(3) < np.array(tokens)[:, None],
        np.stack(image_only),
    )
    params = load(unet, state, unet_rows(UNET_CONFIG), *batch)
    ours = compiled(unet.apply)({"params": params}, *batch)
    for i, name in enumerate(names):
        check(ours[i], theirs[i], 7e-6, name)


def injection(state, flow):
    """gamma and beta of every injection site for `flow [b t H W 2]`."""
    sizes = (UNET_CONFIG.model_channels, UNET_CONFIG.channel_mult)
    encoder = FlowEncoder(FLOW_CONFIG, *sizes, REDUCTION)
    heads = FlowHeads(FLOW_CONFIG, *sizes)
    keep = jnp.ones((len(flow),))
    features = jax.eval_shape(encoder.init_with_output, jax.random.key(0), flow)[0]
    template = {
        "encoder": jax.eval_shape(encoder.init, jax.random.key(0), flow)["params"],
        "heads": jax.eval_shape(heads.init, jax.random.key(0), features, keep)["params"],
    }
    params = to_params(state, flow_rows(FLOW_CONFIG, UNET_CONFIG, REDUCTION), template)

    @compiled
    def apply(params, flow):
        features = encoder.apply({"params": params["encoder"]}, flow)
        return heads.apply({"params": params["heads"]}, features, keep)

    return apply(params, flow)


@pytest.fixture(scope="module")
def autoencoder(state):
    """Parameters of the conditioner's encoder and of the decoder, and the arrays."""
    template = {
        "encoder": jax.eval_shape(
            Encoder(VAE_CONFIG).init, jax.random.key(0), jnp.zeros((1, 64, 96, 3))
        )["params"],
        "decoder": jax.eval_shape(
            TemporalDecoder(VAE_CONFIG).init, jax.random.key(0), jnp.zeros((1, 1, 8, 12, 4))
        )["params"],
    }
    return to_params(state, autoencoder_rows(VAE_CONFIG), template), arrays("vae")


def test_autoencoder_encodes(state, autoencoder):
    params, golden = autoencoder
    apply = compiled(Encoder(VAE_CONFIG).apply)
    image = rearrange(golden["image"], "n c h w -> n h w c")
    ours = apply({"params": params["encoder"]}, image)
    theirs = rearrange(golden["cond_moments_after_quant_conv"], "n c h w -> n h w c")
    check(ours, theirs, 5e-6, "moments")
    check(ours[..., :4], theirs[..., :4], 5e-6, "mean")
    # The first stage's own encoder has no quant_conv: the identity stands in for it.
    first = {k: v for k, v in params["encoder"].items() if k != "quant_conv"}
    rows = encoder_rows("", "first_stage_model.encoder", VAE_CONFIG)
    first = to_params(state, rows, first)
    first["quant_conv"] = {"kernel": np.eye(8, dtype=np.float32)[None, None], "bias": np.zeros(8)}
    ours = apply({"params": first}, image)
    theirs = rearrange(golden["first_stage_moments"], "n c h w -> n h w c")
    check(ours, theirs, 5e-6, "first stage's moments")


@pytest.mark.parametrize(
    ("frames", "name"), [(4, "dec_timesteps4"), (2, "dec_timesteps2"), (1, "dec_chunks_of_1")]
)
def test_autoencoder_decodes(autoencoder, frames, name):
    params, golden = autoencoder
    latents = frames_last(golden["z"], 4 // frames)
    ours = compiled(TemporalDecoder(VAE_CONFIG).apply)({"params": params["decoder"]}, latents)
    check(ours, frames_last(golden[name], 4 // frames), 5e-6)


def test_clip(state):
    golden = arrays("clip")
    names = ("down_320x576", "net_size", "down_448x300")
    pixels = []
    for name in names:
        image = rearrange(golden[f"{name}|image_u8"], "n c h w -> n h w c") / np.float32(127.5) - 1
        pixels.append(compiled(preprocess)(image))
        theirs = rearrange(golden[f"{name}|preprocessed_rows_100_101"], "n c h w -> n h w c")
        np.testing.assert_allclose(pixels[-1][:, 100:102], theirs, atol=3e-6)
        theirs = rearrange(golden[f"{name}|preprocessed_stride4"], "n c h w -> n h w c")
        np.testing.assert_allclose(pixels[-1][:, ::4, ::4], theirs, atol=3e-6)
    pixels = jnp.concatenate(pixels)
    module = ClipVision(CLIP_CONFIG)
    params = load(module, state, clip_rows(CLIP_CONFIG), pixels)
    ours = compiled(module.apply)({"params": params}, pixels)
    for i, name in enumerate(names):
        check(ours[i : i + 1], golden[f"{name}|embedding"], 3e-6, name)


def test_sinusoids_and_vector():
    golden = arrays("scalars")
    for ours, theirs in (
        (sinusoids(golden["timestep_in"], 32), golden["timestep_embedding_dim_mc"]),
        (sinusoids(jnp.arange(FRAMES), 32), golden["frame_embedding_dim_mc"]),
        (
            sinusoids(golden["vector_ids_fps_motion_aug"], 256).reshape(1, -1),
            golden["vector_embedding"],
        ),
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_names_read_backwards(state):
    """The table gives back every array of CLIP's image tower, bit for bit."""
    module = ClipVision(CLIP_CONFIG)
    rows = clip_rows(CLIP_CONFIG)
    params = load(module, state, rows, jnp.zeros((1, 224, 224, 3)))
    theirs = {name: value for name, value in state.items() if name.startswith(CLIP)}
    back = to_state(params, rows)
    assert back.keys() == theirs.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
