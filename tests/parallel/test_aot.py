"""Programs compiled by the TPU's own compiler, which needs libtpu and no TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import pod_svd
from nuwa_jax.errors import UserError
from nuwa_jax.parallel import advice
from nuwa_jax.parallel.topology import Topology

HERE = Path(__file__).parent
CONFIG = HERE.parent / "training" / "micro_config.py"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed: pip install 'nuwa_jax[tpu]'",
)
FOUR_CHIPS = ("--topology=v5e:2x2", "--config.mesh.fsdp=4", "--config.stages.drag.batch_size=8")


def run(*args, script=(str(HERE / "aot_run.py"), "as-it-is"), env=None):
    """In a process of its own: the compiler is told by the environment that there is no TPU."""
    return subprocess.run(
        [sys.executable, *script, *args],
        cwd=HERE.parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=1200,
    )


@needs_libtpu
def test_the_train_step_compiles_for_a_topology_and_the_report_says_what_it_needs(tmp_path):
    out = tmp_path / "report.json"
    done = run(f"--config={CONFIG}", *FOUR_CHIPS, f"--json={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(out.read_text())
    assert made["devices"] == 4
    assert made["mesh"] == {"data": 1, "fsdp": 4, "frame": 1, "tensor": 1}
    memory = made["memory"]
    assert memory["fits"]
    assert 0 < memory["arguments"] < memory["total"] < 2**30
    assert memory["aliased"] > 0.9 * memory["output"]  # the state is donated
    assert made["flops"]["model"] > 0
    assert made["flops"]["hardware_per_device"] >= made["flops"]["model_per_device"]
    kinds = made["collectives"]["by_kind"]
    assert kinds["all-gather"]["traffic"] > 0
    assert made["collectives"]["minimum"]["frozen_parameters_used"] > 0
    assert made["collectives"]["ratio"] > 0
    for told in ("it fits", "FSDP needs", "model arithmetic at the chip's peak", "all-gather"):
        assert told in done.stdout


@needs_libtpu
def test_what_does_not_fit_is_told_with_what_was_tried(tmp_path):
    out = tmp_path / "report.json"
    args = (f"--config={CONFIG}", "--topology=v5e:2x2", "--config.mesh.fsdp=2", "--suggest")
    args = (*args, "--config.stages.drag.batch_size=4", f"--json={out}")
    done = run(*args, script=(str(HERE / "aot_run.py"), "little-memory"))
    assert done.returncode == 1, done.stderr[-2000:]
    assert "it does NOT fit" in done.stdout
    assert "none of these fits" in done.stdout
    tried = json.loads(out.read_text())["tried"]
    assert [list(each["change"])[-1] for each in tried] == ["model.unet.remat", "mesh.fsdp"]
    assert tried[-1]["change"]["mesh.fsdp"] == 4
    assert not any(each["memory"]["fits"] for each in tried)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "sample"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:1x2x2"])
def test_the_real_model_compiles_for_every_chip(tmp_path, what, topology):
    out = tmp_path / "report.json"
    args = (f"--config={CONFIG}", f"--topology={topology}", *FOUR_CHIPS[1:], f"--what={what}")
    done = run(
        *args,
        f"--json={out}",
        script=("-m", "nuwa_jax.parallel.aot"),
        env={"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(out.read_text())["memory"]["fits"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--topology=v5e:2x2",), "give --config=FILE"),
        ((f"--config={CONFIG}", "--topology=v5e"), "CHIP:SHAPE"),
        ((f"--config={CONFIG}", "--topology=h100:8"), "only for TPUs"),
    ],
)
def test_a_mistake_ends_with_one_line(args, told):
    done = run(*args)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_the_error_says_how_to_get_it():
    with pytest.raises(UserError, match=r"nuwa_jax\[tpu\]"):
        Topology.parse("v5e:2x2").devices()


def test_topologies_are_read_by_name():
    topology = Topology.parse("v5p:4x4x4", slices=2)
    assert (topology.name, topology.chips) == ("v5p:4x4x4 x 2 slices", 128)
    assert Topology.parse("v5:2x2x1").chip.name == "v5p"
    with pytest.raises(UserError, match="v4, v5e, v5p, v6e"):
        Topology.parse("v9:2x2")


def test_changes_that_need_less_memory_come_in_the_order_of_their_cost():
    config = pod_svd.get_config()
    config.model.unet.remat = False
    config.stages.drag.batch_size = 512
    topology = Topology.parse("v5e:16x16")
    found = [given for given, _ in advice.changes(config, topology, "train", "drag")]
    assert found[0] == {"model.unet.remat": True}
    # 256 devices would leave too much whole; 512 clips are two micro-batches of one each.
    assert found[1] == found[0] | {"mesh.fsdp": 128}
    assert found[2] == found[1] | {"train.accumulate": 2}
    assert len(found) == 3
    _, changed = list(advice.changes(config, topology, "train", "drag"))[-1]
    assert (changed.mesh.fsdp, changed.train.accumulate, changed.model.unet.remat) == (128, 2, True)
    assert config.mesh.fsdp == 64
