"""How good motion estimators are, all in one table: flow on known pairs, tracks on known scenes.

python -m nuwa_jax.estimation.quality
python -m nuwa_jax.estimation.quality --backend=lk_dis,gmflow --weights=gmflow.safetensors \\
    --gt=FOLDER

Flow is compared with the true flow of every .flo file under --gt. Tracks start at the corners of
the first frame, as in the preparation of clips, of procedural scenes that are never trained on,
and are compared with what the geometry of the scenes says: `nuwa_jax.estimation.metrics` defines
the numbers. The last line is a JSON object, which --out writes as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from absl import flags

from nuwa_jax.data.scene_layout import SceneConfig
from nuwa_jax.data.scenes import HELD_OUT_SEED, render_scene, true_tracks
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.estimation.ground_truth import FlowPair, find_pairs
from nuwa_jax.estimation.metrics import (
    count_tracks,
    end_point_errors,
    forward_backward_errors,
    track_scores,
)
from nuwa_jax.estimation.registry import BACKENDS, Estimators, load_estimators
from nuwa_jax.motion.estimators import FlowEstimator, PointTracker, detect_keypoints

BACKEND = flags.DEFINE_list("backend", ["lk_dis"], f"Which to compare: {', '.join(BACKENDS)}.")
WEIGHTS = flags.DEFINE_list(
    "weights", [], "BACKEND=FILE for each that has weights; FILE alone if only one has."
)
GT = flags.DEFINE_string("gt", None, "Folder with true flow (.flo) and pictures.")
SCENES = flags.DEFINE_integer("scenes", 24, "How many scenes of each size; 0 leaves tracks out.")
HEIGHT = flags.DEFINE_integer("height", None, "Of the scenes; both 256x256 and 320x576 if unset.")
WIDTH = flags.DEFINE_integer("width", None, "Of the scenes; goes with --height.")
FRAMES = flags.DEFINE_integer("frames", 16, "Of a scene.")
POINTS = flags.DEFINE_integer("points", 256, "To track in a scene, at most.")
OUT = flags.DEFINE_string("out", None, "File to write the report to, as JSON.")

SIZES = ((256, 256), (320, 576))  # height and width
TRACK_COLUMNS = {
    "median_error": "median error (px)",
    "survival": "survival",
    "visible_throughout": "could survive",
    "ok4": "ok4",
    "ok4_moving": "ok4, moving",
    "occlusion_recall": "occl. recall",
    "occlusion_precision": "occl. precision",
    "round_trip": "there and back (px)",
    "cpu_seconds": "CPU s / clip",
}
FLOW_COLUMNS = {
    "end_point_error": "mean EPE (px)",
    "median_error": "median (px)",
    "forward_backward": "forward-backward (px)",
    "cpu_seconds": "CPU s / pair",
}


def main(argv: Sequence[str]) -> None:
    """Flags to one report."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    sizes = SIZES
    if HEIGHT.value is not None or WIDTH.value is not None:
        if HEIGHT.value is None or WIDTH.value is None:
            raise UserError("--height and --width go together: give both or none")
        sizes = ((HEIGHT.value, WIDTH.value),)
    if min(SCENES.value, POINTS.value - 1, FRAMES.value - 2, *(min(s) - 16 for s in sizes)) < 0:
        raise UserError(
            "needed are --scenes >= 0, --points >= 1, --frames >= 2 and sides of 16 or more"
        )
    out = Path(OUT.value) if OUT.value else None
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}, make it first")
    backends = dict.fromkeys(BACKEND.value)
    paths = weight_paths(list(backends), WEIGHTS.value)
    pairs = find_pairs(GT.value) if GT.value else []
    backends = {name: load_estimators(name, paths.get(name, "")) for name in backends}
    report = compare(
        backends, pairs, sizes if SCENES.value else (), SCENES.value, FRAMES.value, POINTS.value
    )
    print("\n".join(tables(report)))
    text = json.dumps(report)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def weight_paths(backends: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Which file each backend is to read.

    Raises:
      UserError: a file is for no backend, or for which of them is not said.
    """
    learned = [name for name in backends if name != "lk_dis"]
    paths = {}
    for entry in given:
        name, _, path = entry.partition("=")
        if name not in BACKENDS:
            if len(learned) != 1:
                raise UserError(f"--weights={entry} is for which of {learned}? Give BACKEND=FILE")
            name, path = learned[0], entry
        if name not in backends or name in paths:
            raise UserError(f"--weights={entry}: {name} is not compared, or has two files")
        paths[name] = path
    return paths


def compare(
    backends: dict[str, Estimators],
    pairs: Sequence[FlowPair],
    sizes: Sequence[tuple[int, int]],
    scenes: int,
    frames: int = 16,
    points: int = 256,
) -> dict[str, Any]:
    """The report of every backend.

    Args:
      backends: by name.
      pairs: with true flow.
      sizes: heights and widths of scenes to track in.
      scenes: of each size.
      frames: of a scene.
      points: to track in a scene, at most.
    """
    return {
        "scenes": scenes,
        "frames": frames,
        "points": points,
        "backends": {
            name: {
                "tracker": each.tracker.name,
                "flow": each.flow.name,
                "pairs": {pair.name: score_flow(each.flow, pair) for pair in pairs},
                "tracks": {
                    f"{height}x{width}": score_tracks(
                        each.tracker,
                        SceneConfig(height=height, width=width, frames=frames),
                        scenes,
                        points,
                    )
                    for height, width in sizes
                },
            }
            for name, each in backends.items()
        },
    }


def score_flow(estimator: FlowEstimator, pair: FlowPair) -> dict[str, float]:
    """End-point error, and how far forward and backward flow are from undoing each other."""
    video, truth = pair.video(), pair.truth()
    if truth.shape[:2] != video.shape[1:3]:
        raise UserError(f"{pair.flow} is of another size than {pair.before}: copy them again")
    estimator.estimate(video)  # compiles, where there is something to compile
    (_, forward), seconds = timed(lambda: estimator.estimate(video))
    backward = estimator.estimate(video[::-1])[1]
    errors = end_point_errors(forward, truth)
    if not len(errors):
        raise UserError(f"{pair.flow} knows no flow anywhere: leave it out")
    return {
        "end_point_error": float(errors.mean()),
        "median_error": float(np.median(errors)),
        "forward_backward": float(np.median(forward_backward_errors(forward, backward))),
        "cpu_seconds": seconds,
    }


def score_tracks(
    tracker: PointTracker, config: SceneConfig, scenes: int, points: int
) -> dict[str, Any]:
    """Tracks of the corners of held-out scenes against the truth, and back to the start again."""
    size = config.height, config.width
    counts, seconds = [], []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + scenes):
        video = render_scene(seed, config).video
        corners = detect_keypoints(video[0], points)
        tracks, spent = timed(lambda v=video, c=corners: tracker.track(v, c))
        seconds.append(spent)
        returned = tracker.track(np.ascontiguousarray(video[::-1]), tracks.points[:, -1])
        counts.append(count_tracks(tracks, true_tracks(seed, config, corners), size, returned))
    # The first also compiles, where there is something to compile.
    return track_scores(counts) | {"cpu_seconds": float(np.mean(seconds[1:] or seconds))}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the CPU seconds of all threads of this process that it took."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def tables(report: dict[str, Any]) -> list[str]:
    """Lines for people, in Markdown."""
    backends = report["backends"]
    lines = [f"{name}: {each['tracker']}; {each['flow']}" for name, each in backends.items()]
    sections = (("pairs", "flow", FLOW_COLUMNS), ("tracks", "tracks", TRACK_COLUMNS))
    for key, title, columns in sections:
        if not any(each[key] for each in backends.values()):
            continue
        lines += ["", f"| {title} | backend | " + " | ".join(columns.values()) + " |"]
        lines.append("|---|---|" + "---:|" * len(columns))
        for where in next(iter(backends.values()))[key]:
            for name, each in backends.items():
                row = [_number(each[key][where][column]) for column in columns]
                lines.append(f"| {where} | {name} | " + " | ".join(row) + " |")
    for name, each in backends.items():
        for where, scores in each["tracks"].items():
            told = ", ".join(f"{what} {count:,}" for what, count in scores["states"].items())
            lines += ["", f"states of {name}, {where}, truth as told: {told}"]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    cv2.setNumThreads(1)
    run_main(main)
