"""Prepares clips for training: videos and captions to ArrayRecord shards with tracks.

python -m nuwa_jax.data.webvid --csv=results.csv --root=videos --out=prepared
python -m nuwa_jax.data.webvid --root=folder --out=prepared      every video; captions: file names

The csv is WebVid's: videoid,contentUrl,duration,page_dir,name. A video is looked for under --root
as contentUrl, page_dir/videoid.mp4 and videoid.mp4. Every input ends either in records or, with its
reason, in rejects.jsonl; the last line of output is one JSON object with the counts.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from absl import flags

import nuwa_jax
from nuwa_jax.data.prepare import ClipOptions, Rejected, make_records
from nuwa_jax.data.records import (
    DATASET,
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    ShardWriter,
    hash_file,
    shard_name,
    write_metadata,
)
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.motion.estimators import LucasKanadeTracker

COLUMNS = ("videoid", "contentUrl", "duration", "page_dir", "name")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")
REJECTS = "rejects.jsonl"

# Everything that belongs to shards, of whatever run.
_SHARD_FILES = f"{DATASET}-*-of-*"


@dataclasses.dataclass(frozen=True)
class Input:
    """One row of the csv, or one file of the folder.

    Attributes:
      id: `page_dir__videoid`, or the path below the folder.
      caption: what is seen.
      path: of the video; None if it was not found.
      fault: (reason, detail) if it is known without looking into the video.
    """

    id: str
    caption: str
    path: Path | None
    fault: tuple[str, str] | None = None


def prepare(
    csv_path: str | os.PathLike[str] | None,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ClipOptions,
    *,
    num_shards: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes a folder of records from a csv, or from every video of a folder.

    Shards that are there already and were made of the same inputs with the same options are kept,
    so that an interrupted run goes on where it was.

    Returns:
      The counts: `inputs` is the sum of `accepted` and `rejects`; `records` equals `accepted`
      unless clips have several windows; `reasons` counts rejects.

    Raises:
      UserError: the csv or the folder is not usable, `out` holds something else, or every input
        was rejected (then `rejects.jsonl` is there, but no manifest).
    """
    if num_shards < 1:
        raise UserError(f"--num_shards is at least 1, got {num_shards}")
    root, out = Path(root), Path(out)
    if not root.is_dir():
        raise UserError(f"--root={root} is not a folder: name the folder that holds the videos")
    inputs = list_inputs(root) if csv_path is None else read_csv(Path(csv_path), root)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made: {error.strerror}") from error
    fingerprint = _fingerprint(inputs, options)
    _check_out(out, fingerprint, num_shards, overwrite)
    for abandoned in out.glob(".*.tmp"):
        abandoned.unlink()
    (out / MANIFEST).unlink(missing_ok=True)  # from here on until the end, `out` is not complete
    shards = [write_shard(inputs, i, num_shards, out, options) for i in range(num_shards)]
    return _finish(out, shards, options, fingerprint)


def read_csv(path: Path, root: Path) -> list[Input]:
    """The rows of a WebVid csv.

    Raises:
      UserError: it cannot be read, lacks a column or has no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            missing = [column for column in COLUMNS if column not in columns]
            if missing:
                raise UserError(
                    f"{path} lacks the column {', '.join(missing)} (it has: {', '.join(columns)}): "
                    f"its first line must name {','.join(COLUMNS)}"
                )
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv={path} cannot be read: {error}") from error
    if not rows:
        raise UserError(f"{path} has no rows: nothing to prepare")
    inputs = []
    for number, row in enumerate(rows, 2):
        values = {column: (row[column] or "").strip() for column in COLUMNS}
        if not values["videoid"]:
            fault = ("bad_row", f"row {number} of {path.name} has no videoid")
            inputs.append(Input(f"row {number}", values["name"], None, fault))
            continue
        parts = (values["page_dir"], values["videoid"])
        name = "__".join(part for part in parts if part)
        inputs.append(Input(name, values["name"], _find(root, values)))
    return _without_repeats(inputs)


def list_inputs(root: Path) -> list[Input]:
    """Every video file below a folder, in the order of their names; hidden ones are left out.

    Raises:
      UserError: there is none.
    """
    inputs = []
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        if path.suffix.lower() not in VIDEO_SUFFIXES or not path.is_file():
            continue
        if any(part.startswith(".") for part in below.parts):
            continue
        caption = " ".join(path.stem.replace("_", " ").replace("-", " ").split())
        inputs.append(Input(below.as_posix(), caption, path))
    if not inputs:
        raise UserError(
            f"--root={root} has no video files ({' '.join(VIDEO_SUFFIXES)}): name another folder, "
            "or a --csv"
        )
    return inputs


def write_shard(
    inputs: Sequence[Input], index: int, count: int, out: Path, options: ClipOptions
) -> dict[str, Any]:
    """Makes shard `index` of `count`, of every `count`-th input; returns what is in it.

    The unit of work on one machine or many: it depends on nothing but its arguments, writes under
    temporary names, and does nothing if the same shard is there already.
    """
    name = shard_name(index, count)
    path, stats_path = out / name, out / f"{name}.json"
    mine = inputs[index::count]
    fingerprint = _fingerprint(mine, options)
    stats = _read_stats(stats_path)
    if stats and stats["fingerprint"] == fingerprint and _size(path) == stats["bytes"]:
        return stats
    stats_path.unlink(missing_ok=True)

    tracker = LucasKanadeTracker()
    rejects: list[dict[str, str]] = []
    accepted = 0
    lengths: list[int] = []
    progress = _Progress(name, len(mine))
    with ShardWriter(path) as writer:
        for input in mine:
            try:
                if input.fault:
                    raise Rejected(*input.fault)
                if input.path is None:
                    raise Rejected("missing", "no such file under --root")
                for record in make_records(input.path, input.id, input.caption, options, tracker):
                    writer.write(record)
                    lengths.append(record.frames)
                accepted += 1
            except Rejected as error:
                rejects.append({"id": input.id, "reason": error.reason, "detail": error.detail})
            progress.report(accepted, len(rejects))
    stats = {
        "name": path.name,
        "fingerprint": fingerprint,
        "tracker": tracker.name,
        "bytes": _size(path),
        "sha256": hash_file(path),
        "inputs": len(mine),
        "accepted": accepted,
        "records": writer.records,
        "min_frames": min(lengths, default=0),
        "max_frames": max(lengths, default=0),
        "rejects": rejects,
    }
    _write_text(stats_path, json.dumps(stats, indent=1))
    return stats


def _find(root: Path, row: dict[str, str]) -> Path | None:
    tries = [row["contentUrl"], f"{row['page_dir']}/{row['videoid']}.mp4", f"{row['videoid']}.mp4"]
    for name in tries:
        parts = PurePosixPath(name)
        # A csv comes from elsewhere: it names files below the root and no others.
        if not name or parts.is_absolute() or ".." in parts.parts or "\0" in name:
            continue
        if (root / parts).is_file():
            return root / parts
    return None


def _without_repeats(inputs: Iterable[Input]) -> list[Input]:
    seen: set[str] = set()
    unique = []
    for input in inputs:
        if input.id in seen and input.fault is None:
            input = dataclasses.replace(input, fault=("repeated", "an earlier row has this id"))
        seen.add(input.id)
        unique.append(input)
    return unique


def _fingerprint(inputs: Sequence[Input], options: ClipOptions) -> str:
    """Changes with the files, captions, options and programs that the records depend on."""
    files = []
    for input in inputs:
        status = input.path.stat() if input.path else None
        size, changed = (status.st_size, status.st_mtime_ns) if status else (None, None)
        files.append((input.id, input.caption, input.fault, str(input.path), size, changed))
    made_by = (SCHEMA_VERSION, LucasKanadeTracker().name, dataclasses.asdict(options))
    return hashlib.sha256(json.dumps([files, made_by]).encode()).hexdigest()


def _check_out(out: Path, fingerprint: str, num_shards: int, overwrite: bool) -> None:
    """Refuses to mix with records of something else; with `overwrite`, removes them."""
    ours = {shard_name(i, num_shards) for i in range(num_shards)}
    others = [
        path for path in out.glob(_SHARD_FILES) if path.name.removesuffix(".json") not in ours
    ]
    old = _read_stats(out / MANIFEST)
    if (out / MANIFEST).exists() and (old is None or old.get("format") != FORMAT):
        raise UserError(f"{out / MANIFEST} is not of prepared clips: name another folder as --out")
    same = not others and (old is None or old["fingerprint"] == fingerprint)
    if overwrite:
        for path in out.glob(_SHARD_FILES):
            path.unlink()
    elif not same:
        raise UserError(
            f"--out={out} holds records of other clips or options: add --overwrite to replace "
            "them, or name another folder"
        )


def _finish(
    out: Path, shards: Sequence[dict[str, Any]], options: ClipOptions, fingerprint: str
) -> dict[str, Any]:
    rejects = [reject for shard in shards for reject in shard["rejects"]]
    reasons = collections.Counter(reject["reason"] for reject in rejects)
    lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    _write_text(out / REJECTS, lines)
    counts = {key: sum(each[key] for each in shards) for key in ("inputs", "accepted", "records")}
    counts |= {"rejects": len(rejects), "reasons": dict(reasons.most_common())}
    if counts["accepted"] + counts["rejects"] != counts["inputs"]:
        raise RuntimeError(f"inputs were lost or counted twice: {counts}")
    if not counts["records"]:
        reason = reasons.most_common(1)[0][0]
        example = next(reject for reject in rejects if reject["reason"] == reason)
        raise UserError(
            f"all {counts['inputs']} inputs were rejected, mostly as {reason!r} (such as "
            f"{example['id']}: {example['detail']}): see {out / REJECTS}"
        )
    filled = [shard for shard in shards if shard["records"]]
    packages = ("numpy", "opencv-python-headless", "av", "array-record", "tensorflow-datasets")
    manifest = {
        "format": FORMAT,
        "version": SCHEMA_VERSION,
        **counts,
        "height": options.height,
        "width": options.width,
        "min_frames": min(shard["min_frames"] for shard in filled),
        "max_frames": max(shard["max_frames"] for shard in filled),
        "tracker": filled[0]["tracker"],
        "encoders": {},
        "options": dataclasses.asdict(options),
        "fingerprint": fingerprint,
        "versions": {"nuwa_jax": nuwa_jax.__version__}
        | {package: importlib.metadata.version(package) for package in packages},
        "shards": [
            {key: shard[key] for key in ("name", "records", "bytes", "sha256")} for shard in shards
        ],
    }
    write_metadata(out, manifest["shards"], "Clips with captions and point tracks.")
    _write_text(out / MANIFEST, json.dumps(manifest, indent=1))
    return counts


class _Progress:
    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._start = self._last = time.monotonic()

    def report(self, accepted: int, rejected: int) -> None:
        """One line every ten seconds, and one at the end."""
        now, done = time.monotonic(), accepted + rejected
        if now - self._last < 10 and done < self._total:
            return
        self._last = now
        pace = (now - self._start) / done
        print(
            f"{self._name}: {done}/{self._total} clips, {rejected} rejected, {pace:.2f} s a clip, "
            f"{pace * (self._total - done):.0f} s left",
            flush=True,
        )


def _read_stats(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is none or it was not written by this version."""
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return stats if isinstance(stats, dict) and "fingerprint" in stats else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _define_flags() -> None:
    flags.DEFINE_string("csv", None, "WebVid csv; without it, every video under --root is taken.")
    flags.DEFINE_string("root", None, "Folder that holds the videos.")
    flags.DEFINE_string("out", None, "Folder for shards, manifest.json and rejects.jsonl.")
    flags.DEFINE_integer("num_shards", 1, "Shards to write.")
    flags.DEFINE_bool("overwrite", False, "Replace records of other clips or options in --out.")
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
    meanings = _meanings(ClipOptions.__doc__ or "")
    for field in dataclasses.fields(ClipOptions):
        define[type(field.default)](field.name, field.default, meanings.get(field.name, ""))


def _meanings(docstring: str) -> dict[str, str]:
    """Attribute to description, from the docstring: help texts are written once."""
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.partition("Attributes:")[2].splitlines():
        if line.startswith("      ") and not line.startswith("       "):
            head, _, rest = line.strip().partition(": ")
            names = head.split(", ")
            meanings |= dict.fromkeys(names, rest)
        elif line.strip():
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return meanings


def main(argv: Sequence[str]) -> None:
    """Reads the flags, prepares, prints the counts."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag: use --csv= --root= --out=")
    for name in ("root", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is needed: {values[name].help}")
    options = ClipOptions(
        **{field.name: values[field.name].value for field in dataclasses.fields(ClipOptions)}
    )
    counts = prepare(
        values.csv,
        values.root,
        values.out,
        options,
        num_shards=values.num_shards,
        overwrite=values.overwrite,
    )
    print(json.dumps(counts))


if __name__ == "__main__":
    _define_flags()
    run_main(main)
