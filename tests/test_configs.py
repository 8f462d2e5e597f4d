"""Every config file: it builds, its rules cover its parameters, and its model takes a step."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs import (
    demo,
    dragnuwa_paper,
    dragnuwa_svd,
    nuwa,
    pod_nuwa,
    pod_nuwa_128,
    pod_svd,
    tiny,
)
from nuwa_jax.data.config import DataConfig
from nuwa_jax.errors import UserError
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.parallel.mesh import MeshConfig, batch_arithmetic
from nuwa_jax.training.curriculum import partition_for, stages_from_config
from nuwa_jax.training.loop import train

PRESETS = {"nuwa": nuwa, "dragnuwa_paper": dragnuwa_paper, "dragnuwa_svd": dragnuwa_svd}
SMALL = {"tiny": tiny, "demo": demo}
# Models for pods are built in tests/parallel/test_golden_shardings.py.
PODS = {"pod_svd": pod_svd, "pod_nuwa": pod_nuwa, "pod_nuwa_128": pod_nuwa_128}


def abstract_params(config: ConfigDict) -> Any:
    model = VideoLDM.from_config(config.model)
    size = dict(height=config.data.height, width=config.data.width, frames=config.data.frames)
    return jax.eval_shape(lambda key: model.init(key, **size), jax.random.key(0))


@pytest.mark.parametrize("name", [*PRESETS, *SMALL])
def test_every_config_builds_and_its_rules_cover_every_parameter(name):
    config = (PRESETS | SMALL)[name].get_config()
    params = abstract_params(config)
    for stage in stages_from_config(config):
        trainable, frozen = partition_for(stage, params)
        count = len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen))
        assert count == len(jax.tree.leaves(params))
    # Prepared clips are the user's: without them only the sources of clips are missing.
    config.data.update(clips_weight=0.0, scenes_weight=1.0)
    DataConfig.from_config(config.data)
    json.loads(config.to_json())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_step(name, tmp_path):
    config = PRESETS[name].get_config("small")
    config.curriculum = ("drag",)
    config.stages.drag.steps = 1
    result = train(config, tmp_path)
    assert (result.stage, result.step) == ("drag", 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["loss"] < 100


def test_the_flow_stage_freezes_the_base_and_the_paper_preset_does_not():
    def trainable_parts(config: ConfigDict) -> set[str]:
        stage = {stage.name: stage for stage in stages_from_config(config)}["flow"]
        return set(partition_for(stage, abstract_params(config))[0])

    assert "text" not in trainable_parts(tiny.get_config())
    assert {"text", "unet"} <= trainable_parts(dragnuwa_paper.get_config("small"))


@pytest.mark.parametrize(
    ("name", "preset"),
    [("pod_svd", dragnuwa_svd), ("pod_nuwa", nuwa), ("pod_nuwa_128", nuwa)],
)
def test_the_small_variant_of_a_config_for_pods_is_that_of_its_preset(name, preset):
    ours, theirs = PODS[name].get_config("small"), preset.get_config("small")
    assert ours.model.to_dict() == theirs.model.to_dict()
    assert ours.mesh.to_dict() == theirs.mesh.to_dict()
    assert ours.data.format == "video"
    DataConfig.from_config(ours.data)


@pytest.mark.parametrize("name", PODS)
def test_a_config_for_pods_trains_on_latents_and_divides_over_256_chips(name):
    config = PODS[name].get_config()
    config.data.clips = "somewhere"
    assert DataConfig.from_config(config.data).format == "latents"
    sizes = MeshConfig.from_config(config.mesh).sizes(256)
    for stage in stages_from_config(config):
        assert stage.objective == "denoise"
        assert "x 1 clips" in batch_arithmetic(stage.batch_size, config.train.accumulate, sizes)


@pytest.mark.parametrize("name", [*PRESETS, *SMALL, *PODS])
def test_an_unknown_variant_is_told(name):
    with pytest.raises(UserError, match="variant 'huge'"):
        (PRESETS | SMALL | PODS)[name].get_config("huge")


def test_real_clips_are_asked_for_where_a_preset_needs_them():
    with pytest.raises(UserError, match=r"data\.clips"):
        DataConfig.from_config(nuwa.get_config().data)


def test_an_unknown_model_key_is_told():
    config = tiny.get_config()
    config.model.unet.model_chanels = 64
    with pytest.raises(ValueError, match="model_chanels"):
        VideoLDM.from_config(config.model)
