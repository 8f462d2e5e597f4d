"""What the networks of the tiny folder give, in the layout of the original code's files."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from nuwa_jax.convert.rules import encoder_rows, flow_rows, to_params, to_state
from nuwa_jax.golden.blocks import transformer_call
from nuwa_jax.golden.compare import compiled
from nuwa_jax.golden.drags import demo_flow, demo_tracks
from nuwa_jax.golden.model import flow_encoder_config
from nuwa_jax.golden.sampling import sampler_of
from nuwa_jax.golden.taps import TAPPED, counterparts
from nuwa_jax.golden.unet import Case, run_unet
from nuwa_jax.models.clip import ClipVision, preprocess
from nuwa_jax.models.flow_encoder import FlowEncoder, FlowFeature
from nuwa_jax.models.unet import (
    SpatialResBlock,
    Stream,
    UNetConfig,
    VideoResBlock,
    VideoTransformer,
)
from nuwa_jax.models.video_ldm import Drop, to_float


def channels_first(x):
    """Our b t h w c as their (b t) c h w."""
    return rearrange(np.asarray(x), "b t h w c -> (b t) c h w")


def draw(rng, shapes):
    """Random values in place of every array, about as large as trained ones."""

    def one(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    return jax.tree.map(one, shapes)


def half(value):
    """float16 in the order of its axes: safetensors writes other orders wrongly."""
    return np.ascontiguousarray(value, np.float16)


def flow_encoder(rng, given):
    """(arrays, weights) of the flow encoder that stands alone."""
    channels, mult = given["model_channels"], tuple(given["channel_mult"])
    config = flow_encoder_config(given["flow_dim_scale"])
    module = FlowEncoder(config, channels, mult, 8)
    flow = rng.normal(size=(2, 3, 16, 32, 2), scale=3).astype(np.float16).astype(np.float32)
    params = draw(rng, jax.eval_shape(module.init, jax.random.key(0), flow)["params"])
    rows = flow_rows(config, UNetConfig(channel_mult=mult), 8, heads=False)
    state = to_state({"encoder": params}, rows)
    state = {name: half(value) for name, value in state.items()}
    params = jax.tree.map(lambda a: a.astype(np.float16).astype(np.float32), params)
    with jax.default_matmul_precision("highest"):
        apply = compiled(module.apply)
        plain = apply({"params": params}, flow)
        out = {f"f{level}_scale1": channels_first(f) for level, f in enumerate(plain)}
        for scale in (0.0, 2.5):
            scaled = apply({"params": params}, scale * flow)[1][:1]
            out[f"f1_video0_scale{scale}"] = channels_first(scaled)
    return out | {"flow": rearrange(flow, "b t h w c -> b t c h w").astype(np.float16)}, state


def _resblock(golden, rng):
    out, t = {}, golden.frames
    places = {
        "deep": ("input_blocks.5.0", "down_2_0", 128),
        "plain": ("middle_block.0", "mid_0", 64),
    }
    unet = golden.params("unet")["unet"]
    for place, (module, ours, channels) in places.items():
        x, emb = rng.normal(size=(2, t, 4, 3, channels)), rng.normal(size=(2, t, 256))
        x, emb = x.astype(np.float32), emb.astype(np.float32)
        params, flow = unet[f"{ours}_res"], None
        out[f"{place}|module"] = module
        out[f"{place}|x"] = channels_first(x)
        out[f"{place}|emb"] = rearrange(emb, "b t c -> (b t) c")
        if place == "deep":
            maps = rng.normal(size=(2, t, 4, 3, 32)).astype(np.float32)
            out[f"{place}|flow"] = channels_first(maps)
            flow = _modulation(golden, ours, maps)
        stream = Stream(emb, None, None, None, jnp.zeros((2, t), bool))
        apply = compiled(VideoResBlock(64, "film").apply)
        out[f"{place}|out"] = channels_first(apply({"params": params}, x, stream, flow))
        if flow is None:
            continue
        marked = np.zeros((2, t), bool)
        marked[1, 1:] = True
        out[f"{place}|ioi"] = marked.astype(np.float32)
        marked = stream._replace(image_only=jnp.asarray(marked))
        out[f"{place}|out_ioi"] = channels_first(apply({"params": params}, x, marked, flow))
        half = compiled(SpatialResBlock(64, "film").apply)
        half = half({"params": params["spatial"]}, x, emb, flow)
        out[f"{place}|spatial_only"] = channels_first(half)
    return out


def _modulation(golden, block, maps):
    """gamma and beta of a block by the formula: a 3x3 convolution, then one over time."""
    heads = golden.params("flow_encoder")["flow_encoder"]["heads"]
    site = block.rsplit("_", 1)[0]

    def conv(x, layer, dims):
        spec = {2: ("NHWC", "HWIO", "NHWC"), 1: ("NHC", "HIO", "NHC")}[dims]
        pad = "SAME" if dims == 2 else "VALID"
        kernel = layer["kernel"]
        out = jax.lax.conv_general_dilated(x, kernel, (1,) * dims, pad, dimension_numbers=spec)
        return out + layer["bias"]

    def modulation(name):
        b, _, h, w, _ = maps.shape
        y = conv(rearrange(maps, "b t h w c -> (b t) h w c"), heads[f"{site}_{name}_conv"], 2)
        y = rearrange(y, "(b t) h w c -> (b h w) t c", b=b)
        y = jnp.pad(y, ((0, 0), (1, 1), (0, 0)), mode="edge")
        y = conv(y, heads[f"{site}_{name}_time"]["conv"], 1)
        return rearrange(y, "(b h w) t c -> b t h w c", b=b, h=h)

    return FlowFeature(modulation("gamma"), modulation("beta"), jnp.ones((len(maps),)))


def _transformer(golden, rng):
    t, head = golden.frames, golden.model.unet.head_channels
    unet, out = golden.params("unet")["unet"], {}
    for place, module, ours, channels in (
        ("down", "input_blocks.3.1", "down_1_0_transformer", 128),
        ("middle", "middle_block.1", "mid_0_transformer", 64),
    ):
        x = rng.normal(size=(2, t, 4, 3, channels)).astype(np.float32)
        block = VideoTransformer(channels // head, 4)
        out |= {f"{place}|module": module, f"{place}|x": channels_first(x)}
        kinds = {"1tok": (1, False), "4tok": (4, False)}
        kinds |= {"perframe_3tok": (3, True)} if place == "middle" else {}
        for kind, (tokens, per_frame) in kinds.items():
            context = rng.normal(size=(2, t if per_frame else 1, tokens, 20)).astype(np.float32)
            context = np.broadcast_to(context, (2, t, tokens, 20))
            made = compiled(transformer_call(block, per_frame))(unet[ours], x, context)
            out[f"{place}|context_{kind}"] = rearrange(context, "b t l c -> (b t) l c")
            out[f"{place}|out_{kind}"] = channels_first(made)
    return out


def _vae(golden, rng):
    params, model = golden.params("autoencoder"), golden.model
    image = rng.uniform(-1, 1, (2, 1, 16, 24, 3)).astype(np.float16)
    z = rng.normal(size=(1, 6, 2, 4, 4)).astype(np.float32)
    out = {"image": channels_first(image), "z": channels_first(z)}
    posterior = compiled(model.posterior)

    def moments(encoder):
        given = params | {"autoencoder": {"encoder": encoder}}
        return channels_first(np.concatenate(posterior(given, image.astype(np.float32)), axis=-1))

    encoder = params["autoencoder"]["encoder"]
    none = {"quant_conv": {"kernel": np.eye(8, dtype=np.float32)[None, None], "bias": np.zeros(8)}}
    out["cond_encoder_raw"] = moments(encoder | none)
    out["cond_moments_after_quant_conv"] = moments(encoder)
    out["cond_mode"] = out["cond_embedder_out"] = moments(encoder)[:, :4]
    rows = encoder_rows("", "first_stage_model.encoder", model.autoencoder)
    own = {name: value for name, value in encoder.items() if name != "quant_conv"}
    out["first_stage_moments"] = moments(to_params(golden.state, rows, own) | none)
    raw = compiled(model.decode_raw)
    for key, n in (("dec_timesteps3", 3), ("dec_chunks_of_1", 1)):
        chunks = rearrange(z, "1 (b t) h w c -> b t h w c", t=n)
        out[key] = channels_first(raw(params, chunks))
    one = rearrange(z[:, :2], "1 b h w c -> b 1 h w c")
    out["decode_first_stage_net(z)"] = channels_first(compiled(model.decode)(params, one))
    return out


def _clip(golden, rng):
    config, out = golden.model.image_encoder, {}
    params = golden.params("image_encoder")["image_encoder"]
    embed = compiled(ClipVision(config).apply)
    for name, size in (("wide", (40, 300)), ("net", golden.size)):
        image = rng.integers(0, 256, (1, *size, 3)).astype(np.uint8)
        pixels = compiled(preprocess)(to_float(jnp.asarray(image)))
        first = rearrange(np.asarray(pixels), "n h w c -> n c h w")
        embedding = embed({"params": params}, pixels)
        wide = first.astype(np.float64)
        out |= {
            f"{name}|image_u8": rearrange(image, "n h w c -> n c h w"),
            f"{name}|preprocessed_stride7": first[..., ::7, ::7],
            f"{name}|preprocessed_rows_50_52": first[..., 50:53, :],
            f"{name}|preprocessed_sum_sumsq": np.array([wide.sum(), np.square(wide).sum()]),
            f"{name}|embedding": embedding,
            f"{name}|crossattn": embedding[:, None],
        }
    return out


def _unet_inputs(golden, rng):
    """x, context, 2-token context, vector, flow of two videos."""
    t, (height, width) = golden.frames, golden.size
    return (
        rng.normal(size=(2, t, height // 4, width // 4, 8)).astype(np.float32),
        rng.normal(size=(2, 1, 20)).astype(np.float32),
        rng.normal(size=(2, 2, 20)).astype(np.float32),
        rng.normal(size=(2, 72)).astype(np.float32),
        rng.normal(size=(2, t, height, width, 2), scale=3).astype(np.float16),
    )


def _unet_cases(golden, rng):
    """Runs by the names of their outputs: (videos, tokens, c_noise, zero flow, image only)."""
    x, one, two, vector, flow = _unet_inputs(golden, rng)
    t = golden.frames
    marked, c_noise = np.arange(t) == 1, np.log([0.6, 12.0]) / 4
    runs = {
        "b2_out": (2, one, c_noise, 1, False),
        "b1_out_sigma_0.6": (1, one, c_noise[:1], 1, False),
        "b1_out_sigma_12.0": (1, one, c_noise[1:], 1, False),
        "b1_ioi_out_sigma_12.0": (1, one, c_noise[1:], 1, True),
        "b1_zero_flow_out_sigma_0.6": (1, one, c_noise[:1], 0, False),
        "b2_ctx2tok_out": (2, two, c_noise, 1, False),
    }
    return {
        name: [
            Case(
                x[v],
                np.float32(levels[v]),
                repeat(context[v], "l c -> t l c", t=t),
                vector[v],
                scale * flow[v].astype(np.float32),
                marked if ioi else np.zeros(t, bool),
            )
            for v in range(videos)
        ]
        for name, (videos, context, levels, scale, ioi) in runs.items()
    }


def _unet(golden, rng):
    t = golden.frames
    x, one, two, vector, flow = _unet_inputs(golden, np.random.default_rng(5))
    cases = _unet_cases(golden, np.random.default_rng(5))
    out = {name: channels_first(run_unet(golden, run)[0]) for name, run in cases.items()}
    sigma = np.repeat(np.array([0.6, 12.0], np.float32), t)
    return out | {
        "x": channels_first(x),
        "context": np.repeat(one, t, axis=0),
        "context_2tok": np.repeat(two, t, axis=0),
        "y": np.repeat(vector, t, axis=0),
        "flow": rearrange(flow, "b t h w c -> b t c h w"),
        "b2_sigma": sigma,
        "b2_c_noise": np.log(sigma) / 4,
        "b1_ioi_indicator": (np.arange(t) == 1).astype(np.float32)[None],
        "b1_out_sigma_0.6_float64": out["b1_out_sigma_0.6"].astype(np.float64),
    }


def _unet_taps(golden, rng):
    cases = _unet_cases(golden, np.random.default_rng(5))["b1_out_sigma_12.0"]
    paths = {k: v for k, v in counterparts(golden).items() if re.fullmatch(TAPPED, k)}
    _, seen = run_unet(golden, cases, frozenset(paths.values()))
    out = {}
    for module, path in paths.items():
        value = np.asarray(seen[path])
        if value.ndim == 2:
            value = np.repeat(value, golden.frames, axis=0)
        else:
            value = value.reshape(golden.frames, *value.shape[-3:]).transpose(0, 3, 1, 2)
        stride = max(1, value.size // 256)
        out |= {
            f"{module}|shape": np.array(value.shape),
            f"{module}|stride": np.array(stride),
            f"{module}|sample": value.reshape(-1)[::stride][:256],
            f"{module}|mean_std_absmax": np.array(
                [value.mean(), value.std(ddof=1), np.abs(value).max()], np.float32
            ),
        }
    return out


@functools.cache
def _run(golden):
    """The whole run: e2e's arrays and the sampler's."""
    rng, t, (height, width) = np.random.default_rng(7), golden.frames, golden.size
    text = "[[[100, 100], [180, 130], [300, 120]], [[50, 200]], [[500, 20], [400, 300]]]"
    gaussian = golden.config["gaussian"]
    flow = demo_flow(demo_tracks(text, t, height, width), height, width, **gaussian)[None]
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    picture_noise = rng.normal(size=(1, height, width, 3)).astype(np.float32)
    noise = rng.normal(size=(1, t, height // 4, width // 4, 4)).astype(np.float32)
    params = golden.params("autoencoder", "unet", "flow_encoder", "image_encoder")
    kept = Drop(*(jnp.zeros((1,), bool) for _ in range(3)))
    given = {"image": to_float(jnp.asarray(image))[None], "noise": picture_noise, "flow": flow}
    conditions = [
        compiled(functools.partial(golden.condition, drop=drop))(params, **given)
        for drop in (kept._replace(image=jnp.ones((1,), bool)), kept)
    ]
    sampler = sampler_of(golden)
    latents = sampler.run(params, conditions, noise)
    video = np.asarray(compiled(golden.model.decode)(params, latents[0][:, None]))[:, 0]
    wide = video.reshape(t, -1).astype(np.float64)
    e2e = {
        "first_frame_u8": image,
        "cond_aug_noise": rearrange(picture_noise, "1 h w c -> 1 c h w"),
        "init_noise": channels_first(noise),
        "flow": rearrange(flow, "b t h w c -> b t c h w"),
        "tracks_json": text,
        "frames_rows_off0_cols_off2_stride3": rearrange(
            video[:, ::3, 2::3], "t h w c -> 1 t c h w"
        ),
        "frames_sum_sumsq_per_frame": np.stack([wide.sum(1), np.square(wide).sum(1)]),
    }
    for side, condition in zip(("uc", "c"), conditions, strict=True):
        e2e[f"{side}_crossattn"] = np.repeat(condition.context, t, axis=0)
        e2e[f"{side}_vector"] = np.repeat(condition.vector, t, axis=0)
        e2e[f"{side}_concat"] = channels_first(condition.concat)
    sigmas = sampler.sigmas
    return e2e, {
        "init_noise": channels_first(noise),
        "sigma_next_gamma": np.stack([sigmas[:-1], sigmas[1:], 0 * sigmas[1:]], axis=-1),
        "sigmas": sigmas,
        "guider_scale": np.linspace(1.5, 3.0, t)[None],
        "x": np.stack([channels_first(x) for x in (*sampler.x, latents)]),
        "model_out_uncond_then_cond": np.stack([channels_first(x) for x in sampler.raw]),
        "denoised_guided": np.stack([channels_first(x) for x in sampler.guided]),
    }


MAKERS = {
    "resblock": _resblock,
    "transformer": _transformer,
    "vae": _vae,
    "clip": _clip,
    "unet": _unet,
    "unet_taps": _unet_taps,
    "sampler": lambda golden, rng: _run(golden)[1],
    "e2e": lambda golden, rng: _run(golden)[0],
}
