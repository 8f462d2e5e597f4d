"""Our weights under the names of others and back, and every way in which a file can be wrong."""

import json
import math
import pathlib
import subprocess
import sys
import tracemalloc
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from small_svd import FRAMES, HEADS, SIZE, random_params, small_config, write

from nuwa_jax.convert.export import export
from nuwa_jax.convert.lora import FoldedSource, fold_lora
from nuwa_jax.convert.released import convert, make_plan, open_released, parameter_shapes
from nuwa_jax.errors import UserError
from nuwa_jax.models.lora import merge_lora
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.tensor_files import SafetensorsFile, Spec, write_safetensors

LISTS = pathlib.Path(__file__).parents[3] / "shared" / "golden"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A model of ours with a flow encoder: its folder and its parameters by path."""
    folder = tmp_path_factory.mktemp("ours")
    config = small_config()
    return folder, write(folder, config, random_params(config))


@pytest.fixture(scope="module")
def released(ours, tmp_path_factory):
    """The same as a file in released names."""
    folder = tmp_path_factory.mktemp("sgm")
    export(ours[0], folder, "sgm")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def with_lora(tmp_path_factory):
    """A model of ours whose low-rank updates are not zero."""
    folder = tmp_path_factory.mktemp("lora")
    config = small_config(lora_rank=3)
    return folder, write(folder, config, random_params(config))


def back(source, out, **options):
    """Converts `source`; returns the parameters by path and the report."""
    report = convert(source, out, size=SIZE, frames=FRAMES, **HEADS | options)
    file = SafetensorsFile(out / "model.safetensors")
    return {name: file.read(name) for name in file.specs}, report


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def edited(source, out, change):
    """A copy of a file after `change(dict of arrays)`."""
    file = SafetensorsFile(source)
    arrays = {name: file.read(name) for name in file.specs}
    change(arrays)
    specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(out, specs, arrays.items())
    return out


def test_round_trip_is_bit_exact(ours, released, tmp_path):
    found, report = back(released, tmp_path)
    assert_same(found, ours[1])
    assert report.folded == report.kept_apart == 0 and not report.ignored
    assert report.mapped == len(SafetensorsFile(released).specs)
    assert sum(report.parameters.values()) == sum(
        v.size for k, v in ours[1].items() if not k.startswith("latents/")
    )


def test_sizes_are_read_off_the_shapes(ours, released, tmp_path):
    back(released, tmp_path)
    sections = (_config(tmp_path).model, _config(ours[0]).model)
    sections[0].unet.remat = sections[1].unet.remat  # a matter of training, not of sizes
    found, expected = (VideoLDM.from_config(section) for section in sections)
    assert found == expected


def test_a_diffusers_folder_round_trips(ours, tmp_path):
    exported = export(ours[0], tmp_path / "hf", "hf")
    theirs_lack = {k for k in ours[1] if "flow" in k}
    assert sum(exported.left_out.values()) == len(theirs_lack) + 2  # and the latents' statistics
    found, report = back(tmp_path / "hf", tmp_path / "back", head_channels=None, clip_heads=None)
    assert report.family == "hf"
    assert_same(found, {k: v for k, v in ours[1].items() if k not in theirs_lack})


def test_a_diffusers_folder_in_half_precision_and_in_pieces(ours, tmp_path):
    export(ours[0], tmp_path / "hf", "hf", "float16")
    unet = tmp_path / "hf" / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    clip = tmp_path / "hf" / "image_encoder"
    file = SafetensorsFile(clip / "model.safetensors")
    names, pieces = list(file.specs), {}
    for i, some in enumerate((names[::2], names[1::2])):
        piece = f"model-{i}.safetensors"
        arrays = [(name, file.read(name)) for name in some]
        write_safetensors(clip / piece, {n: file.specs[n] for n in some}, arrays)
        pieces |= dict.fromkeys(some, piece)
    (clip / "model.safetensors").unlink()
    (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": pieces}))
    found, _ = back(tmp_path / "hf", tmp_path / "back")
    for name, value in found.items():
        half = ours[1][name] if name.startswith("latents/") else ours[1][name].astype(np.float16)
        np.testing.assert_array_equal(value, half, err_msg=name)


def test_lora_is_kept_apart_or_folded(with_lora, tmp_path):
    export(with_lora[0], tmp_path / "sgm", "sgm")
    file = tmp_path / "sgm" / "model.safetensors"
    assert "model.diffusion_model.time_embed.0.linear.bias" in SafetensorsFile(file).specs
    found, report = back(file, tmp_path / "kept", fold_lora=False)
    assert_same(found, with_lora[1])
    assert report.kept_apart == sum(k.endswith("/down") for k in with_lora[1]) > 50
    assert _config(tmp_path / "kept").model.lora_rank == 3

    merged = merge_lora(_nested(with_lora[1]))
    found, report = back(file, tmp_path / "folded")
    assert report.folded > 50 and not any(name.startswith("lora/") for name in found)
    path = "unet/down_0_0_transformer/spatial_block/feed_forward/proj/kernel"
    assert np.abs(found[path] - with_lora[1][path]).max() > 1e-3
    for name, value in _flat(merged).items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    # What diffusers gets, which knows no updates, is the same.
    export(with_lora[0], tmp_path / "hf", "hf")
    found, _ = back(tmp_path / "hf", tmp_path / "hf_back")
    np.testing.assert_allclose(found[path], _flat(merged)[path], atol=1e-6)


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


def test_lora_scale(with_lora, tmp_path):
    export(with_lora[0], tmp_path / "sgm", "sgm")
    found, _ = back(tmp_path / "sgm" / "model.safetensors", tmp_path / "out", lora_scale=0.5)
    module = "unet/time_embed/linear_1"
    down, up = (with_lora[1][f"lora/{module}/{half}"] for half in ("down", "up"))
    expected = with_lora[1][f"{module}/kernel"] + 0.5 * down @ up
    np.testing.assert_allclose(found[f"{module}/kernel"], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_on_request_but_for_the_latents_scale(ours, released, tmp_path, dtype):
    found, report = back(released, tmp_path, dtype=dtype)
    assert report.dtype == dtype
    for name, value in ours[1].items():
        exact = name.startswith("latents/")
        expected = value if exact else value.astype(found[name].dtype)
        assert found[name].dtype == (np.float32 if exact else np.dtype(_dtype(dtype)))
        np.testing.assert_array_equal(found[name], expected)


def test_the_kernel_of_the_drags_goes_to_the_config(released, tmp_path):
    offset = np.arange(9) - 4.0
    row = np.exp(-(offset**2) / (2 * 2.5**2)).astype(np.float32)
    kernel = np.stack([np.outer(row, row)[None]] * 2)
    file = edited(
        released,
        tmp_path / "with.safetensors",
        lambda arrays: arrays.update({"guassian_filter.weight": kernel}),
    )
    _, report = back(file, tmp_path / "out")
    assert list(report.ignored.values()) == [1]
    raster = _config(tmp_path / "out").raster
    assert (raster.sigma, raster.kernel_size) == (2.5, 9)


def test_unused_arrays_are_ignored_with_their_reason(released, tmp_path):
    unused = {
        "first_stage_model.encoder.conv_in.weight": np.zeros((8, 3, 3, 3), np.float32),
        "conditioner.embedders.0.open_clip.model.logit_scale": np.zeros((), np.float32),
    }
    file = edited(released, tmp_path / "more.safetensors", lambda arrays: arrays.update(unused))
    _, report = back(file, tmp_path / "out")
    assert len(report.ignored) == 2 and "ignored 2" in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda a: a.update({"model.diffusion_model.surprise.weight": np.zeros(3, np.float32)}),
            "1 are left over: model.diffusion_model.surprise.weight",
        ),
        (
            lambda a: a.pop("first_stage_model.decoder.mid.block_1.mix_factor"),
            "1 arrays are missing: first_stage_model.decoder.mid.block_1.mix_factor",
        ),
        (
            lambda a: a.pop("model.diffusion_model.time_embed.0.weight"),
            "no model.diffusion_model.time_embed.0.weight",
        ),
        (
            lambda a: a.update({"model.diffusion_model.out.2.bias": np.zeros(9, np.float32)}),
            "model.diffusion_model.out.2.bias is (9,) in our layout, but unet/conv_out/bias",
        ),
        (
            lambda a: a.update({"model.diffusion_model.out.2.weight": np.zeros(9, np.float32)}),
            "model.diffusion_model.out.2.weight has the shape (9,)",
        ),
    ],
)
def test_what_does_not_fit_is_named(released, tmp_path, change, told):
    file = edited(released, tmp_path / "bad.safetensors", change)
    with pytest.raises(UserError) as error:
        convert(file, tmp_path / "out", **HEADS)
    assert told in str(error.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_heads_that_do_not_divide(released, tmp_path):
    with pytest.raises(UserError, match="--head_channels"):
        convert(released, tmp_path, head_channels=48, clip_heads=2)
    with pytest.raises(UserError, match="--clip_heads"):
        convert(released, tmp_path, head_channels=16, clip_heads=5)


def test_files_that_are_no_checkpoint(released, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_released(tmp_path / "nothing.safetensors")
    whole = released.read_bytes()
    for content, told in (
        (whole[:-100], "cut short"),
        (b"PK", "length of its header"),
        (whole[:20] + b"?" * 40, "length of its header|not JSON"),
    ):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=told):
            open_released(tmp_path / "bad.safetensors")
    other = {"weight": Spec((2,), np.dtype(np.float32))}
    write_safetensors(tmp_path / "o.safetensors", other, [("weight", np.zeros(2, np.float32))])
    with pytest.raises(UserError, match=r"no model\.diffusion_model"):
        open_released(tmp_path / "o.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="unet, vae and image_encoder"):
        open_released(tmp_path / "folder")


def test_other_architectures_have_no_names_elsewhere(tmp_path):
    with pytest.raises(UserError, match="not of SVD's architecture"):
        export(pathlib.Path(__file__).parents[2] / "nuwa_jax/assets/tiny", tmp_path, "sgm")


def test_arrays_pass_through_one_at_a_time(tmp_path):
    """The peak is far below the model's size, and so is what reading it back takes besides it."""
    config = small_config()
    config.model.unet.update(model_channels=128, head_channels=32)
    config.model.image_encoder.update(width=256, heads=4)
    arrays = write(tmp_path / "ours", config, random_params(config))
    total = sum(array.nbytes for array in arrays.values())
    largest = max(array.nbytes for array in arrays.values())
    assert largest < total / 20
    export(tmp_path / "ours", tmp_path, "sgm")
    sizes = dict(size=SIZE, frames=FRAMES, head_channels=32, clip_heads=4)
    convert(tmp_path / "model.safetensors", tmp_path / "warm", **sizes)
    del arrays
    tracemalloc.start()
    convert(tmp_path / "model.safetensors", tmp_path / "out", **sizes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < total / 4, f"{peak / 1e6:.0f} MB of {total / 1e6:.0f}"


def test_an_update_without_its_other_half_or_of_another_size_is_named(with_lora, tmp_path):
    export(with_lora[0], tmp_path / "sgm", "sgm")
    file = tmp_path / "sgm" / "model.safetensors"
    module = "model.diffusion_model.time_embed.0"
    short = np.zeros((3, 1), np.float32)
    for change, told in (
        (lambda a: a.pop(f"{module}.lora_up.weight"), f"lack a half: {module}"),
        (lambda a: a.pop(f"{module}.lora_down.weight"), f"lack a half: {module}"),
        (lambda a: a.update({f"{module}.lora_up.weight": short}), f"of another size: {module}"),
    ):
        bad = edited(file, tmp_path / "bad.safetensors", change)
        with pytest.raises(UserError, match=told):
            convert(bad, tmp_path / "out", **HEADS)


def test_the_program(released, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "nuwa_jax.convert", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    flags = [f"--from={released}", f"--out={tmp_path / 'out'}", "--head_channels=16"]
    size = ["--clip_heads=2", "--height=32", "--width=64", "--frames=3"]
    done = run(*flags, *size, f"--report={tmp_path / 'report.json'}")
    assert done.returncode == 0, done.stderr
    assert "left over 0, missing 0" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["mapped"] > 500
    done = run(*flags, *size[:1], "--height=33")
    assert done.returncode == 2 and done.stderr.startswith("error: height and width must be")
    assert done.stderr.count("\n") == 1


class Listed:
    """A source of which the shapes alone are known."""

    def __init__(self, *lists):
        self.specs = {
            prefix + name: Spec(tuple(shape), np.dtype(np.float32))
            for prefix, file in lists
            for name, (shape, _) in json.loads((LISTS / file).read_text()).items()
        }


def check_one_to_one(plan, names):
    """Every parameter but the latents' statistics has arrays, and no array has two parameters."""
    assert plan.leaves.keys() == {p for p in plan.shapes if not p.startswith("latents/")}
    theirs = [name for leaf in plan.leaves.values() for name in leaf.theirs]
    assert len(theirs) == len(set(theirs)) and set(theirs) <= set(names)
    return len(theirs)


@pytest.mark.skipif(not LISTS.is_dir(), reason=f"the released lists of arrays are not at {LISTS}")
@pytest.mark.parametrize("fold", [True, False])
def test_every_released_array_has_its_place(fold):
    source = FoldedSource(Listed(("", "dragnuwa15_state_dict.json")), fold=fold)
    plan = make_plan(source, "sgm")
    counts = json.loads((LISTS / "param_counts.json").read_text())
    updates = 464
    assert 2 * updates == counts["unet_lora"][0]
    mapped = check_one_to_one(plan, source.specs)
    assert mapped + 2 * updates + sum(plan.ignored.values()) == counts["total"][0]
    assert (plan.folded, len(plan.lora)) == ((updates, 0) if fold else (0, updates))
    size = Counter()
    for path, shape in plan.shapes.items():
        size[path.split("/")[0]] += math.prod(shape)
    heads = counts["unet_flow_in_resblocks(gamma/beta/flow_cond_norm)"][1]
    expected = counts["unet_svd_base(no lora, no flow)"][1] + counts["unet_flow_blocks"][1] + heads
    assert size["unet"] + size["flow_encoder"] == expected
    assert size["image_encoder"] == counts["conditioner_clip_visual"][1]
    used = ("conditioner_vae_encoder+quant_conv(used)", "first_stage_decoder")
    assert size["autoencoder"] == sum(counts[name][1] for name in used)


@pytest.mark.skipif(not LISTS.is_dir(), reason=f"the released lists of arrays are not at {LISTS}")
def test_every_array_of_a_diffusers_folder_has_its_place():
    files = (
        ("unet/", "diffusers_svd_unet_state_dict.json"),
        ("vae/", "diffusers_svd_vae_state_dict.json"),
        ("image_encoder/", "hf_svd_image_encoder_state_dict.json"),
    )
    source = FoldedSource(Listed(*files))
    plan = make_plan(source, "hf")
    assert check_one_to_one(plan, source.specs) == len(source.specs) and not plan.ignored


def test_updates_match_the_linear_layers_of_the_base():
    config = small_config(lora_rank=2)
    shapes = parameter_shapes(VideoLDM.from_config(config.model))
    updated = {p.removeprefix("lora/").removesuffix("/down") for p in shapes if p.endswith("/down")}
    kernels = {p for p in shapes if p.startswith("unet/") and p.endswith("/kernel")}
    linear = {p.removesuffix("/kernel") for p in kernels if len(shapes[p]) == 2}
    assert updated == linear


def _config(folder):
    import ml_collections

    return ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))


def _dtype(name):
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.float16


def _nested(flat):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flat, sep="/")


def _flat(nested):
    from flax.traverse_util import flatten_dict

    return {k: np.asarray(v) for k, v in flatten_dict(nested, sep="/").items()}
