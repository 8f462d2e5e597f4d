"""At full size the parameters are those of the released networks, in number, name and shape."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import dragnuwa_svd
from nuwa_jax.convert.rules import (
    DECODER,
    ENCODER,
    UNET,
    autoencoder_rows,
    clip_rows,
    flow_rows,
    fold_lora,
    to_params,
    to_state,
    unet_rows,
)
from nuwa_jax.models.video_ldm import VideoLDM

NAMES = pathlib.Path(__file__).parents[3] / "shared" / "golden" / "dragnuwa15_state_dict.json"
# Counted in the released implementation: SVD's U-Net, the flow encoder, gamma/beta with their norm,
# CLIP's image tower, the temporal decoder, the encoder with quant_conv.
COUNTS = {
    "unet": 1_524_623_082,
    "flow_encoder": 69_194_720,
    "flow_injection": 45_497_280,
    "image_encoder": 632_076_800,
    "decoder": 63_579_183,
    "encoder": 34_163_664,
}


@pytest.fixture(scope="module")
def model():
    return VideoLDM.from_config(dragnuwa_svd.get_config().model)


@pytest.fixture(scope="module")
def shapes(model):
    size = dict(height=320, width=576, frames=14)
    return jax.eval_shape(lambda key: model.init(key, **size), jax.random.key(0))


def part(path):
    if "flow_norm" in path or path.startswith("flow_encoder/heads"):
        return "flow_injection"
    return path.split("/")[1 if path.startswith("autoencoder") else 0]


def test_counts(shapes):
    counts = dict.fromkeys(COUNTS, 0)
    for path, leaf in flatten_dict(shapes, sep="/").items():
        if not path.startswith("latents"):
            counts[part(path)] += math.prod(leaf.shape)
    assert counts == COUNTS


@pytest.mark.skipif(not NAMES.is_file(), reason=f"the released list of arrays is not at {NAMES}")
def test_names_and_shapes(model, shapes):
    """Each array of the released U-Net, decoder, used encoder and CLIP has its one parameter."""
    listed = json.loads(NAMES.read_text())
    # Views of one zero: the shapes of 2.5 billion parameters in no memory.
    state = {name: np.broadcast_to(np.float32(0), shape) for name, (shape, _) in listed.items()}
    lora = [name for name in state if ".lora_" in name]
    assert len(lora) == 928
    state = {
        name.replace(".linear.", "."): value for name, value in state.items() if name not in lora
    }
    flow = model.flow_encoder
    parts = {
        "unet": unet_rows(model.unet),
        "flow_encoder": flow_rows(flow, model.unet, model.autoencoder.reduction),
        "autoencoder": autoencoder_rows(model.autoencoder),
        "image_encoder": clip_rows(model.image_encoder),
    }
    found = set()
    for name, rows in parts.items():
        params = to_params(state, rows, shapes[name])
        back = to_state(params, rows)
        assert all(value.shape == state[theirs].shape for theirs, value in back.items())
        assert not found & back.keys()
        found |= back.keys()
    visual = "conditioner.embedders.0.open_clip.model.visual."
    used = (f"{UNET}.", f"{DECODER}.", f"{ENCODER}.encoder.", f"{ENCODER}.quant_conv.", visual)
    assert found == {name for name in state if name.startswith(used)}


def test_lora_is_folded():
    rng = np.random.default_rng(0)
    weight, down, up = (rng.normal(size=s).astype(np.float32) for s in ((6, 5), (2, 5), (6, 2)))
    state = {
        "a.b.linear.weight": weight,
        "a.b.linear.bias": weight[:, 0],
        "a.b.lora_down.weight": down,
        "a.b.lora_up.weight": up,
        "a.norm.weight": down[0],
    }
    folded = fold_lora(state, scale=0.5)
    assert folded.keys() == {"a.b.weight", "a.b.bias", "a.norm.weight"}
    x = rng.normal(size=(3, 5))
    theirs = x @ weight.T + 0.5 * x @ down.T @ up.T
    np.testing.assert_allclose(x @ folded["a.b.weight"].T, theirs, atol=1e-5)
