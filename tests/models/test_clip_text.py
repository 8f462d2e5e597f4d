"""CLIP's text tower against torch, its names in checkpoints, and its place in the video model."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cut_clip_text_golden import open_clip_tower, transformers_tower
from flax.traverse_util import flatten_dict
from golden_checks import check, compiled
from micro_model import SIZE, drops, inputs, make, randomize
from ml_collections import ConfigDict

from configs import tiny
from nuwa_jax.convert.clip_text import clip_text_rows, infer_clip_text, text_prefix
from nuwa_jax.convert.rules import to_params, to_state
from nuwa_jax.data.tokenizer import CLIP_VOCAB_SIZE
from nuwa_jax.errors import UserError
from nuwa_jax.generation.generator import Generator
from nuwa_jax.generation.weights import Model
from nuwa_jax.models.clip import ClipVisionConfig
from nuwa_jax.models.clip_text import ClipText, ClipTextConfig
from nuwa_jax.models.text import TextEncoderConfig
from nuwa_jax.models.video_ldm import VideoLDM

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "clip_text.npz"
TOLD = {"sgm": {}, "hf": dict(activation="quick_gelu", padding="end")}  # what shapes do not tell
BOUND = 1e-6
SMALL = ClipTextConfig(
    width=16, layers=2, heads=2, max_length=8, vocabulary=96, projection=8, mlp_ratio=2
)


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def part(arrays, name):
    found = arrays.items()
    return {key.removeprefix(f"{name}|"): a for key, a in found if key.startswith(f"{name}|")}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    return {family: part(arrays, family) for family in TOLD}


def shapes_of(state):
    return {name: a.shape for name, a in state.items()}


def load(config, state, rows, family):
    """Our parameters of theirs."""
    template = jax.eval_shape(ClipText(config).init, jax.random.key(0), jnp.zeros((1, 1), int))
    return to_params(state, rows, template["params"], family)


def check_tower(arrays, family, **told):
    """Both kinds of features and the pooled embedding, with sizes read off the shapes."""
    state, text = part(arrays, "weights"), arrays["text"]
    heads = int(arrays["heads"])
    config = infer_clip_text(shapes_of(state), family, heads=heads, **told)
    params = load(config, state, clip_text_rows(config), family)
    for layer in ("last", "penultimate"):
        module = ClipText(dataclasses.replace(config, layer=layer))
        ours = compiled(module.apply)({"params": params}, text)
        check(ours.tokens, arrays[layer], BOUND, f"{family}, {layer} layer")
        check(ours.pooled, arrays["pooled"], BOUND, f"{family}, pooled")


@pytest.mark.parametrize("family", TOLD)
def test_tower(golden, family):
    check_tower(golden[family], family, **TOLD[family])


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_tower_of_open_clip(quick_gelu):
    pytest.importorskip("open_clip")
    arrays = open_clip_tower(seed=2, width=64, heads=4, layers=4, quick_gelu=quick_gelu)
    check_tower(arrays, "sgm", activation="quick_gelu" if quick_gelu else "gelu")


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_tower_of_transformers(act):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    arrays = transformers_tower(seed=3, width=64, heads=4, layers=4, mlp_ratio=4, act=act)
    check_tower(arrays, "hf", activation=act, padding="end")


@pytest.mark.parametrize("family", TOLD)
def test_names_read_backwards(golden, family):
    """The table gives back every array of the tower, bit for bit, also under another prefix."""
    state = part(golden[family], "weights")
    state.pop("logit_scale", None)
    config = infer_clip_text(shapes_of(state), family, heads=2)
    back = {}
    for prefix in ("", "conditioner.embedders.0.open_clip.model."):
        named = {prefix + name: value for name, value in state.items()}
        assert infer_clip_text(shapes_of(named), family, heads=2) == config
        rows = clip_text_rows(config, **{family: text_prefix(named, family)})
        params = load(config, named, rows, family)
        back = to_state(params, rows, family)
        assert back.keys() == named.keys()
        for name, value in back.items():
            np.testing.assert_array_equal(value, named[name], err_msg=name)


def test_a_tower_without_projection_pools_the_features_themselves(golden):
    """As in the text_encoder folder of Stable Diffusion; transformers 5 drops "text_model.", too"""
    arrays = golden["hf"]
    state = part(arrays, "weights")
    bare = {
        name.removeprefix("text_model."): a
        for name, a in state.items()
        if name != "text_projection.weight"
    }
    config = infer_clip_text(shapes_of(bare), "hf", heads=2, **TOLD["hf"])
    assert config.projection == 0
    text = arrays["text"]
    params = load(config, bare, clip_text_rows(config, hf=""), "hf")
    ours = compiled(ClipText(config).apply)({"params": params}, text)
    ends = (text == text.max()).argmax(-1)
    check(ours.pooled, arrays["last"][np.arange(3), ends], BOUND)


@pytest.mark.parametrize(
    ("config", "family", "count"),
    [
        # open_clip's ViT-H-14 has 986,109,441: image tower 632,076,800, logit_scale 1, and these.
        (ClipTextConfig(), "sgm", 354_032_640),
        # transformers' CLIPTextModel of these sizes, the text encoder of Stable Diffusion 1.
        (
            ClipTextConfig(768, 12, 12, projection=0, activation="quick_gelu", padding="end"),
            "hf",
            123_060_480,
        ),
    ],
)
def test_released_sizes(config, family, count):
    """Parameters are as many as in the released towers, and shapes tell the sizes back."""
    tokens = jnp.zeros((1, 77), jnp.int32)
    params = jax.eval_shape(ClipText(config).init, jax.random.key(0), tokens)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    rows = clip_text_rows(config)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), params)
    shapes = shapes_of(to_state(zeros, rows, family))
    told = dict(activation=config.activation, padding=config.padding)
    assert infer_clip_text(shapes, family, **told) == config


def test_leftovers_of_a_text_tower_are_told_from_a_whole_one(golden):
    """SVD's checkpoints have the embeddings of a text tower without its blocks."""
    shapes = shapes_of(part(golden["sgm"], "weights"))
    left = {name: s for name, s in shapes.items() if "resblocks" not in name}
    with pytest.raises(UserError, match=r"no transformer\.resblocks\.0\.mlp\.c_fc\.weight"):
        infer_clip_text(left, "sgm")
    with pytest.raises(UserError, match="found none"):
        infer_clip_text(shapes, "hf")
    two = {f"{tower}.{name}": s for name, s in shapes.items() for tower in ("first", "second")}
    with pytest.raises(UserError, match=r"'first\.', 'second\.'.*prefix"):
        infer_clip_text(two, "sgm")
    assert infer_clip_text(two, "sgm", prefix="first.") == infer_clip_text(shapes, "sgm")


def text_of(words, length=8, config=SMALL):
    tokens = [config.start_token, *words, config.end_token]
    return np.array(tokens + [0] * (length - len(tokens)))


@pytest.mark.parametrize("padding", ["zero", "end"])
def test_tokens_see_what_is_before_them_and_padding_is_the_configs(padding):
    module = ClipText(dataclasses.replace(SMALL, padding=padding))
    text = np.stack([text_of([3, 4, 5]), text_of([3, 7, 5]), text_of([3, 4, 5])])
    text[2, 5:] = 9
    params = jax.eval_shape(module.init, jax.random.key(0), text)["params"]
    out = jax.jit(module.apply)({"params": randomize(params, 0)}, text)
    np.testing.assert_array_equal(out.tokens[0, :2], out.tokens[1, :2])
    changed = np.abs(out.tokens[0, 2:] - out.tokens[1, 2:]).max(-1)
    assert changed.min() > 1e-3 and np.abs(out.pooled[0] - out.pooled[1]).max() > 1e-3
    np.testing.assert_array_equal(out.tokens[2], out.tokens[0])
    np.testing.assert_array_equal(out.pooled[2], out.pooled[0])


def test_paddings_differ():
    text = text_of([3])[None]
    params = jax.eval_shape(ClipText(SMALL).init, jax.random.key(0), text)["params"]
    params = randomize(params, 0)
    zero, end = (
        ClipText(dataclasses.replace(SMALL, padding=p)).apply({"params": params}, text)
        for p in ("zero", "end")
    )
    np.testing.assert_array_equal(zero.tokens[0, :3], end.tokens[0, :3])
    assert np.abs(zero.tokens[0, 3:] - end.tokens[0, 3:]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=3), "3 heads"),
        (dict(activation="tanh"), "activation must be one of"),
        (dict(layer="first"), "layer must be one of"),
        (dict(padding="left"), "padding must be one of"),
        (dict(layers=1, layer="penultimate"), "no such layer"),
    ],
)
def test_what_makes_no_sense_is_told(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **changes)
    with pytest.raises(UserError, match="text of 9 tokens"):
        jax.eval_shape(ClipText(SMALL).init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))


# In the video model.


def clip_config(**changes):
    config = tiny.get_config()
    config.model.text = ConfigDict(dict(kind="clip") | dataclasses.asdict(SMALL) | changes)
    return config


def test_kind_says_which_text_encoder_it_is():
    assert VideoLDM.from_config(clip_config().model).text == SMALL
    config = tiny.get_config()
    assert "kind" not in config.model.text
    without = VideoLDM.from_config(config.model)
    assert isinstance(without.text, TextEncoderConfig)
    config.model.text.kind = "bytes"
    assert VideoLDM.from_config(config.model) == without
    with pytest.raises(UserError, match="kind must be one of.*'words'"):
        VideoLDM.from_config(clip_config(kind="words").model)
    with pytest.raises(UserError, match="has no.*stride"):
        VideoLDM.from_config(clip_config(stride=4).model)


@pytest.mark.parametrize("with_image_token", [False, True])
def test_a_dropped_caption_is_an_empty_one(with_image_token):
    model = dataclasses.replace(make(text={}), text=SMALL)
    if with_image_token:
        vision = ClipVisionConfig(16, 1, heads=2, image_size=28, projection=SMALL.width)
        model = dataclasses.replace(model, image_encoder=vision)
    shapes = jax.eval_shape(lambda key: model.init(key, **SIZE), jax.random.key(0))
    assert "tokens/embedding" in flatten_dict(shapes["text"], sep="/")
    params = randomize(shapes, 1)
    given = inputs(b=3)
    text = np.stack([text_of([3, 4]), text_of([3, 4]), text_of([])])

    @jax.jit
    def context(text, drop):
        size = (SIZE["height"], SIZE["width"])
        condition = model.condition(
            params, frames=SIZE["frames"], size=size, image=given["image"], text=text, drop=drop
        )
        assert condition.context_mask is None
        return condition.context

    out = context(text, drops([False, True, False], [False] * 3, [False] * 3))
    assert out.shape == (3, 8 + with_image_token, SMALL.width)
    np.testing.assert_array_equal(out[1, :8], out[2, :8])
    assert np.abs(out[0, :8] - out[1, :8]).max() > 1e-3
    # The same without any text at all.
    none = context(None, drops([False] * 3, [False] * 3, [False] * 3))
    np.testing.assert_array_equal(none[:, :8], out[[2, 2, 2], :8])


def test_captions_reach_the_denoiser():
    model = dataclasses.replace(make(text={}), text=SMALL)
    params = randomize(
        jax.eval_shape(lambda key: model.init(key, **SIZE), jax.random.key(0)), seed=2
    )
    given = inputs()

    @jax.jit
    def denoise(text):
        size = (SIZE["height"], SIZE["width"])
        condition = model.condition(
            params, frames=SIZE["frames"], size=size, image=given["image"], text=text
        )
        return model.denoise(params, given["x"], given["sigma"], condition)

    one, other = (denoise(np.stack([text_of([3, word])] * 2)) for word in (4, 5))
    assert np.abs(one - other).max() > 1e-3


def test_sampling_asks_for_the_vocabulary():
    with pytest.raises(UserError, match=r"data\.tokenizer to a folder with vocab\.json"):
        Generator(Model({}, clip_config(), "here"))


def test_data_and_model_agree_on_the_vocabulary():
    assert ClipTextConfig().vocabulary == CLIP_VOCAB_SIZE
