import difflib
import functools
import json

import golden_shardings
import jax
import pytest
from golden_shardings import CONFIGS, MESHES

from nuwa_jax.parallel.programs import abstract_params
from nuwa_jax.presets import load_preset
from nuwa_jax.training.curriculum import partition_for, stages_from_config


@functools.cache
def params(config):
    return abstract_params(load_preset(config))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_lies_where_it_did(config, mesh):
    kept = json.loads(golden_shardings.golden_file(config, mesh).read_text())
    assert kept["mesh"] == MESHES[mesh]
    found = golden_shardings.lines(params(config), MESHES[mesh])
    differing = [
        line for line in difflib.ndiff(kept["parameters"], found) if line.startswith(("-", "+"))
    ]
    assert not differing, (
        "parameters lie elsewhere than tests/parallel/golden says (-, now +); if that is meant, "
        "run python tests/parallel/golden_shardings.py and look at the difference:\n"
        + "\n".join(differing[:40])
    )


@pytest.mark.parametrize("config", [*CONFIGS, "pod_nuwa_128"])
def test_every_parameter_of_a_model_for_pods_is_matched_by_one_rule_of_each_stage(config):
    every = params(config)
    for stage in stages_from_config(load_preset(config)):
        trainable, frozen = partition_for(stage, every)
        assert len(jax.tree.leaves((trainable, frozen))) == len(jax.tree.leaves(every))


def test_a_changed_rule_is_noticed(monkeypatch):
    from nuwa_jax.parallel import sharding

    monkeypatch.setattr(sharding, "TENSOR_RULES", sharding.TENSOR_RULES[1:])
    kept = json.loads(golden_shardings.golden_file("pod_svd", "tensor").read_text())
    assert golden_shardings.lines(params("pod_svd"), MESHES["tensor"]) != kept["parameters"]
