"""What there is to prepare: the clips of a csv or a folder, in the layouts that data sets come in.

An adapter turns one row of a csv, or the path of one file, into inputs. To read another data set,
add one to `CSV_LAYOUTS` or `FOLDER_LAYOUTS`.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec

from nuwa_jax.data.storage import Folder
from nuwa_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")

# Captions of Panda-70M are lists of a whole film's captions.
csv.field_size_limit(1 << 27)


class Place(NamedTuple):
    """Where a clip may be: a file below the root, all of it or the seconds between two times."""

    path: str
    span: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Input:
    """One clip to prepare.

    Attributes:
      id: names it; of several with one id, the first is taken.
      caption: what is seen.
      places: where it may be; the first whose file is there is taken.
      fault: (reason, detail) if it is known without looking for the video.
      position: its place in the list.
    """

    id: str
    caption: str
    places: tuple[Place, ...]
    fault: tuple[str, str] | None = None
    position: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.astuple(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Input:
        """The inverse of `to_json`."""
        name, caption, places, fault, position = json.loads(line)
        spots = tuple(Place(path, span and tuple(span)) for path, span in places)
        return cls(name, caption, spots, fault and tuple(fault), position)


class CsvLayout(NamedTuple):
    """Columns that a csv must have, and what makes inputs of a row: it raises ValueError."""

    columns: tuple[str, ...]
    inputs: Callable[[Mapping[str, str]], list[Input]]


def _webvid(row: Mapping[str, str]) -> list[Input]:
    page, name = row["page_dir"], row["videoid"]
    if not name:
        raise ValueError("no videoid")
    places = (Place(row["contentUrl"]), Place(f"{page}/{name}.mp4"), Place(f"{name}.mp4"))
    return [Input("__".join(part for part in (page, name) if part), row["name"], places)]


def _openvid(row: Mapping[str, str]) -> list[Input]:
    if not row["video"]:
        raise ValueError("no video")
    return [Input(row["video"], row["caption"], (Place(row["video"]),))]


def _panda70m(row: Mapping[str, str]) -> list[Input]:
    # A row is a film, with lists of clips: [['0:00:01.200', '0:00:05.000'], ...], ['caption', ...].
    name = row["videoID"]
    spans, captions = ast.literal_eval(row["timestamp"]), ast.literal_eval(row["caption"])
    inputs = []
    for index, (span, caption) in enumerate(zip(spans, captions, strict=True)):
        if not isinstance(caption, str):
            raise ValueError(f"caption {index} is {caption!r}, not text")
        start, end = (_seconds(each) for each in span)
        film = Place(f"{name}.mp4", (start, end))
        places = (Place(f"{name}_{index}.mp4"), Place(f"{name}/{index}.mp4"), film)
        inputs.append(Input(f"{name}_{index}", caption, places))
    return inputs


CSV_LAYOUTS = {
    "webvid": CsvLayout(("videoid", "contentUrl", "duration", "page_dir", "name"), _webvid),
    "openvid": CsvLayout(("video", "caption"), _openvid),
    "panda70m": CsvLayout(("videoID", "timestamp", "caption"), _panda70m),
}


def _folder(path: PurePosixPath) -> Input:
    caption = " ".join(path.stem.replace("_", " ").replace("-", " ").split())
    return Input(path.as_posix(), caption, (Place(path.as_posix()),))


def _ucf101(path: PurePosixPath) -> Input:
    # ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi: the class is all that is said of a clip.
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", path.parent.name).lower()
    return Input(path.as_posix(), words, (Place(path.as_posix()),))


FOLDER_LAYOUTS: dict[str, Callable[[PurePosixPath], Input]] = {
    "folder": _folder,
    "ucf101": _ucf101,
}
LAYOUTS = (*CSV_LAYOUTS, *FOLDER_LAYOUTS)


def list_inputs(layout: str, csv_url: str | None, root: Folder) -> Iterator[Input]:
    """All inputs in their order.

    Raises:
      UserError: the layout is unknown or does not fit, the csv cannot be read, lacks a column or
        has no rows with clips, or there is no video in the folder.
    """
    if layout in CSV_LAYOUTS and csv_url:
        found = _csv_inputs(csv_url, CSV_LAYOUTS[layout])
    elif layout in FOLDER_LAYOUTS and not csv_url:
        found = _folder_inputs(root, FOLDER_LAYOUTS[layout])
    else:
        raise UserError(
            f"--layout={layout} {'with' if csv_url else 'without'} --csv is nothing to read: "
            f"{', '.join(CSV_LAYOUTS)} need a csv, {', '.join(FOLDER_LAYOUTS)} none"
        )
    for position, each in enumerate(found):
        yield dataclasses.replace(each, position=position)


def shard_of(input: Input, num_shards: int) -> int:
    """The shard that an input belongs to: by its id, so that repeated ones meet in one shard."""
    return 0 if num_shards == 1 else zlib.crc32(input.id.encode()) % num_shards


def without_repeats(inputs: list[Input]) -> list[Input]:
    """The inputs of a shard; those whose id came before have a fault."""
    seen: set[str] = set()
    unique = []
    for input in inputs:
        if input.id in seen and input.fault is None:
            input = dataclasses.replace(input, fault=("repeated", "an earlier one has this id"))
        seen.add(input.id)
        unique.append(input)
    return unique


def find_video(root: Folder, places: tuple[Place, ...]) -> Place | None:
    """The first of the places whose file is below the root.

    A csv comes from elsewhere: paths that lead out of the root, and such as no disk can hold, are
    passed over.

    Raises:
      OSError: a bucket did not say whether it has a file.
    """
    for place in places:
        name, parts = place.path, PurePosixPath(place.path)
        if not name or parts.is_absolute() or ".." in parts.parts or "\0" in name or "://" in name:
            continue
        if root.size(name) >= 0:
            return place
    return None


def _csv_inputs(url: str, layout: CsvLayout) -> Iterator[Input]:
    count = 0
    try:
        opened = fsspec.open(url, "r", newline="", encoding="utf-8-sig")
    except (ValueError, ImportError) as error:  # of a kind that nothing here can open
        raise UserError(f"--csv={url} cannot be read: {error}") from error
    try:
        with opened as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            missing = [column for column in layout.columns if column not in columns]
            if missing:
                raise UserError(
                    f"{url} lacks the column {', '.join(missing)} (it has: {', '.join(columns)}): "
                    f"its first line must name {','.join(layout.columns)}"
                )
            name = PurePosixPath(url).name
            for number, row in enumerate(reader, 2):
                inputs = _row_inputs(row, layout, number, name)
                count += len(inputs)
                yield from inputs
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv={url} cannot be read: {error}") from error
    if not count:
        raise UserError(f"{url} has no rows with clips: nothing to prepare")


def _row_inputs(row: Mapping[str, Any], layout: CsvLayout, number: int, name: str) -> list[Input]:
    try:
        inputs = layout.inputs({column: (row[column] or "").strip() for column in layout.columns})
        for each in inputs:
            (each.id + each.caption).encode()  # what Python's escapes make need not be text
        return inputs
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        fault = ("bad_row", f"row {number} of {name} cannot be read: {error}")
        return [Input(f"row {number}", "", (), fault=fault)]


def _folder_inputs(root: Folder, adapter: Callable[[PurePosixPath], Input]) -> Iterator[Input]:
    found = False
    for name in root.walk():
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if path.suffix.lower() in VIDEO_SUFFIXES and not hidden:
            found = True
            yield _with_utf8_name(path, adapter)
    if not found:
        raise UserError(
            f"--root={root.url} has no video files ({' '.join(VIDEO_SUFFIXES)}): name another "
            "folder, or a --csv"
        )


def _with_utf8_name(path: PurePosixPath, adapter: Callable[[PurePosixPath], Input]) -> Input:
    """What the adapter makes of a file, or a fault: neither plan nor records hold other names."""
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        readable = os.fsencode(path).decode("utf-8", "backslashreplace")
        return Input(readable, "", (), fault=("bad_row", "the file's name is not UTF-8: rename it"))
    return adapter(path)


def _seconds(time: Any) -> float:
    parts = time.split(":") if isinstance(time, str) else ()
    if len(parts) != 3:
        raise ValueError(f"a time is written 'hours:minutes:seconds', got {time!r}")
    seconds = 3600 * int(parts[0]) + 60 * int(parts[1]) + float(parts[2])
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{time!r} is no time in a film")
    return seconds
