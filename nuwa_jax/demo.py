"""`make demo`: the shipped model drags and is evaluated; then one is trained from nothing.

python -m nuwa_jax.demo --out=demo_out [--clips=folder]

With --clips the videos of that folder are prepared and mixed into the training, and both models
drag points of their first frames.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from nuwa_jax.data.prepare import ClipOptions
from nuwa_jax.data.records import RecordReader
from nuwa_jax.data.video import read_video
from nuwa_jax.data.webvid import make_job, prepare
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.evaluation import protocol
from nuwa_jax.evaluation.report import metrics_table
from nuwa_jax.generation.animate import animate
from nuwa_jax.generation.generator import Generator
from nuwa_jax.generation.weights import EXAMPLE
from nuwa_jax.host_memory import keep_host_memory
from nuwa_jax.motion.drags import DragSet
from nuwa_jax.motion.trajectory_samplers import SamplerConfig, sample_trajectories
from nuwa_jax.presets import load_preset
from nuwa_jax.training.loop import train

SHOWN_CLIPS = 4
CLIPS_SHARE = 0.3  # of the training batches


class _Report:
    """Tells what happens, with the minutes gone, and keeps what is to be shown at the end."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.tables: list[str] = []
        self.files: list[Path] = []

    def step(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
        print(f"\n== [{minutes:02d}:{seconds:02d}] {text}", flush=True)

    def finish(self) -> None:
        self.step("done")
        print("\n".join(self.tables))
        print("files:")
        print("\n".join(f"  {path}" for path in self.files), flush=True)


def run(out: Path, clips: Path | None, num_scenes: int) -> None:
    """The whole demo; a second run in the same folder goes on with the training it finds.

    Args:
      out: folder for everything.
      clips: folder of videos, or None.
      num_scenes: held-out scenes of each evaluation.
    """
    report = _Report()
    out.mkdir(parents=True, exist_ok=True)
    prepared = None
    if clips is not None:
        report.step(f"preparing the clips of {clips}")
        prepared = out / "clips"
        options = ClipOptions(height=64, width=64, frames=8)
        counts = prepare(make_job(_csv_of(clips), clips, prepared, options), overwrite=True)
        print(f"{counts['records']} records of {counts['inputs']} clips", flush=True)

    report.step("sampling with the shipped model")
    shipped = Generator.load()
    _show(shipped, "shipped", out, prepared, num_scenes, report)

    config = _demo_config(prepared)
    minutes = sum(config.stages[name].time_budget_minutes for name in config.curriculum)
    report.step(
        f"training configs/demo.py from nothing: {minutes:g} minutes and the time to compile; "
        f"tensorboard --logdir={out / 'trained'} shows it"
    )
    train(config, out / "trained")
    trained = Generator.load(out / "trained")
    report.step("sampling with the model trained here")
    _show(trained, "trained here", out, prepared, num_scenes, report)
    report.finish()


def _demo_config(prepared: Path | None) -> ml_collections.ConfigDict:
    config = load_preset("demo")
    if prepared is not None:
        config.data.clips = str(prepared)
        config.data.clips_weight, config.data.scenes_weight = CLIPS_SHARE, 1 - CLIPS_SHARE
    return config


def _show(
    generator: Generator,
    name: str,
    out: Path,
    prepared: Path | None,
    num_scenes: int,
    report: _Report,
) -> None:
    """Samples the example (and clips), evaluates on scenes, and notes tables and files."""
    folder = out / f"{name.split()[0]}_results"
    folder.mkdir(exist_ok=True)
    # The example's drags are for its own size and length; any model of that length can take them.
    files = [
        animate(
            generator,
            image=EXAMPLE / "picture.png",
            drags=EXAMPLE / "drags.json",
            out=folder / "example.mp4",
        )
    ]
    if prepared is not None:
        files += _animate_clips(generator, prepared, folder)
    for written in files:
        report.files += [written.video, written.overlay]
        print(written.video, flush=True)

    report.step(f"evaluating the model {name} on {num_scenes} held-out scenes")
    evaluation = protocol.evaluate(generator, num_scenes=num_scenes)
    evaluation.metrics["checkpoint"] = name
    protocol.write(evaluation, folder)
    report.tables.append(f"\n### Model {name}\n\n{metrics_table(evaluation.metrics)}")
    report.files += [folder / "metrics.json", folder / "contact_sheet.png"]


def _animate_clips(generator: Generator, prepared: Path, folder: Path) -> list[Any]:
    """Drags points of prepared clips' first frames where their own tracks went."""
    reader = RecordReader(prepared)
    rng = np.random.default_rng(0)
    written = []
    for index in range(min(SHOWN_CLIPS, len(reader))):
        record = reader.read(index)
        video, _ = read_video(record.video)
        picture = folder / f"clip_{index}.png"
        Image.fromarray(video[0]).save(picture)
        moving = SamplerConfig(max_count=2, anchor_probability=0.0)
        tracks = sample_trajectories(record.tracks, rng, moving, record.height, record.width)
        drags = folder / f"clip_{index}_drags.json"
        DragSet.from_tracks(tracks, record.width, record.height, record.fps).save(drags)
        out = folder / f"clip_{index}.mp4"
        written.append(animate(generator, image=picture, drags=drags, out=out, text=record.caption))
    return written


def _csv_of(clips: Path) -> Path | None:
    """The WebVid-style csv that lies in the folder, if there is just one."""
    found = sorted(clips.glob("*.csv"))
    return found[0] if len(found) == 1 else None


def define_flags() -> None:
    """The options of the command line."""
    flags.DEFINE_string("out", "demo_out", "Folder for everything that the demo makes.")
    flags.DEFINE_string("clips", None, "Folder of videos to learn from and to animate.")
    flags.DEFINE_integer("num_scenes", 16, "Held-out scenes of each evaluation.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    options = flags.FLAGS
    clips = Path(options.clips) if options.clips else None
    if clips is not None and not clips.is_dir():
        raise UserError(f"--clips={clips} is not a folder: give one that holds videos")
    keep_host_memory()
    run(Path(options.out), clips, options.num_scenes)


if __name__ == "__main__":
    define_flags()
    run_main(main)
