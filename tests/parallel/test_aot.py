"""Programs compiled by the TPU's own compiler, which needs libtpu and no TPU."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.parallel import advice
from nuwa_jax.parallel.topology import CHIPS, Topology

HERE = Path(__file__).parent
CONFIG = HERE.parent / "training" / "micro_config.py"
get_config = runpy.run_path(str(CONFIG))["get_config"]
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
    assert tried[-1]["change"] == {"model.unet.remat": "offload", "mesh.fsdp": 4}
    assert not any(each["memory"]["fits"] for each in tried)


@needs_libtpu
def test_the_sampler_compiles_for_another_chip(tmp_path):
    out = tmp_path / "report.json"
    args = (f"--config={CONFIG}", "--topology=v6e:2x2", "--config.mesh.fsdp=4", "--what=sample")
    done = run(*args, f"--json={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(out.read_text())
    assert (made["program"], made["batch"]) == ("sample", "4 videos at a time")
    assert made["memory"]["chip"] == 32 * 2**30
    assert "minimum" not in made["collectives"]


@needs_libtpu
@pytest.mark.slow
def test_the_real_model_compiles(tmp_path):
    out = tmp_path / "report.json"
    done = run(
        f"--config={CONFIG}",
        *FOUR_CHIPS,
        f"--json={out}",
        script=("-m", "nuwa_jax.parallel.aot"),
        env={"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(out.read_text())
    assert made["memory"]["fits"]
    assert made["flops"]["with_recomputation"] >= made["flops"]["model"] > 1e9


def test_a_mistake_ends_with_one_line():
    done = run("--topology=v5e:2x2", script=("-m", "nuwa_jax.parallel.aot"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: give --config=FILE and --topology=CHIP:SHAPE")


@pytest.mark.parametrize(
    ("name", "told"),
    [("v5e", "CHIP:SHAPE"), ("v9:2x2", "v4, v5e, v5p, v6e, h100")],
)
def test_a_topology_that_is_none_is_told(name, told):
    with pytest.raises(UserError, match=told):
        Topology.parse(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_the_error_says_how_to_get_it():
    with pytest.raises(UserError, match=r"nuwa_jax\[tpu\]"):
        Topology.parse("v5e:2x2").devices()


def test_topologies_are_read_by_name():
    topology = Topology.parse("v5p:4x4x4", slices=2)
    assert (topology.name, topology.chips) == ("v5p:4x4x4 x 2 slices", 128)
    assert Topology.parse("v5:2x2x1").chip.name == "v5p"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_of_every_chip_the_peak_is_known(chip):
    assert 1e14 < chip.flops < 1e16


def test_changes_that_need_less_memory_come_in_the_order_of_their_cost():
    config = get_config()
    config.model.unet.model_channels = 256  # large enough to have to be split
    config.model.unet.remat = "attention"
    config.mesh.fsdp = 128
    config.stages.drag.batch_size = 1024
    found = list(advice.changes(config, Topology.parse("v5e:16x16"), "train", "drag"))
    assert [given for given, _ in found] == [
        {"model.unet.remat": "block"},
        {"model.unet.remat": "offload"},
        {"model.unet.remat": "offload", "mesh.fsdp": 256},
        {"model.unet.remat": "offload", "mesh.fsdp": 256, "train.accumulate": 2},
        {"model.unet.remat": "offload", "mesh.fsdp": 256, "train.accumulate": 4},
    ]
    last = found[-1][1]
    assert (last.mesh.fsdp, last.train.accumulate, last.model.unet.remat) == (256, 4, "offload")
    assert config.mesh.fsdp == 128


def test_a_mesh_that_leaves_too_much_whole_is_not_proposed():
    config = get_config()
    config.model.unet.update(remat="offload", model_channels=192)  # divides by 64, not by 128
    config.mesh.fsdp = 64
    config.stages.drag.batch_size = 256
    assert not list(advice.changes(config, Topology.parse("v5e:16x16"), "train", "drag"))
