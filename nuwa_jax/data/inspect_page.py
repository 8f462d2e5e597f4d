"""One self-contained HTML page of clips: pictures embedded, no script, nothing from a network."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nuwa_jax.data.inspect_charts import bars, histogram, rose, shares_over_time
from nuwa_jax.data.inspect_statistics import Statistics
from nuwa_jax.motion.drawing import STATE_COLOURS, flow_wheel
from nuwa_jax.motion.tracks import TrackState

_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em auto;max-width:1300px;padding:0 1em;
color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ccc}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
figure{display:inline-block;margin:.5em;width:310px;vertical-align:top}
figcaption{font-weight:600}.note{color:#666;font-size:12px;margin:.2em 0}
svg text{font-size:11px;fill:#444}.bar{fill:#4878b0}.grid{fill:none;stroke:#ddd}
.median{stroke:#d04030;stroke-width:1.5}
.key{display:inline-block;width:.8em;height:.8em;border-radius:.4em}
.clip{border-top:1px solid #ddd;padding:.6em 0}.clip h3{margin:.2em 0;font-size:1em}
.clip div{display:inline-block;margin-right:.6em;vertical-align:top}
.clip img{display:block;height:256px;max-width:420px;object-fit:contain;object-position:left top}
.caption{font-style:italic}.fault{color:#b00020}
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """A clip as it is shown.

    Attributes:
      name: of the source.
      caption: what is seen.
      facts: one line.
      pictures: (title, data URI) in order.
      fault: what is wrong with it, if anything.
    """

    name: str
    caption: str
    facts: str
    pictures: Sequence[tuple[str, str]]
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Rejects:
    """What was not taken.

    Attributes:
      reasons: how many there are of each.
      examples: (reason, id, detail) of some.
      unreadable: lines of the list that say nothing.
    """

    reasons: Mapping[str, int]
    examples: Sequence[tuple[str, str, str]]
    unreadable: int = 0


def make_page(
    title: str,
    totals: Mapping[str, object],
    statistics: Statistics,
    cards: Sequence[Card],
    damaged: Sequence[tuple[str, str]],
    rejects: Rejects | None,
    notes: Sequence[str],
) -> str:
    """The page.

    Args:
      title: its heading.
      totals: name to value, in order; what is known of all clips.
      statistics: of a sample of them.
      cards: the clips that are shown.
      damaged: (which record, what is wrong) of those that cannot be read.
      rejects: what was not taken; None where there is no such list.
      notes: lines of explanation below the heading.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        '<table id="totals">',
        *(
            f"<tr><th>{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>"
            for name, value in totals.items()
        ),
        "</table>",
        f"<h2>Distributions over {statistics.clips:,} clips</h2>",
        *_charts(statistics),
        *_rejects(rejects),
        *_damaged(damaged),
        f"<h2>{len(cards)} clips</h2>",
        _legend(),
        *(_card(card) for card in cards),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def still(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """The data URI of a picture (WebP)."""
    return animation([picture], 1.0)


def animation(frames: Sequence[UInt8[np.ndarray, "h w 3"]], fps: float) -> str:
    """The data URI of pictures shown one after the other, again and again (WebP)."""
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    more = {}
    if len(pictures) > 1:
        # Browsers play what is faster than this slowly.
        milliseconds = max(20, round(1000 / fps))
        more = dict(save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    pictures[0].save(buffer, "WEBP", quality=78, method=4, **more)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _charts(statistics: Statistics) -> list[str]:
    most = np.percentile(statistics.displacement, 95) if statistics.displacement else None
    fastest = np.percentile(statistics.speed, 95) if statistics.speed else None
    short = "% of the shorter side"
    states = [TrackState.VISIBLE, TrackState.OCCLUDED, TrackState.OUTSIDE, TrackState.UNSPECIFIED]
    return [
        histogram(statistics.tracks, "Tracks per clip", "tracks"),
        histogram(
            statistics.survival, "Tracks that are still seen in the last frame", "%", highest=100.0
        ),
        histogram(statistics.displacement, "Displacement of a track", short, highest=most),
        histogram(statistics.speed, "Speed of a track", f"{short} a second", highest=fastest),
        rose(statistics.directions, "Direction of tracks"),
        shares_over_time(
            statistics.states[:, states].astype(float),
            [state.name.lower() for state in states],
            [STATE_COLOURS.get(state, (205, 205, 205)) for state in states],
            "States of tracks, by frame",
        ),
        bars(statistics.camera, "Camera, by the motion of tracks"),
        histogram(statistics.drags, "Drags per clip, as synthesised", "drags"),
        bars(statistics.drags_on, "What the drags lie on"),
        histogram(statistics.captions, "Length of captions", "characters"),
        bars(statistics.frames_per_second, "Frames per second"),
        bars(statistics.sizes, "Sizes"),
        bars(statistics.frames, "Lengths"),
    ]


def _rejects(rejects: Rejects | None) -> list[str]:
    if rejects is None:
        return []
    rows = (
        f"<tr><td>{escape(reason)}</td><td>{escape(name)}</td><td>{escape(detail)}</td></tr>"
        for reason, name, detail in rejects.examples
    )
    unreadable = ""
    if rejects.unreadable:
        unreadable = f'<p class="fault">{rejects.unreadable:,} lines of it cannot be read</p>'
    return [
        f'<section id="rejects"><h2>{sum(rejects.reasons.values()):,} rejects</h2>',
        unreadable,
        bars(rejects.reasons, "Reasons"),
        "<table><tr><th>reason</th><th>input</th><th>detail</th></tr>",
        *rows,
        "</table></section>",
    ]


def _damaged(damaged: Sequence[tuple[str, str]]) -> list[str]:
    if not damaged:
        return []
    rows = (f"<li>{escape(which)}: {escape(fault)}</li>" for which, fault in damaged)
    return [
        f'<section id="damaged" class="fault"><h2>{len(damaged)} damaged records</h2><ul>',
        *rows,
        "</ul></section>",
    ]


def _legend() -> str:
    states = " ".join(
        '<span class="key" style="background:#{:02x}{:02x}{:02x}"></span> {}'.format(
            *colour, state.name.lower()
        )
        for state, colour in STATE_COLOURS.items()
    )
    return (
        f'<p class="note">Tracks: {states}. Drags: a ring is the handle, an arrow where it goes, '
        "dashes where it is hidden, a cross an anchor. Flow, by direction and length: "
        f'<img alt="colours of flow" style="vertical-align:middle" src="{still(flow_wheel(48))}">'
        "</p>"
    )


def _card(card: Card) -> str:
    pictures = "".join(
        f'<div><img alt="{escape(title)}" src="{escape(uri)}"><p class="note">{escape(title)}</p>'
        "</div>"
        for title, uri in card.pictures
    )
    fault = f'<p class="fault">{escape(card.fault)}</p>' if card.fault else ""
    return (
        f'<section class="clip"><h3>{escape(card.name)}</h3>'
        f'<p class="caption">{escape(card.caption)}</p><p class="note">{escape(card.facts)}</p>'
        f"{fault}{pictures}</section>"
    )


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
