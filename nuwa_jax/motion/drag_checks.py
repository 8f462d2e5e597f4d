"""What is wrong with a drags file. Messages, not exceptions: one reading tells of every fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nuwa_jax.motion.tracks import inside

VERSION = 1
KINDS = ("drag", "anchor", "camera")
EASES = ("linear", "in", "out", "inout")
_REQUIRED = ("id", "kind", "points")
_OPTIONAL = ("times", "start", "end", "ease", "hidden", "depth", "region")
_LARGEST = 1e9  # far beyond any picture, far below where float32 overflows


def find_faults(obj: Any) -> list[str]:
    """Every fault of the parsed JSON of a drags file, with the drag and point it is in."""
    if not isinstance(obj, dict):
        return [f"a drags file is a JSON object, got {_kind_of(obj)}"]
    if obj.get("version") != VERSION or isinstance(obj["version"], bool):
        came = repr(obj["version"]) if "version" in obj else "none"
        return [f"expected version {VERSION} of the drags file, got {came}; write it anew"]
    names = ("version", "width", "height", "frames", "fps", "drags")
    faults = _check_keys(obj, names, ())
    faults += [
        f"{name!r} is a whole number of at least {least}, got {obj[name]!r}"
        for name, least in (("width", 1), ("height", 1), ("frames", 2))
        if name in obj and not (_is_int(obj[name]) and obj[name] >= least)
    ]
    if "fps" in obj and not (_is_finite(obj["fps"]) and obj["fps"] > 0):
        faults.append(f"'fps' is a positive number, got {obj['fps']!r}")
    drags = obj.get("drags", [])
    if not isinstance(drags, list):
        return [*faults, f"'drags' is a list, got {_kind_of(drags)}"]
    if not drags and "drags" in obj:
        faults.append("there are no drags: draw at least one, or generate without a drags file")
    if faults:  # without a sound size and length nothing can be said of the drags
        return faults
    seen: set[str] = set()
    for i, drag in enumerate(drags):
        faults += _check_drag(drag, i, obj["width"], obj["height"], obj["frames"])
        if isinstance(drag, dict) and isinstance(drag.get("id"), str):
            if drag["id"] in seen:
                faults.append(f"drag {drag['id']!r} appears twice; ids are unique")
            seen.add(drag["id"])
    return faults


def polygon_area(polygon: Float[np.ndarray, "n 2"]) -> float:
    """Area in square pixels by the shoelace formula."""
    (ax, ay), (bx, by) = polygon.T, np.roll(polygon, -1, axis=0).T
    return float(abs((ax * by - bx * ay).sum()) / 2)


def _check_drag(drag: Any, index: int, width: int, height: int, frames: int) -> list[str]:
    if not isinstance(drag, dict):
        return [f"drag number {index} is a JSON object, got {_kind_of(drag)}"]
    has_id = isinstance(drag.get("id"), str) and drag["id"]
    name = f"drag {drag['id']!r}" if has_id else f"drag number {index}"
    faults = _check_keys(drag, _REQUIRED, _OPTIONAL)
    if "id" in drag and not has_id:
        faults.append(f"'id' is a text of at least one letter, got {drag['id']!r}")
    kind = drag.get("kind", "drag")
    if kind not in KINDS:
        faults.append(f"'kind' is one of {', '.join(KINDS)}, got {kind!r}")
    if "points" in drag:
        faults += _check_points(drag["points"], kind, width, height)
    for key, check in (
        ("times", lambda times: _check_times(times, drag.get("points"))),
        ("ease", _check_ease),
        ("hidden", lambda hidden: _check_hidden(hidden, frames)),
        ("depth", _check_depth),
        ("region", _check_region),
    ):
        if drag.get(key) is not None:
            faults += check(drag[key])
    faults += _check_span(drag, frames)
    return [f"{name}{'' if fault.startswith(' point') else ': '}{fault}" for fault in faults]


def _check_keys(obj: dict, required: Sequence[str], optional: Sequence[str]) -> list[str]:
    missing = [f"{key!r} is missing" for key in required if key not in obj]
    known = [*required, *optional]
    unknown = [
        f"unknown key {key!r}, known are {', '.join(known)}" for key in obj if key not in known
    ]
    return missing + unknown


def _check_points(points: Any, kind: Any, width: int, height: int) -> list[str]:
    if not isinstance(points, list):
        return [f"'points' is a list of [x, y], got {_kind_of(points)}"]
    if kind == "anchor" and len(points) != 1:
        return [f"an anchor stays still at exactly 1 point, got {len(points)}"]
    if kind != "anchor" and len(points) < 2:
        return [f"a drag needs at least 2 points, got {len(points)}; use an anchor to hold still"]
    faults = _check_pairs(points, "point")
    if not faults and not inside(np.array(points[0], np.float64), height, width):
        x, y = points[0]
        faults.append(
            f" point 0 ({x:g}, {y:g}) is outside the {width}x{height} picture; "
            "a drag must begin on something that is seen"
        )
    return faults


def _check_pairs(pairs: list, what: str) -> list[str]:
    return [
        f" {what} {i} is two finite numbers [x, y], got {_show(pair)}"
        for i, pair in enumerate(pairs)
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_finite, pair)))
    ]


def _check_times(times: Any, points: Any) -> list[str]:
    if not (isinstance(times, list) and all(map(_is_finite, times))):
        return [f"'times' is a list of finite numbers, got {_show(times)}"]
    faults = []
    if isinstance(points, list) and len(times) != len(points):
        faults.append(f"'times' has one entry per point, got {len(times)} for {len(points)} points")
    faults += [
        f" point {i + 1}: 'times' must increase, got {b:g} after {a:g}"
        for i, (a, b) in enumerate(zip(times, times[1:], strict=False))
        if b <= a
    ]
    faults += [
        f" point {i}: 'times' are in 0..1, got {time:g}"
        for i, time in enumerate(times)
        if not 0 <= time <= 1
    ]
    return faults


def _check_span(drag: dict, frames: int) -> list[str]:
    start = 0 if drag.get("start") is None else drag["start"]
    end = frames - 1 if drag.get("end") is None else drag["end"]
    faults = [
        f"{key!r} is a frame in 0..{frames - 1}, got {value!r}"
        for key, value in (("start", start), ("end", end))
        if not (_is_int(value) and 0 <= value < frames)
    ]
    if not faults and start >= end:
        faults.append(f"'start' must come before 'end', got start {start} and end {end}")
    return faults


def _check_ease(ease: Any) -> list[str]:
    return [] if ease in EASES else [f"'ease' is one of {', '.join(EASES)}, got {ease!r}"]


def _check_hidden(hidden: Any, frames: int) -> list[str]:
    if not isinstance(hidden, list):
        return [f"'hidden' is a list of [first, last] frames, got {_kind_of(hidden)}"]
    return [
        f"'hidden' interval {i} is [first, last] with 0 <= first <= last < {frames}, "
        f"got {_show(span)}"
        for i, span in enumerate(hidden)
        if not (
            isinstance(span, list)
            and len(span) == 2
            and all(map(_is_int, span))
            and 0 <= span[0] <= span[1] < frames
        )
    ]


def _check_depth(depth: Any) -> list[str]:
    return [] if _is_finite(depth) else [f"'depth' is a finite number, got {depth!r}"]


def _check_region(region: Any) -> list[str]:
    if not isinstance(region, list) or len(region) < 3:
        return [f"'region' is a polygon of at least 3 [x, y], got {_show(region)}"]
    faults = _check_pairs(region, "point of 'region'")
    if not faults and polygon_area(np.array(region, np.float64)) == 0:
        faults.append("'region' encloses no area")
    return faults


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= _LARGEST


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
