"""Tables of what `nuwa_jax.evaluation.protocol` measured.

    python -m nuwa_jax.evaluation.report NAME=DIR_OR_JSON ... [--out=FILE.md]

prints several evaluations side by side, for instance one per training stage.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from nuwa_jax.errors import UserError, run_main

# metric -> what a reader calls it, unit, decimals
METRICS = {
    "trajectory_error": ("trajectory error", "px", 2),
    "trajectory_error_fraction_of_diagonal": ("trajectory error", "% of the diagonal", 2),
    "end_point_error": ("end-point error", "px", 2),
    "object_error": ("error of other points of the object", "px", 2),
    "appearance_difference": ("appearance drift, mean difference", "of 255", 1),
    "appearance_decorrelation": ("appearance drift, 1 - NCC", "", 3),
    "background_motion": ("background motion", "px", 2),
}
_FACTOR = {"trajectory_error_fraction_of_diagonal": 100.0, "appearance_difference": 255.0}
_VIDEOS = {"drag": "drags", "no_drag": "no drags", "floor": "floor", "ceiling": "ceiling"}
_NONE = "–"


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """One evaluation as Markdown: a row per metric, a column per video, and the ratios."""
    rows = [["mean over clips [95 % interval]", *_VIDEOS.values()]]
    for name, (title, unit, decimals) in METRICS.items():
        values = metrics[name]
        cells = [
            _cell(values[video], values[f"{video}_interval"], decimals, _FACTOR.get(name, 1.0))
            for video in _VIDEOS
        ]
        rows.append([f"{title} ({unit})" if unit else title, *cells])
    lines = [_table(rows), ""]
    for name, ratio in metrics["ratios"].items():
        over = _VIDEOS[name.split("/")[1]]
        cell = _cell(ratio["value"], ratio["interval"], 3)
        lines.append(f"- trajectory error with drags / {over}: {cell}")
    lines += ["", _conditions(metrics), ""]
    return "\n".join(lines)


def comparison_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Several evaluations as Markdown: a row each, for instance one per training stage.

    Raises:
      UserError: they were not measured alike, so that their numbers cannot be compared.
    """
    if not evaluations:
        raise UserError("no evaluation to compare: name at least one as NAME=DIR")
    alike = ("height", "width", "frames", "tracker", "num_scenes", "seed")
    first_name, first = next(iter(evaluations.items()))
    for name, metrics in evaluations.items():
        for key in alike:
            if metrics[key] != first[key]:
                raise UserError(
                    f"{name} and {first_name} differ in {key} ({metrics[key]} and {first[key]}): "
                    "evaluate both alike to compare them"
                )
    rows = [
        [
            "",
            "drags (px)",
            "no drags (px)",
            "drags / no drags",
            "drags / ceiling",
            "object (px)",
            "drift (1 - NCC)",
            "background (px)",
        ]
    ]
    for name, metrics in evaluations.items():
        ratios = [metrics["ratios"][f"drag/{other}"] for other in ("no_drag", "ceiling")]
        rows.append(
            [
                name,
                _metric_cell(metrics, "trajectory_error", "drag"),
                _metric_cell(metrics, "trajectory_error", "no_drag"),
                *(_cell(ratio["value"], ratio["interval"], 2) for ratio in ratios),
                _metric_cell(metrics, "object_error", "drag"),
                _metric_cell(metrics, "appearance_decorrelation", "drag"),
                _metric_cell(metrics, "background_motion", "drag"),
            ]
        )
    for video in ("floor", "ceiling"):
        rows.append(
            [
                _VIDEOS[video],
                _metric_cell(first, "trajectory_error", video),
                *[_NONE] * 3,
                _metric_cell(first, "object_error", video),
                _metric_cell(first, "appearance_decorrelation", video),
                _metric_cell(first, "background_motion", video),
            ]
        )
    return "\n".join([_table(rows), "", _conditions(first, sampler=False), ""])


def load_metrics(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a metrics.json, or that of a folder.

    Raises:
      UserError: it is not there or is none.
    """
    path = pathlib.Path(path)
    path = path / "metrics.json" if path.is_dir() else path
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: write it with python -m nuwa_jax.evaluation.protocol --out=DIR"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not the JSON of an evaluation: {error}") from error
    missing = [name for name in (*METRICS, "ratios") if name not in metrics]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it is not that of an evaluation")
    return metrics


def _metric_cell(metrics: Mapping[str, Any], metric: str, video: str) -> str:
    values = metrics[metric]
    return _cell(values[video], values[f"{video}_interval"], METRICS[metric][2])


def _cell(
    value: float | None, interval: Sequence[float | None], decimals: int, factor: float = 1.0
) -> str:
    if value is None:
        return _NONE
    low, high = (f"{factor * end:.{decimals}f}" for end in interval)
    return f"{factor * value:.{decimals}f} [{low}, {high}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])


def _conditions(metrics: Mapping[str, Any], sampler: bool = True) -> str:
    """What has to be known for the numbers to mean something."""
    text = (
        f"{metrics['num_scenes']} held-out scenes (seed {metrics['seed']}) of "
        f"{metrics['height']}x{metrics['width']}, {metrics['frames']} frames; tracker "
        f"{metrics['tracker']}; points that are visible in the truth, frames 1 to "
        f"{metrics['frames'] - 1}, mean over points, then over clips; background motion on "
        f"{metrics['background_motion']['num_clips']} clips with a still camera."
    )
    if sampler:
        scales = ", ".join(f"{name} {scale}" for name, scale in metrics["guidance"].items())
        text += f" {metrics['steps']} sampling steps, guidance: {scales}."
        if "checkpoint" in metrics:
            stage = f", after stage {metrics['stage']}" if metrics.get("stage") else ""
            text += f" Checkpoint: {metrics['checkpoint']}{stage}."
    return text


def main(argv: Sequence[str]) -> None:
    """Compares the evaluations that are named in the arguments."""
    evaluations = {}
    for argument in argv[1:]:
        name, equals, path = argument.partition("=")
        if not equals or not name or not path:
            raise UserError(f"expected NAME=DIR, got {argument!r}: name every evaluation")
        evaluations[name] = load_metrics(path)
    table = comparison_table(evaluations)
    if flags.FLAGS.out:
        pathlib.Path(flags.FLAGS.out).write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "File for the table; it is printed as well.")
    run_main(main)
