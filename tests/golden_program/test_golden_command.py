"""The command that compares with the reference's arrays, on a folder of another shape than theirs.

`tiny_folder.py` makes that folder with this package's own code, so agreement is no news here: what
is tested is that sizes are read from the folder and that whatever is wrong with one is named.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_folder import demo_map, write_folder

from nuwa_jax.errors import UserError
from nuwa_jax.golden import blocks, pictures
from nuwa_jax.golden.__main__ import report
from nuwa_jax.golden.compare import EXACT, MISSING, Item, relative
from nuwa_jax.golden.folder import ARRAYS, CONFIG, WEIGHTS, Arrays
from nuwa_jax.golden.model import Golden
from nuwa_jax.golden.run import run_checks
from nuwa_jax.motion.dragnuwa import reference_tracks, sparse_displacements

QUICK = ("scalars", "lora", "drag", "resblock", "vae", "clip")
REAL = pathlib.Path(__file__).parents[3] / "shared" / "golden" / "small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("goldens")
    write_folder(path, QUICK)
    return path


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("all_goldens")
    write_folder(path, ARRAYS)
    return path


class Without(Golden):
    """A folder from which one array is absent."""

    absent = ""

    def arrays(self, name):
        whole = super().arrays(name)
        return Arrays(name, {key: whole[key] for key in whole if whole.name(key) != self.absent})


def copy(source, target, name, array=None, change=None):
    """The folder without one file, or with one array of it changed."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != name:
            os.link(file, target / file.name)
    if array is not None:
        with np.load(source / name) as file:
            arrays = dict(file)
        np.savez(target / name, **arrays | {array: change(arrays[array])})
    return target


@pytest.fixture
def zeros(monkeypatch):
    """Networks that give zeros at once: what is missing is told without them."""

    def compiled(function):
        def apply(*args):
            return jax.tree.map(
                lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *args)
            )

        return apply

    for module in (blocks, pictures):
        monkeypatch.setattr(module, "compiled", compiled)


def run(capsys, folder, *only):
    """(exit code, the summary of the last line, the lines before)."""
    code = report(folder, only)
    *lines, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), lines


def off_by_a_hundredth(value):
    value = np.array(value)
    value.flat[value.size // 2] += 0.01 * np.abs(value).max()
    return value


def test_a_folder_of_another_shape_passes(capsys, folder, tmp_path):
    code = report(folder, QUICK, tmp_path / "report.json")
    *lines, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert code == 0 and summary["ok"], summary
    assert summary["compared"] == summary["passed"] == len(lines) >= 70
    assert not summary["failed"] + summary["missing"] + summary["skipped"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert {item["name"].split("/")[0] for item in written["items"]} == {*QUICK, WEIGHTS}
    assert all(item["error"] <= item["bound"] for item in written["items"])


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("scalars", "c_out"),
        ("lora", "second|out_unfolded"),
        ("drag", "small1|nz_value"),
        ("drag", "full0|filtered_off1_2_stride3"),
        ("resblock", "deep|out_ioi"),
        ("vae", "dec_chunks_of_1"),
        ("clip", "wide|embedding"),
    ],
)
def test_a_changed_array_fails_by_its_name(capsys, folder, tmp_path, file, array):
    changed = copy(folder, tmp_path / "copy", f"{file}.npz", array, off_by_a_hundredth)
    code, summary, lines = run(capsys, changed, file)
    assert code == 1 and summary["failed"] == [f"{file}/{array}"]
    assert [line for line in lines if line.startswith(f"FAILED   {file}/{array} ")]


# Arrays whose names have numbers of the folder's own choice are missed as one of their kind.
KINDS = {
    "scalars/sigmas_7_sigma_max_80_default": "scalars/sigmas_N_sigma_max_S_default",
    "drag/small_hwT_kernel_sigma": "drag/SIZE_hwT_kernel_sigma",
    "drag/kernel_33_5_sum": "drag/kernel_K_S_sum",
    "drag/kernel_33_5_centre_row": "drag/kernel_K_S_centre_row",
    "drag/kernel_33_5_centre_edge_corner": "drag/kernel_K_S_centre_edge_corner",
    "vae/dec_timesteps3": "vae/dec_timestepsN",
}


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=pytest.mark.slow) if f == "vae" else f for f in QUICK]
)
def test_every_array_is_missed_by_its_name(folder, zeros, file):
    golden = Without(folder)
    names = [golden.arrays(file).name(key) for key in golden.arrays(file)]
    for name in names:
        golden.absent = name
        items = list(run_checks(golden, [file]))
        missing = [item.name for item in items if item.kind == MISSING]
        assert KINDS.get(name, name) in missing
        assert not any(item.passed for item in items if item.name in missing)


@pytest.mark.parametrize("name", ["lora.npz", WEIGHTS, CONFIG])
def test_a_missing_file_is_named(capsys, folder, tmp_path, name):
    code, summary, lines = run(capsys, copy(folder, tmp_path / "copy", name), "lora", "scalars")
    assert code == 1 and name in summary["missing"]
    assert f"missing  {name}" in lines


def test_a_missing_weight_is_named(capsys, folder, tmp_path):
    target = copy(folder, tmp_path / "copy", WEIGHTS)
    weights = load_file(folder / WEIGHTS)
    name = "conditioner.embedders.0.open_clip.model.visual.ln_pre.bias"
    del weights[name]
    save_file(weights, target / WEIGHTS)
    code, summary, _ = run(capsys, target, "clip")
    assert code == 1 and summary["missing"] == [f"{WEIGHTS}/{name}"]


def test_a_missing_entry_of_the_config_is_named(capsys, folder, tmp_path):
    target = copy(folder, tmp_path / "copy", CONFIG)
    config = json.loads((folder / CONFIG).read_text())
    del config["sampler_config"]["guider_config"]["params"]["max_scale"]
    (target / CONFIG).write_text(json.dumps(config))
    code, summary, _ = run(capsys, target, "scalars")
    assert code == 1
    assert summary["missing"] == [f"{CONFIG}/sampler_config.guider_config.params.max_scale"]


@pytest.mark.parametrize(
    ("array", "change"),
    [("guider_scale", lambda a: a[:, :-1]), ("vector_embedding", lambda a: a * np.nan)],
)
def test_wrong_shapes_and_nan_do_not_pass(capsys, folder, tmp_path, array, change):
    changed = copy(folder, tmp_path / "copy", "scalars.npz", array, change)
    code, summary, _ = run(capsys, changed, "scalars")
    assert code == 1 and summary["failed"] == [f"scalars/{array}"]


def test_a_broken_file_is_named(capsys, folder, tmp_path):
    target = copy(folder, tmp_path / "copy", "scalars.npz")
    (target / "scalars.npz").write_bytes(b"PK\x03\x04 cut short")
    code, summary, _ = run(capsys, target, "scalars")
    assert code == 1 and summary["failed"] == ["scalars.npz"]


def test_an_array_that_nothing_reads_is_told(capsys, folder, tmp_path):
    target = copy(folder, tmp_path / "copy", "scalars.npz", "sigma", lambda a: a)
    with np.load(target / "scalars.npz") as file:
        np.savez(target / "scalars.npz", **file, invented=np.zeros(3))
    code, summary, lines = run(capsys, target, "scalars")
    assert code == 0 and summary["skipped"] == ["scalars/invented"]
    assert any(line.startswith("skipped  scalars/invented  (") for line in lines)


def test_no_folder_of_goldens_is_a_users_mistake(folder, tmp_path):
    for path, message in ((tmp_path / "none", "is no folder"), (tmp_path, "no folder of goldens")):
        with pytest.raises(UserError, match=message):
            report(path)
    with pytest.raises(UserError, match="no check is called nonsense"):
        report(folder, ["nonsense"])


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "nuwa_jax.golden", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the reference's arrays are not at {REAL}")
def test_the_program_on_the_references_own_folder():
    command = [sys.executable, "-m", "nuwa_jax.golden", str(REAL), "--only=scalars,drag,lora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and summary["ok"], done.stdout + done.stderr
    assert summary["compared"] > 100 and not summary["skipped"]


@pytest.mark.slow
def test_every_check_passes_on_another_shape(capsys, whole_folder):
    code, summary, _ = run(capsys, whole_folder)
    assert code == 0 and not summary["skipped"], summary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("transformer", "middle|out_perframe_3tok"),
        ("flow_encoder", "f1_video0_scale2.5"),
        ("unet", "b1_zero_flow_out_sigma_0.6"),
        ("unet_taps", "middle_block.1|sample"),
        ("sampler", "denoised_guided"),
        ("e2e", "frames_rows_off0_cols_off2_stride3"),
    ],
)
def test_a_changed_array_of_a_network_fails(capsys, whole_folder, tmp_path, file, array):
    changed = copy(whole_folder, tmp_path / "copy", f"{file}.npz", array, off_by_a_hundredth)
    code, summary, _ = run(capsys, changed, file)
    assert code == 1 and summary["failed"]
    name = f"{file}/{array.removesuffix('|sample')}"
    assert all(failed.startswith(name) for failed in summary["failed"])


def test_relative_errors_of_nothing():
    assert relative("zeros", np.zeros(3), np.zeros(3), 1e-6).passed
    assert not relative("not zeros", np.full(3, 1e-3), np.zeros(3), 1e-6).passed
    assert not Item("not a number", float("nan"), 0.0, EXACT).passed


class TestTracksOfTheDemo:
    """`reference_tracks` with its defects against the demo's own loop, and without them."""

    SIZE = {"height": 40, "width": 72}

    def displacements(self, tracks, **defects):
        made = reference_tracks(json.dumps(tracks), 6, **self.SIZE, **defects)
        return sparse_displacements(made, **self.SIZE)

    @pytest.mark.parametrize("seed", range(4))
    def test_with_its_defects_the_map_is_the_demos(self, seed):
        rng = np.random.default_rng(seed)
        tracks = [
            rng.uniform((-100, -60), (575, 319), (n, 2)).round(1).tolist() for n in (1, 2, 2, 4, 5)
        ]
        # The same places once more: later tracks stand on the pixels of earlier ones.
        tracks += [tracks[1][:1] + tracks[2][1:], tracks[3][:2]]
        ours = self.displacements(tracks, still_points_move=True, overwrite=True, wrap=True)
        np.testing.assert_array_equal(ours, demo_map(tracks, 6, **self.SIZE))

    def test_a_still_point_stays_unless_asked(self):
        assert not self.displacements([[[300, 100]]]).any()
        moved = self.displacements([[[300, 100]]], still_points_move=True)
        assert (moved.sum((1, 2)) == np.float32(0.2)).all()

    def test_tracks_on_one_pixel_add_up_unless_asked(self):
        tracks = [[[80, 80], [240, 80]], [[80, 80], [80, 240]]]
        first = self.displacements(tracks)[0, 10, 10]
        assert first == pytest.approx([4, 4])
        assert self.displacements(tracks, overwrite=True)[0, 10, 10] == pytest.approx([0, 4])
        # What stands still erases, too.
        still = [tracks[0], [[80, 80], [80, 80]]]
        assert self.displacements(still)[0, 10, 10] == pytest.approx([4, 0])
        assert not self.displacements(still, overwrite=True)[0, 10, 10].any()

    def test_steps_from_beyond_the_border_are_left_out_unless_asked(self):
        tracks = [[[-80, 80], [80, 80]]]  # from 10 pixels beyond the left border to 10 within
        drawn = self.displacements(tracks).any((1, 2, 3))
        assert drawn.tolist() == [False, False, False, True, True]
        wrapped = self.displacements(tracks, wrap=True)
        assert wrapped.any((1, 2, 3)).all() and wrapped[0, 10, 62].any()
        with pytest.raises(ValueError, match=r"track 0 is at \(-10, 10\) in frame 0"):
            self.displacements(tracks, crash=True)

    def test_no_tracks_give_an_empty_map(self):
        assert not self.displacements([]).any()
