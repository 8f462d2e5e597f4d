import ast
import dataclasses
import math
import sys

import numpy as np
import pytest
from prepared_clips import SMALL, make_clips

from nuwa_jax.data import bench
from nuwa_jax.data.bench import bench_reading, median_interval, source_videos
from nuwa_jax.data.soak import family, soak
from nuwa_jax.data.video import write_video
from nuwa_jax.errors import UserError

OPTIONS = dict(backend="decord", fps=8.0, batch_size=2, num_batches=3, rounds=2, step_seconds=0.0)

# Speaks the loader's protocol without PyTorch: answers each seed with a run of known figures.
STAND_IN = """#!{python}
import json, sys
options = json.loads(sys.argv[2])
print(json.dumps(dict(name="stand-in")), flush=True)
for line in sys.stdin:
    run = dict(clips=options["clips"], bytes=10**6, wall=2.0, cpu=4.0 + int(line), waited=0.5)
    print(json.dumps(run), flush=True)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = make_clips(tmp_path_factory.mktemp("clips"), count=4)
    return dataclasses.replace(SMALL, clips=folder, clips_weight=1.0, scenes_weight=0.0)


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 12, 25])
def test_interval_of_the_median_holds_it_as_often_as_it_says(n):
    values = np.random.default_rng(n).permutation(n).astype(float)
    middle, low, high = median_interval(list(values))
    assert middle == (n - 1) / 2
    outside = int(low)
    assert high == n - 1 - outside
    # The median of a distribution lies beyond value i of n with a binomial probability.
    missed = lambda k: 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n  # noqa: E731
    assert n < 6 or missed(outside) <= 0.05 < missed(outside + 1)
    assert n >= 6 or outside == 0


def test_reading_is_measured_and_compared_in_pairs(config, tmp_path, capsys):
    python = executable(tmp_path / "python", STAND_IN.format(python=sys.executable))
    found = bench_reading(config, [], torch_python=python, **OPTIONS)
    assert set(found) == {"ours", "stand-in", "ratio_clips_per_core", "ratio_clips_per_second"}
    # Runs 1 and 2 of the stand-in took 5 and 6 CPU seconds for 6 clips.
    assert found["stand-in"]["clips_per_core"] == (1.1, 1.0, 1.2)
    assert found["stand-in"]["waited_share"] == (0.25, 0.25, 0.25)
    assert found["ours"]["clips"] == 6
    _, low, high = found["ours"]["clips_per_second"]
    assert low / 3 <= found["ratio_clips_per_second"][0] <= high / 3
    bench.print_reading(found, 2)
    assert "ours / theirs, clips per core" in capsys.readouterr().out


def test_bytes_and_clips_are_those_of_the_batches(config):
    run = bench.time_reading(config, batch_size=2, num_batches=3, seed=0, step_seconds=0.0)
    assert run.clips == 6
    clip = 5 * 24 * 32 * 3 + 4 * 5 * (2 * 4 + 1) + 20 * 4 + 4
    assert run.bytes == 6 * clip
    assert run.wall >= run.waited > 0 and run.cpu >= 0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho No module named torch >&2; exit 1\n", "failed: No module named torch"),
        ("#!/bin/sh\nexit 0\n", "it ended silently"),
        (None, "cannot be run: No such file"),
    ],
)
def test_a_loader_that_cannot_run_is_told_and_left_out(config, tmp_path, capsys, script, message):
    python = str(tmp_path / "none") if script is None else executable(tmp_path / "python", script)
    found = bench_reading(config, [], torch_python=python, **OPTIONS)
    assert set(found) == {"ours"}
    assert message in capsys.readouterr().out


def test_the_loader_reads_the_videos_that_the_records_are_of(config, tmp_path):
    root = tmp_path / "videos"
    with pytest.raises(UserError, match="none of the clips"):
        source_videos(root, config.clips)
    for name in ("2", "7"):
        write_video(root / "made.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8.0)
        (root / "made.mp4").rename(root / name)
    assert source_videos(root, config.clips) == [root / "2"]


def test_preparation_is_measured(tmp_path, capsys):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    moving = np.stack([np.roll(picture, 3 * t, 1) for t in range(12)])
    write_video(tmp_path / "videos" / "moving.mp4", moving, 8.0)
    write_video(tmp_path / "videos" / "short.mp4", moving[:3], 8.0)
    options = bench.ClipOptions(height=64, width=64, frames=8)
    counts = bench.time_preparation(tmp_path / "videos", tmp_path / "out", options)
    assert (counts["inputs"], counts["records"]) == (2, 1)
    stages = sum(counts["seconds_by_stage"].values())
    assert counts["clips_per_core"] == counts["clips"] / stages > 0
    assert counts["cpu"] > 0 and counts["bytes_per_record"] == counts["bytes"]
    bench.print_preparation(counts)
    assert "kB a record" in capsys.readouterr().out


def test_a_long_run_compiles_once_and_watches_memory(config):
    config = dataclasses.replace(config, flip_probability=0.5, flow_divisor=2)
    seen = soak(config, 40, 2)
    assert (seen.batches, seen.compilations, seen.num_replaced) == (40, 0, 0)
    assert len(seen.memory) == len(seen.files) == 20
    assert min(seen.memory) > 10**7


def test_family_counts_this_process_and_its_children():
    import subprocess

    assert len(set(family())) == len(family())
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in family()
    finally:
        child.kill()
        child.wait()


def test_the_loader_imports_nothing_of_this_package():
    source = bench._THEIRS.read_text()
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert not any(name.startswith(("nuwa_jax", "jax", "grain")) for name in imported)
