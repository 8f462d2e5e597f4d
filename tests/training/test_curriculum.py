import jax
import numpy as np
import pytest
from flax import traverse_util
from micro_config import get_config

from nuwa_jax.errors import UserError
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.training.curriculum import (
    merge,
    overlay,
    partition,
    partition_for,
    stages_from_config,
)

PARAMS = {"a": {"w": np.zeros(2), "b": np.ones(3)}, "c": {"w": np.full(1, 2.0)}}


def test_rules_split_params_and_merge_puts_them_together_again():
    trainable, frozen = partition(PARAMS, ((r"^a/", "train"), (r"^c/", "freeze")))
    assert trainable == {"a": PARAMS["a"]}
    assert frozen == {"c": PARAMS["c"]}
    assert merge(trainable, frozen) == PARAMS


def test_given_params_take_their_places():
    given = {"c": {"w": np.full(1, 7.0)}}
    assert overlay(PARAMS, given) == {"a": PARAMS["a"], "c": given["c"]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"c": {"v": np.zeros(1)}}, r"c/v \(1,\), the config's model has no such parameter"),
        ({"c": {"w": np.zeros(4)}}, r"c/w \(4,\), the config's model has \(1,\)"),
    ],
)
def test_given_params_without_a_place_are_named(given, told):
    with pytest.raises(UserError, match=told):
        overlay(PARAMS, given)


def test_one_module_may_be_trained_in_part():
    trainable, frozen = partition(PARAMS, ((r"/w$", "train"), (r"/b$", "freeze")))
    assert trainable == {"a": {"w": PARAMS["a"]["w"]}, "c": PARAMS["c"]}
    assert merge(trainable, frozen) == PARAMS


def test_a_param_without_a_rule_is_named():
    with pytest.raises(UserError, match=r"c/w is matched by no rule.*\^a/"):
        partition(PARAMS, ((r"^a/", "train"),))


def test_a_param_with_two_rules_is_named_with_them():
    with pytest.raises(UserError, match=r"a/w is matched by several rules.*\^a/.*/w\$"):
        partition(PARAMS, ((r"^a/", "train"), (r"/w$", "freeze"), (r"^c/b", "freeze")))


def test_every_stage_of_the_default_curriculum_covers_the_model():
    config = get_config()
    model = VideoLDM.from_config(config.model)
    params = jax.eval_shape(
        lambda key: model.init(key, height=16, width=24, frames=3), jax.random.key(0)
    )
    trained = {
        stage.name: traverse_util.flatten_dict(partition_for(stage, params)[0], sep="/")
        for stage in stages_from_config(config)
    }
    parts = {name: {path.split("/")[0] for path in paths} for name, paths in trained.items()}
    assert parts == {
        "autoencoder": {"autoencoder"},
        "text_to_video": {"text", "unet"},
        "flow": {"flow_encoder", "unet"},
        "drag": {"text", "unet", "flow_encoder", "drag"},
    }
    assert all("flow_" in path for path in trained["flow"])
    assert not any("flow_" in path or "drag_" in path for path in trained["text_to_video"])


def test_measured_latent_statistics_cannot_be_trained():
    config = get_config()
    config.stages.drag.rules = ((r".", "train"),)
    stage = stages_from_config(config)[-1]
    with pytest.raises(UserError, match="latents/ holds measured statistics"):
        partition_for(stage, {"latents": {"mean": 0}, "unet": {"w": 0}})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("condition", "dense", r"stages.drag.condition must be one of .*got 'dense'"),
        ("objective", "guess", r"stages.drag.objective must be one of"),
        ("steps", 0, r"stages.drag.steps must be at least 1, got 0"),
        ("dense_to_sparse", (1.0, 2.0), r"stages.drag.dense_to_sparse must be two prob"),
        ("rules", (("x", "thaw"),), r"stages.drag.rules must be pairs"),
        ("colour", 1, r"stages.drag .*unknown \['colour'\]"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(key, value, message):
    config = get_config()
    config.stages.drag[key] = value
    with pytest.raises(UserError, match=message):
        stages_from_config(config)


def test_an_unknown_stage_is_named_with_those_there_are():
    config = get_config()
    config.curriculum = ("autoencoder", "drug")
    with pytest.raises(UserError, match=r"curriculum names \['drug'\].*text_to_video"):
        stages_from_config(config)
