"""At full size the parameters are as many as in the released networks (names: tests/convert)."""

import math

import jax
import pytest
from flax.traverse_util import flatten_dict

from configs import dragnuwa_svd
from nuwa_jax.models.video_ldm import VideoLDM

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
