"""Blocks against arrays made by the original DragNUWA 1.5 code; `cut_golden.py` cut them out."""

import pathlib

import jax
import numpy as np
import pytest
from einops import rearrange
from golden_checks import check, check_items, compiled

from nuwa_jax.convert.lora import fold_lora
from nuwa_jax.convert.rules import decoder_res_rows
from nuwa_jax.golden.blocks import check_res_block, check_video_transformer, flow_features, load
from nuwa_jax.golden.folder import Arrays
from nuwa_jax.models.autoencoder import VideoResBlock
from nuwa_jax.models.clip import resize_matrix
from nuwa_jax.models.flow_encoder import FlowEncoderConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dragnuwa_blocks.npz"
FRAMES = 5


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return Arrays(GOLDEN.stem, dict(file))


@pytest.fixture(scope="module")
def state(golden):
    return fold_lora(golden.at("weights"))


def test_res_block_with_flow(golden, state):
    check_items(check_res_block(golden.at("res"), state, FRAMES))


def test_transformer(golden, state):
    kinds = ["3tok"]
    arrays = golden.at("transformer")
    check_items(check_video_transformer(arrays, state, FRAMES, head_channels=16, kinds=kinds))


def test_flow_encoder(golden, state):
    """Every so many of the features, as sampled in a run of the whole U-Net."""
    golden = golden.at("flow")
    flow = rearrange(golden["flow"].astype(np.float32), "t c h w -> 1 t h w c")
    features = flow_features(state, flow, 32, (1, 1, 2, 2), 8, FlowEncoderConfig())
    for level, ours in enumerate(features):
        ours = np.asarray(rearrange(ours, "1 t h w c -> t c h w"))
        assert ours.shape == tuple(golden[f"f{level}_shape"])
        sample = ours.reshape(-1)[:: golden[f"f{level}_stride"]][:256]
        check(sample, golden[f"f{level}_sample"], 3e-6, f"f{level}")


@pytest.mark.parametrize(("b", "t"), [(1, 3), (2, 1)])
def test_decoder_block_is_the_published_formula(state, b, t):
    """z = y + time half of y; out = a z + (1 - a) y: the blend weighs the temporal branch."""
    theirs = "first_stage_model.decoder.mid.block_1"
    module = VideoResBlock(32)
    x = np.random.default_rng(0).normal(size=(b, t, 6, 5, 32)).astype(np.float32)
    params = load(module, state, decoder_res_rows("", theirs), x)
    ours = compiled(module.apply)({"params": params}, x)

    w = {name.removeprefix(f"{theirs}."): a.astype(np.float64) for name, a in state.items()}

    def norm(x, name, eps, axes):
        grouped = rearrange(x.astype(np.float64), "b t h w (g c) -> b t h w g c", g=32)
        mean = grouped.mean((*axes, 5), keepdims=True)
        variance = grouped.var((*axes, 5), keepdims=True)
        x = rearrange((grouped - mean) / np.sqrt(variance + eps), "b t h w g c -> b t h w (g c)")
        x = x * w[f"{name}.weight"] + w[f"{name}.bias"]
        return x / (1 + np.exp(-x))  # swish follows every norm

    def conv(x, name):
        kernel = w[f"{name}.weight"]
        if kernel.ndim == 5:  # three taps in time, zeros around
            x = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
            taps = sum(x[:, i : i + t] @ kernel[:, :, i, 0, 0].T for i in range(3))
        else:
            h, width = x.shape[2:4]
            x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
            taps = sum(
                x[:, :, i : i + h, j : j + width] @ kernel[:, :, i, j].T
                for i in range(3)
                for j in range(3)
            )
        return taps + w[f"{name}.bias"]

    space, time = (2, 3), (1, 2, 3)
    y = conv(norm(x, "norm1", 1e-6, space), "conv1")
    y = x + conv(norm(y, "norm2", 1e-6, space), "conv2")
    z = conv(norm(y, "time_stack.in_layers.0", 1e-5, time), "time_stack.in_layers.2")
    z = y + conv(norm(z, "time_stack.out_layers.0", 1e-5, time), "time_stack.out_layers.3")
    a = 1 / (1 + np.exp(-w["mix_factor"]))
    assert abs(a - 0.5) > 0.05  # or the order of the blend would not be tested
    check(ours, a * z + (1 - a) * y, 1e-6)


def test_resize_keeps_what_it_should():
    """Rows sum to one, the corners stay, the same size is the identity, a ramp stays a ramp."""
    for old, new in ((320, 224), (128, 224), (20, 56), (224, 224)):
        matrix = resize_matrix(old, new, blur=old > new)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        unblurred = resize_matrix(old, new, blur=False)
        np.testing.assert_allclose(unblurred[[0, -1], [0, -1]], 1, atol=1e-4)
        ramp = unblurred @ np.arange(old)
        inner = slice(new // 8, -new // 8)
        np.testing.assert_allclose(ramp[inner], np.linspace(0, old - 1, new)[inner], atol=0.2)
    np.testing.assert_allclose(resize_matrix(7, 7, blur=False), np.eye(7), atol=1e-6)
