"""Tables that people read."""

import json

import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.evaluation import report
from nuwa_jax.evaluation.protocol import VIDEOS, summarise


def metrics(drag, **changes):
    """An evaluation of three clips whose trajectory error with drags is `drag`."""
    clips = []
    for scale in (0.5, 1.0, 1.5):
        values = dict(zip(VIDEOS, (drag * scale, 8 * scale, 0.5 * scale, 10 * scale), strict=True))
        clips.append(
            {name: values for name in report.METRICS if "fraction" not in name}
            | {"background_motion": dict.fromkeys(VIDEOS, float("nan"))}
        )
    conditions = {
        "height": 48,
        "width": 64,
        "frames": 7,
        "tracker": "template-1",
        "num_scenes": 3,
        "seed": 0,
        "steps": 16,
        "guidance": {"text": 1.0, "image": None, "drag": [1.0, 2.5]},
        "checkpoint": "runs/tiny",
        "stage": "drag",
    }
    return summarise(clips, (48, 64)) | conditions | changes


def rows(table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def test_table_has_every_metric_with_interval_and_unit():
    table = report.metrics_table(metrics(2.0))
    header, rule, *body = rows(table)
    assert header[1:] == ["drags", "no drags", "floor", "ceiling"]
    assert all(len(row) == 5 for row in body) and len(body) == len(report.METRICS)
    assert body[0] == [
        "trajectory error (px)",
        "2.00 [1.00, 3.00]",
        "8.00 [4.00, 12.00]",
        "0.50 [0.25, 0.75]",
        "10.00 [5.00, 15.00]",
    ]
    assert body[1][1].startswith("2.50 [")  # 2 of the diagonal's 80 pixels, in per cent
    assert body[-1][1:] == ["–"] * 4  # nothing was measured
    assert "with drags / no drags: 0.250 [0.250, 0.250]" in table
    assert "with drags / ceiling: 0.200 [0.200, 0.200]" in table


def test_table_says_how_it_was_measured():
    table = report.metrics_table(metrics(2.0))
    for part in ("48x64", "7 frames", "template-1", "16 sampling steps", "runs/tiny", "stage drag"):
        assert part in table


def test_stages_stand_side_by_side():
    stages = {"flow": metrics(6.0, stage="flow"), "drag": metrics(2.0)}
    header, rule, *body = rows(report.comparison_table(stages))
    assert [row[0] for row in body] == ["flow", "drag", "floor", "ceiling"]
    assert [row[1].split()[0] for row in body] == ["6.00", "2.00", "0.50", "10.00"]
    assert [row[3].split()[0] for row in body] == ["0.75", "0.25", "–", "–"]
    assert all(len(row) == len(header) for row in body)


@pytest.mark.parametrize("change", [{"tracker": "other"}, {"seed": 5}, {"height": 96}])
def test_what_was_measured_differently_is_not_compared(change):
    with pytest.raises(UserError, match=next(iter(change))):
        report.comparison_table({"a": metrics(2.0), "b": metrics(2.0, **change)})


def test_metrics_are_read_from_a_folder_or_a_file(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics(2.0)))
    assert report.load_metrics(tmp_path) == report.load_metrics(tmp_path / "metrics.json")


@pytest.mark.parametrize("text", [None, "{", '{"height": 3}'])
def test_what_is_no_evaluation_is_named(tmp_path, text):
    path = tmp_path / "metrics.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="metrics.json"):
        report.load_metrics(path)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(UserError, match="NAME=DIR"):
        report.comparison_table({})
