"""A folder of goldens of quite another shape than the reference's, made by our own code.

Names, layouts and config are those of the original code; nothing of its numbers is here. Whether
ours equal the reference's is what its own folder is for.
"""

import json

import jax
import numpy as np
import tiny_networks
from einops import repeat
from safetensors.numpy import save_file
from scipy.interpolate import PchipInterpolator

from nuwa_jax.convert.rules import (
    UNET,
    autoencoder_rows,
    clip_rows,
    encoder_rows,
    flow_rows,
    to_state,
    unet_rows,
)
from nuwa_jax.diffusion import edm
from nuwa_jax.golden.folder import CONFIG, FLOW_WEIGHTS, WEIGHTS
from nuwa_jax.golden.model import Golden, model_from_config
from nuwa_jax.models.layers import sinusoids
from nuwa_jax.motion.tracks import pchip

T, HEIGHT, WIDTH, STEPS = 3, 32, 64, 2
SIDE = 24  # of each sinusoid in the conditioning vector
SCALE = 0.5  # of LoRA
TRACKS = [[[100, 100], [180, 130], [300, 120]], [[50, 200]], [[50, 200], [51, 230]]]
EDGE_TRACKS = [[[10, 20], [-30, 40]], [[400, 300], [400, 300], [200, 10]], [[400, 300], [575, 319]]]


def config() -> dict:
    """Three levels, attention at the second alone, one res block, LoRA of rank 3 at half scale."""
    vae = {"ch": 8, "ch_mult": [1, 2, 1], "num_res_blocks": 1, "z_channels": 4}

    def number(key):
        return {"input_key": key, "params": {"outdim": SIDE}}

    clip = {"image_size": 224, "layers": 1, "width": 24, "head_width": 12, "patch_size": 56}
    return {
        "num_frames": T,
        "height": HEIGHT,
        "width": WIDTH,
        "scale_factor": 0.3,
        "fps_id": 7,
        "motion_bucket_id": 127,
        "cond_aug": 0.05,
        "network_config": {
            "adm_in_channels": 3 * SIDE,
            "num_classes": "sequential",
            "in_channels": 8,
            "out_channels": 4,
            "model_channels": 64,
            "attention_resolutions": [2],
            "num_res_blocks": 1,
            "channel_mult": [1, 2, 1],
            "num_head_channels": 32,
            "transformer_depth": 1,
            "context_dim": 20,
            "flow_dim_scale": 2,
        },
        "first_stage_config": {"decoder_config": {"params": vae}},
        "conditioner_emb_models": [
            {"input_key": "cond_frames_without_noise", "params": {}},
            number("fps_id"),
            number("motion_bucket_id"),
            {
                "input_key": "cond_frames",
                "params": {"encoder_config": {"params": {"ddconfig": vae}}},
            },
            number("cond_aug"),
        ],
        "open_clip_model_config": {"embed_dim": 20, "vision_cfg": clip},
        "sampler_config": {
            "discretization_config": {"params": {"sigma_max": 90.0}},
            "guider_config": {"params": {"min_scale": 1.5, "max_scale": 3.0, "num_frames": T}},
            "num_steps": STEPS,
        },
        "unet_lora_rank": 3,
        "lora_scale": 0.5,
        "gaussian": {"kernel_size": 33, "sigma": 5},
        "drag_full": {"height": 40, "width": 72, "model_length": 6, "kernel_size": 33, "sigma": 5},
        "drag_small": {"height": 21, "width": 30, "model_length": 4, "kernel_size": 9, "sigma": 2},
        "flow_encoder_alone": {"model_channels": 64, "channel_mult": [1, 2], "flow_dim_scale": 1},
    }


def write_folder(path, names):
    """A folder with the config, the weights and the files `names`; returns its `Golden`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config()))
    rng = np.random.default_rng(0)
    save_file(_weights(rng), path / WEIGHTS)
    alone, flow_weights = tiny_networks.flow_encoder(rng, config()["flow_encoder_alone"])
    save_file(flow_weights, path / FLOW_WEIGHTS)
    golden = Golden(path)
    makers = {"scalars": _scalars, "lora": _lora, "drag": _drag, "flow_encoder": lambda *_: alone}
    makers |= tiny_networks.MAKERS
    with jax.default_matmul_precision("highest"):
        for name in names:
            np.savez(path / f"{name}.npz", **makers[name](golden, np.random.default_rng(1)))
    return golden


def _weights(rng):
    given = config()
    model = model_from_config(given)
    shapes = jax.eval_shape(
        lambda key: model.init(key, height=HEIGHT, width=WIDTH, frames=T), jax.random.key(0)
    )
    width = shapes["unet"]["vector_embed"]["linear_1"]["kernel"].shape[1]
    shapes["unet"]["vector_embed"]["linear_1"]["kernel"] = jax.ShapeDtypeStruct(
        (3 * SIDE, width), np.float32
    )
    params, state = tiny_networks.draw(rng, shapes), {}
    for part, rows in (
        ("unet", unet_rows(model.unet)),
        ("flow_encoder", flow_rows(model.flow_encoder, model.unet, model.autoencoder.reduction)),
        ("autoencoder", autoencoder_rows(model.autoencoder)),
        ("image_encoder", clip_rows(model.image_encoder)),
    ):
        state |= to_state(params[part], rows)
    encoder = {k: v for k, v in params["autoencoder"]["encoder"].items() if k != "quant_conv"}
    rows = encoder_rows("", "first_stage_model.encoder", model.autoencoder)
    state |= to_state(tiny_networks.draw(rng, encoder), rows)
    kernel = _kernel(given["gaussian"])
    kernel = repeat(kernel[:, None] * kernel, "h w -> 2 1 h w")
    state = {name: tiny_networks.half(value) for name, value in state.items()}
    return _with_lora(rng, state, given["unet_lora_rank"]) | {
        "guassian_filter.weight": np.ascontiguousarray(kernel, np.float32)
    }


def _with_lora(rng, state, rank):
    """Every linear layer of the U-Net as X.linear, X.lora_down, X.lora_up."""
    out = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        linear = state[f"{module}.weight"].ndim == 2 if f"{module}.weight" in state else False
        if not (linear and name.startswith(UNET)):
            out[name] = value
            continue
        out[f"{module}.linear.{leaf}"] = value
        if leaf == "weight":
            outputs, inputs = value.shape
            for part, shape in (("down", (rank, inputs)), ("up", (outputs, rank))):
                update = rng.normal(size=shape) / shape[1] ** 0.5
                out[f"{module}.lora_{part}.weight"] = tiny_networks.half(update)
    return out


def _kernel(gaussian):
    size, sigma = gaussian["kernel_size"], gaussian["sigma"]
    return np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)


def _scalars(golden, rng):
    low, high, rho = golden.sigma_range
    sigma = np.array([0.01, 0.7, 3.0, 90.0], np.float32)
    out = {f"sigmas_{STEPS}": edm.karras_sigmas(STEPS, low, high, rho)}
    out["sigmas_7_sigma_max_80_default"] = edm.karras_sigmas(7, low, 80.0, rho)
    out["sigma"] = sigma
    for key, value in zip(("c_skip", "c_out", "c_in", "c_noise"), edm.scalings(sigma), strict=True):
        out[key] = value
    out["guider_scale"] = np.linspace(1.5, 3.0, T)[None]
    out["timestep_in"] = np.array([-1.2, 0.0, 1.5])
    out["timestep_embedding_dim_mc"] = sinusoids(out["timestep_in"], 64)
    out["frame_embedding_dim_mc"] = sinusoids(np.arange(T), 64)
    out["vector_ids_fps_motion_aug"] = np.array([7.0, 127.0, 0.05])
    out["vector_embedding"] = sinusoids(out["vector_ids_fps_motion_aug"], SIDE).reshape(1, -1)
    return out


def _lora(golden, rng):
    out = {}
    for place, module in (
        ("first", f"{UNET}.time_embed.0"),
        ("second", f"{UNET}.middle_block.1.transformer_blocks.0.attn1.to_q"),
    ):
        stored = golden.weights
        weight, down, up = (
            stored[f"{module}.{name}.weight"].astype(np.float32)
            for name in ("linear", "lora_down", "lora_up")
        )
        x = rng.normal(size=(4, weight.shape[1])).astype(np.float32)
        bias = 0.0
        if f"{module}.linear.bias" in stored:
            bias = out[f"{place}|b"] = stored[f"{module}.linear.bias"].astype(np.float32)
        base = x @ weight.T + bias
        folded = weight + 0.5 * (up @ down)
        out |= {f"{place}|key": module, f"{place}|x": x, f"{place}|W": weight}
        out |= {f"{place}|down": down, f"{place}|up": up, f"{place}|scale": 0.5}
        out |= {f"{place}|W_folded": folded, f"{place}|out_base_only": base}
        out |= {f"{place}|out_unfolded": base + 0.5 * (x @ down.T @ up.T)}
        out |= {f"{place}|out_folded": x @ folded.T + bias}
    return out


def demo_map(tracks, frames, height, width):
    """The DragNUWA demo's map before its Gaussian, written as in its own loop."""
    out = np.zeros((frames - 1, height, width, 2), np.float32)
    for track in tracks:
        points = [(int(x * width / 576), int(y * height / 320)) for x, y in track]
        if len(points) == 1:
            points.append((points[0][0] + 1, points[0][1] + 1))
        path = PchipInterpolator(np.linspace(0, 1, len(points)), np.array(points, np.float64))
        path = path(np.linspace(0, 1, frames))
        for i in range(frames - 1):
            x, y = path[i]
            out[i, int(y), int(x)] = path[i + 1] - path[i]  # a negative index is Python's
    return out


def spread(sparse, row):
    """Its Gaussian: every displacement about its pixel, zeros beyond the border."""
    steps, height, width, _ = sparse.shape
    radius = len(row) // 2
    out = np.zeros((steps, height + 2 * radius, width + 2 * radius, 2))
    for i, y, x in np.argwhere(sparse.any(-1)):
        window = out[i, y : y + len(row), x : x + len(row)]
        window += np.outer(row, row)[..., None] * sparse[i, y, x].astype(np.float64)
    return out[:, radius : radius + height, radius : radius + width].astype(np.float32)


def _drag(golden, rng):
    out = {}
    for i, tracks in enumerate((TRACKS, EDGE_TRACKS)):
        text = json.dumps(tracks)
        out[f"full{i}|tracks_json"] = text
        for size in ("full", "small"):
            given = golden.config[f"drag_{size}"]
            height, width, frames = given["height"], given["width"], given["model_length"]
            sparse = demo_map(tracks, frames, height, width)
            out[f"{size}{i}|nz_tyx"] = np.argwhere(sparse.any(-1))
            out[f"{size}{i}|nz_value"] = sparse[sparse.any(-1)]
            flow = spread(sparse, _kernel(given))
            if size == "small":
                out[f"small{i}|filtered"] = flow
                continue
            out[f"full{i}|filtered_off1_2_stride3"] = flow[:, 1::3, 2::3]
            out[f"full{i}|filtered_frame2_rows_stride5"] = flow[2, ::5]
            out[f"full{i}|filtered_sum"] = flow.sum((1, 2), np.float64)
            out[f"full{i}|filtered_absmax"] = np.abs(flow).max((1, 2))
    out["small_hwT_kernel_sigma"] = np.array([21, 30, 4, 9, 2])
    row = _kernel({"kernel_size": 33, "sigma": 5})
    out["kernel_33_5_sum"] = row.sum() ** 2
    out["kernel_33_5_centre_row"] = row
    out["kernel_33_5_centre_edge_corner"] = np.array([1.0, row[0], row[0] ** 2])
    out["pchip0|points"] = np.array([[0.0, 0.0], [3.0, 1.0], [4.0, 9.0]])
    out["pchip0|out"] = pchip(out["pchip0|points"], np.linspace(0, 1, 3), np.linspace(0, 1, 5))
    return out
