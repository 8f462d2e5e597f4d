"""GMFlow's published files: both kinds of names, and what is wrong with others."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from nuwa_jax.convert.gmflow import convert_gmflow
from nuwa_jax.errors import UserError
from nuwa_jax.estimation.gmflow import load_gmflow
from nuwa_jax.tensor_files import SafetensorsFile, Spec, write_safetensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gmflow_small.npz"


@pytest.fixture(scope="module")
def weights():
    with np.load(GOLDEN) as file:
        return {
            name.removeprefix("weights|"): file[name].astype(np.float32)
            for name in file.files
            if name.startswith("weights|")
        }


def save(path, arrays):
    specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.items())
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_array_has_its_place_whatever_the_names_begin_with(tmp_path, weights, prefix):
    source = save(tmp_path / "in.safetensors", {prefix + n: a for n, a in weights.items()})
    report = convert_gmflow(source, tmp_path / "new" / "out.safetensors")
    assert report.mapped == len(weights)
    config, params = load_gmflow(tmp_path / "new" / "out.safetensors")
    assert (config.stem, config.width, config.layers) == ((8, 8, 12), 16, 2)
    kernel = params["upsampler"]["weights"]["kernel"]
    np.testing.assert_array_equal(kernel, weights["upsampler.2.weight"][:, :, 0, 0].T)
    total = sum(array.size for array in weights.values())
    assert report.parameters == {"gmflow": total}


def test_a_torch_checkpoint_with_its_optimizer_converts_alike(tmp_path, weights):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save(state, tmp_path / "bare.pkl")
    training = {"model": {f"module.{n}": t for n, t in state.items()}, "optimizer": {}, "step": 3}
    torch.save(training, tmp_path / "upstream.pth")
    for name in ("bare.pkl", "upstream.pth"):
        convert_gmflow(tmp_path / name, tmp_path / f"{name}.safetensors")
    bare, upstream = (
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("bare.pkl", "upstream.pth")
    )
    assert bare == upstream


def test_missing_left_over_and_misshapen_arrays_are_named(tmp_path, weights):
    faulty = dict(weights)
    faulty["refine.conv.weight"] = faulty.pop("backbone.trident_conv.weight")
    path = save(tmp_path / "a.safetensors", faulty)
    with pytest.raises(
        UserError, match=r"missing: backbone\.trident_conv\.weight; .*left over: refine\.conv"
    ):
        convert_gmflow(path, tmp_path / "out.safetensors")
    faulty = weights | {"feature_flow_attn.k_proj.weight": np.zeros((16, 12), np.float32)}
    path = save(tmp_path / "b.safetensors", faulty)
    with pytest.raises(UserError, match=r"feature_flow_attn\.k_proj\.weight is \(12, 16\)"):
        convert_gmflow(path, tmp_path / "out.safetensors")
    both = weights | {"module.upsampler.2.bias": weights["upsampler.2.bias"]}
    with pytest.raises(UserError, match="two models"):
        convert_gmflow(save(tmp_path / "c.safetensors", both), tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        convert_gmflow(path, tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_writes_a_file_that_says_what_it_is(tmp_path, weights):
    source = save(tmp_path / "in.safetensors", weights)
    command = [sys.executable, "-m", "nuwa_jax.convert", "--part=gmflow"]
    command += [f"--from={source}", f"--out={tmp_path / 'out.safetensors'}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "names of GMFlow" in run.stdout and "left over 0, missing 0" in run.stdout
    metadata = SafetensorsFile(tmp_path / "out.safetensors").metadata
    assert json.loads(metadata["config"])["width"] == 16
