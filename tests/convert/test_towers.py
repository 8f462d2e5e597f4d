"""One of CLIP's towers out of files that hold both, or one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from nuwa_jax.convert.clip_text import clip_text_rows
from nuwa_jax.convert.rules import clip_rows, to_state
from nuwa_jax.convert.towers import convert_tower
from nuwa_jax.errors import UserError
from nuwa_jax.generation.generator import Generator
from nuwa_jax.generation.weights import load_model
from nuwa_jax.models.clip import ClipVision, ClipVisionConfig
from nuwa_jax.models.clip_text import ClipText, ClipTextConfig
from nuwa_jax.tensor_files import Spec, write_safetensors

TEXT = ClipTextConfig(
    width=128,
    layers=2,
    heads=2,
    max_length=9,
    vocabulary=40,
    projection=24,
    activation="quick_gelu",
)
VISION = ClipVisionConfig(width=32, layers=3, heads=4, patch=8, image_size=24, projection=24)


def random_params(module, example):
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    rng = np.random.default_rng(0)
    flat = {
        k: rng.normal(size=v.shape).astype(np.float32)
        for k, v in flatten_dict(shapes, sep="/").items()
    }
    return unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def towers():
    return {
        "text": random_params(ClipText(TEXT), jnp.zeros((1, 9), jnp.int32)),
        "image_encoder": random_params(ClipVision(VISION), jnp.zeros((1, 24, 24, 3))),
    }


def write(path, state):
    specs = {name: Spec(array.shape, array.dtype) for name, array in state.items()}
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, specs, state.items())
    return path


@pytest.fixture
def openclip(towers, tmp_path):
    """Both towers and the temperature, as OpenCLIP saves them."""
    state = {"logit_scale": np.ones((), np.float32)}
    state |= to_state(towers["image_encoder"], clip_rows(VISION, prefix="visual"))
    state |= to_state(towers["text"], clip_text_rows(TEXT))
    return write(tmp_path / "open_clip_model.safetensors", state)


@pytest.fixture
def folders(towers, tmp_path):
    """A folder for each tower, as transformers saves them."""
    vision = to_state(towers["image_encoder"], clip_rows(VISION), "hf")
    vision["vision_model.embeddings.position_ids"] = np.arange(10, dtype=np.int64)
    text = to_state(towers["text"], clip_text_rows(TEXT), "hf")
    for name, state in (("image_encoder", vision), ("text", text)):
        write(tmp_path / name / "model.safetensors", state)
    return tmp_path


def check(towers, out, tower):
    loaded = load_model(out)
    assert loaded.params.keys() == {tower}
    found, expected = (flatten_dict(p, sep="/") for p in (loaded.params[tower], towers[tower]))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    return json.loads((out / "config.json").read_text())["model"][tower]


def test_openclip(towers, openclip, tmp_path):
    report = convert_tower(openclip, tmp_path / "t", "text", activation="quick_gelu")
    section = check(towers, tmp_path / "t", "text")
    assert section.pop("kind") == "clip" and ClipTextConfig(**section) == TEXT
    assert report.family == "sgm" and sum(report.ignored.values()) > 10
    convert_tower(openclip, tmp_path / "i", "image_encoder", heads=4)
    assert ClipVisionConfig(**check(towers, tmp_path / "i", "image_encoder")) == VISION


def test_transformers(towers, folders, tmp_path):
    for tower, options in (("text", {"activation": "quick_gelu"}), ("image_encoder", {"heads": 4})):
        report = convert_tower(folders / tower, tmp_path / "out", tower, **options)
        assert report.family == "hf"
        check(towers, tmp_path / "out", tower)


def test_what_is_left_of_a_tower_is_named(towers, tmp_path):
    state = to_state(towers["text"], clip_text_rows(TEXT))
    state["transformer.resblocks.1.attn.extra"] = np.ones(3, np.float32)
    file = write(tmp_path / "f.safetensors", state)
    with pytest.raises(UserError, match="1 are left over: transformer.resblocks.1.attn.extra"):
        convert_tower(file, tmp_path / "out", "text")


def test_a_tower_alone_makes_no_video(openclip, tmp_path):
    convert_tower(openclip, tmp_path / "t", "text")
    with pytest.raises(UserError, match="holds text alone"):
        Generator.load(tmp_path / "t")


def test_a_tower_that_is_not_there(folders, tmp_path):
    with pytest.raises(UserError, match="no .*visual|has no"):
        convert_tower(folders / "text", tmp_path / "out", "image_encoder")
    with pytest.raises(UserError, match="one text encoder"):
        convert_tower(folders / "image_encoder", tmp_path / "out", "text")
    with pytest.raises(UserError, match="model.safetensors"):
        convert_tower(tmp_path, tmp_path / "out", "text")
