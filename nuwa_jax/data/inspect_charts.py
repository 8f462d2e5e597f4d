"""Charts as inline SVG: histograms, bars, states over time, a rose of directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float

_WIDTH, _HEIGHT = 300, 150
_LEFT, _BOTTOM, _TOP = 8, 18, 8
_ROW, _LABEL = 18, 110


def histogram(
    values: Sequence[float] | np.ndarray,
    title: str,
    unit: str = "",
    *,
    bins: int = 30,
    highest: float | None = None,
) -> str:
    """How often values occur, with the median as a line.

    Args:
      values: what is counted; those that are not finite are left out.
      title: above the chart.
      unit: of the values.
      bins: of equal width, from 0 or the least value to `highest`; a few whole numbers have a bin
        each instead.
      highest: what is beyond it is counted in the last bin; by default the largest value.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return _figure(title, "", _WIDTH, _HEIGHT, "nothing to count")
    low = min(0.0, float(values.min()))
    high = float(values.max()) if highest is None else highest
    high = high if high > low else low + 1.0
    if high - low <= bins and not np.mod([low, high, *values], 1).any():
        bins, low, high = int(high - low) + 1, low - 0.5, high + 0.5
    counts, _ = np.histogram(np.clip(values, low, high), bins, (low, high))
    width, step = (high - low) / bins, (_WIDTH - 2 * _LEFT) / bins
    tall = _HEIGHT - _BOTTOM - _TOP
    marks = []
    for index, count in enumerate(counts):
        if count:
            height = tall * count / counts.max()
            marks.append(
                f'<rect class="bar" x="{_LEFT + index * step:.1f}" width="{max(step - 1, 1):.1f}" '
                f'y="{_TOP + tall - height:.1f}" height="{height:.1f}">'
                f"<title>{_number(low + index * width)} to "
                f"{_number(low + (index + 1) * width)}: {count}</title></rect>"
            )
    median = float(np.median(values))
    at = _LEFT + (_WIDTH - 2 * _LEFT) * (min(median, high) - low) / (high - low)
    marks.append(
        f'<line class="median" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_TOP + tall}"/>'
    )
    more = "+" if values.max() > high else ""
    ends = (math.ceil(low), math.floor(high)) if bins == high - low else (low, high)
    marks.append(_axis_text(_LEFT, "start", ends[0]))
    marks.append(_axis_text(_WIDTH - _LEFT, "end", ends[1], more))
    note = f"{values.size:,} values, median {_number(median)} {unit}, mean {_number(values.mean())}"
    return _figure(title, "".join(marks), _WIDTH, _HEIGHT, note)


def bars(counts: Mapping[str, float], title: str, *, most: int = 12) -> str:
    """Named counts, the largest first; what comes after the first `most` is one bar."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) > most:
        rest = sum(count for _, count in ordered[most - 1 :])
        ordered = [*ordered[: most - 1], (f"{len(ordered) - most + 1} others", rest)]
    if not ordered:
        return _figure(title, "", _WIDTH, _HEIGHT, "nothing to count")
    largest = max(count for _, count in ordered) or 1
    room = _WIDTH - _LABEL - 50
    marks = []
    for row, (name, count) in enumerate(ordered):
        y = row * _ROW
        shown = name if len(name) <= 17 else name[:16] + "…"
        marks.append(
            f'<text x="{_LABEL - 4}" y="{y + 13}" text-anchor="end">{escape(shown)}'
            f"<title>{escape(name)}</title></text>"
            f'<rect class="bar" x="{_LABEL}" y="{y + 2}" height="{_ROW - 4}" '
            f'width="{room * count / largest:.1f}"/>'
            f'<text x="{_LABEL + 4 + room * count / largest:.1f}" y="{y + 13}">{count:,}</text>'
        )
    total = sum(count for _, count in ordered)
    return _figure(title, "".join(marks), _WIDTH, _ROW * len(ordered) + 4, f"{total:,} in all")


def shares_over_time(
    counts: Float[np.ndarray, "t n"],
    names: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    title: str,
) -> str:
    """Stacked shares of each frame, the first at the bottom, with a legend."""
    totals = counts.sum(axis=1, keepdims=True)
    if counts.size == 0 or not totals.any():
        return _figure(title, "", _WIDTH, _HEIGHT, "nothing to count")
    tops = np.cumsum(counts / np.maximum(totals, 1), axis=1)
    tall, step = _HEIGHT - _BOTTOM - _TOP, (_WIDTH - 2 * _LEFT) / len(counts)
    marks = []
    for frame, top in enumerate(tops):
        below = 0.0
        for index, share in enumerate(top):
            if share > below:
                marks.append(
                    f'<rect fill="{_rgb(colours[index])}" x="{_LEFT + frame * step:.1f}" '
                    f'width="{step:.1f}" y="{_TOP + tall * (1 - share):.1f}" '
                    f'height="{tall * (share - below):.1f}"><title>frame {frame}: '
                    f"{escape(names[index])} {share - below:.0%}</title></rect>"
                )
            below = share
    marks += [
        _axis_text(_LEFT, "start", 0),
        _axis_text(_WIDTH - _LEFT, "end", len(counts) - 1),
    ]
    shares = counts.sum(axis=0) / totals.sum()
    legend = " ".join(
        f'<span class="key" style="background:{_rgb(colour)}"></span>{escape(name)} {share:.1%}'
        for name, colour, share in zip(names, colours, shares, strict=True)
    )
    return _figure(title, "".join(marks), _WIDTH, _HEIGHT, legend, escaped=True)


def rose(angles: Sequence[float] | np.ndarray, title: str, *, sectors: int = 24) -> str:
    """How often directions occur, as they are seen in the picture.

    Args:
      angles: radians from the x axis, clockwise, as y points down.
      title: above the chart.
      sectors: that the circle is cut into, the first one around the x axis.
    """
    angles = np.asarray(angles, np.float64)
    if angles.size == 0:
        return _figure(title, "", _WIDTH, _HEIGHT, "nothing moves")
    width = 2 * math.pi / sectors
    index = np.floor(np.mod(angles + width / 2, 2 * math.pi) / width).astype(int) % sectors
    counts = np.bincount(index, minlength=sectors)
    centre, most = (_WIDTH / 2, _HEIGHT / 2), _HEIGHT / 2 - 4
    x0, y0 = centre
    marks = [f'<circle class="grid" cx="{x0}" cy="{y0}" r="{most}"/>']
    for sector, count in enumerate(counts):
        if count:
            # The area, not the radius, is in proportion to the count.
            radius = most * math.sqrt(count / counts.max())
            ends = [(sector + side) * width for side in (-0.5, 0.5)]
            (x1, y1), (x2, y2) = (
                (x0 + radius * math.cos(end), y0 + radius * math.sin(end)) for end in ends
            )
            marks.append(
                f'<path class="bar" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}A{radius:.1f} '
                f'{radius:.1f} 0 0 1 {x2:.1f} {y2:.1f}Z"><title>{count}</title></path>'
            )
    note = f"{angles.size:,} that move; as seen, up is up"
    return _figure(title, "".join(marks), _WIDTH, _HEIGHT, note)


def _figure(
    title: str, marks: str, width: int, height: int, note: str, *, escaped: bool = False
) -> str:
    note = note if escaped else escape(note)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{marks}</svg><p class="note">{note}</p></figure>'
    )


def _axis_text(x: float, anchor: str, value: float, more: str = "") -> str:
    return f'<text x="{x}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{_number(value)}{more}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _rgb(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
