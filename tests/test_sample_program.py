"""sample.py as a program: what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nuwa_jax.data.video import read_video
from nuwa_jax.generation.weights import EXAMPLE, SHIPPED, WEIGHTS

ROOT = Path(__file__).parent.parent


def run_sample(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "sample.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"drags": []}, "drags"), ({"frames": 5}, "frames")],
)
def test_a_wrong_drags_file_ends_in_one_line_and_exit_code_2(tmp_path, changes, told):
    document = json.loads((EXAMPLE / "drags.json").read_text()) | changes
    drags = tmp_path / "drags.json"
    drags.write_text(json.dumps(document))
    out = tmp_path / "out.mp4"
    done = run_sample(f"--image={EXAMPLE / 'picture.png'}", f"--drags={drags}", f"--out={out}")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert told in line
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_the_shipped_model_is_small_and_samples_the_example(tmp_path):
    assert (SHIPPED / WEIGHTS).stat().st_size <= 10_000_000
    out = tmp_path / "out.mp4"
    done = run_sample(
        f"--image={EXAMPLE / 'picture.png'}",
        f"--drags={EXAMPLE / 'drags.json'}",
        f"--out={out}",
        "--steps=2",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out), str(tmp_path / "out_overlay.mp4")]
    video, _ = read_video(out)
    assert video.shape == (8, 64, 64, 3)
