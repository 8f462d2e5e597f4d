"""The unit of work: shard i of n, from a list of clips to a file of records, on any machine.

A job's folder fills up in steps, each of which does nothing where its result is there already:

- `make_plan`: `plan/`, the inputs of every shard. A shard's inputs are told by their ids, so that
  they do not depend on who lists them or when.
- `write_shard`: `parts/NAME`, the records of one shard's inputs, and `parts/NAME.json`, what became
  of each input. `parts/NAME.seconds.json` says how long it took; it is the only file that differs
  from run to run.
- `nuwa_jax.data.sealing` makes the final shards of the parts.

Files appear complete or not at all, so that a process may be killed at any time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2

import nuwa_jax
from nuwa_jax.data.isolation import IsolatedPool, Lost
from nuwa_jax.data.prepare import ClipOptions, RecordMaker, Rejected, Stopwatch
from nuwa_jax.data.records import (
    SCHEMA_VERSION,
    ShardWriter,
    encode_record,
    hash_file,
    shard_name,
)
from nuwa_jax.data.sources import Input, find_video, list_inputs, shard_of, without_repeats
from nuwa_jax.data.storage import Folder
from nuwa_jax.errors import UserError

PLAN, PARTS = "plan", "parts"
_PLAN_FILE = "plan.json"

# What the bytes of a shard depend on besides the inputs and the options.
_PACKAGES = ("numpy", "opencv-python-headless", "av", "array-record", "tensorflow-datasets")

# Bytes of planned inputs held before they are written out, and so also the plan's memory.
_PLAN_BUFFER = 64 << 20


@dataclasses.dataclass(frozen=True)
class Job:
    """All that the records of a folder depend on. It can be pickled.

    Attributes:
      layout: of the csv or of the folder, one of `nuwa_jax.data.sources.LAYOUTS`.
      csv: its path or URL; "" for none.
      root: path or URL of the folder that holds the videos.
      out: path or URL of the folder for records.
      options: how clips become records.
      num_shards: to make.
      estimator: name of the tracker and the flow estimator, as `nuwa_jax.estimation` knows them.
      estimator_weights: path of their weights, "" for none.
    """

    layout: str
    csv: str
    root: str
    out: str
    options: ClipOptions
    num_shards: int = 1
    estimator: str = "lk_dis"
    estimator_weights: str = ""

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise UserError(f"--num_shards is at least 1, got {self.num_shards}")

    def versions(self) -> dict[str, str]:
        """Of this program and of the libraries that records depend on."""
        from nuwa_jax.estimation import package_versions

        packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
        return {"nuwa_jax": nuwa_jax.__version__} | packages | package_versions(self.estimator)

    def fingerprint(self, inputs_hash: str) -> str:
        """Changes with the inputs, options, programs and weights that records depend on."""
        options = dataclasses.asdict(self.options)
        estimator = (self.estimator, self.weights_hash())
        made_by = (SCHEMA_VERSION, self.versions(), options, estimator)
        return _sha256(json.dumps([inputs_hash, made_by]))

    @functools.cached_property
    def settings(self) -> str:
        """Changes with all of this that does not depend on the inputs: a part notes it."""
        return self.fingerprint("")

    def weights_hash(self) -> str:
        """SHA-256 of the estimator's weights, a file or a folder of files; "" for none."""
        if not self.estimator_weights:
            return ""
        path = Path(self.estimator_weights)
        if path.is_dir():
            files = sorted(each for each in path.rglob("*") if each.is_file())
            return _sha256("".join(hash_file(each) for each in files))
        if not path.is_file():
            raise UserError(f"--estimator_weights={path} is not there: name a file or a folder")
        return hash_file(path)


def make_plan(job: Job, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Lists the inputs and writes down which shard has which.

    Whoever needs the plan and does not find it makes it; all make the same.

    Args:
      job: whose inputs.
      check: is shown the plan before anything is written; what it raises prevents that.

    Returns:
      The plan: `inputs`, their number, `hash`, which changes with them, and where they were found.

    Raises:
      UserError: the csv or the folder is not usable.
    """
    root, plan = Folder(job.root), Folder(job.out) / PLAN
    if not root.exists():
        raise UserError(f"--root={job.root} is not a folder: name the folder that holds the videos")
    plan.make()
    buffers: dict[int, list[str]] = collections.defaultdict(list)
    digest, count, held = hashlib.sha256(), 0, 0
    with contextlib.ExitStack() as stack:
        paths: dict[int, Path] = {}

        def flush() -> None:
            for index, lines in buffers.items():
                if index not in paths:
                    name = _plan_name(index, job.num_shards)
                    paths[index] = stack.enter_context(plan.writing(name))
                with paths[index].open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            buffers.clear()

        for each in list_inputs(job.layout, job.csv or None, root):
            line = each.to_json() + "\n"
            buffers[shard_of(each, job.num_shards)].append(line)
            digest.update(line.encode())
            count, held = count + 1, held + len(line)
            if held > _PLAN_BUFFER:
                flush()
                held = 0
        for index in range(job.num_shards):
            buffers[index]  # also those that have no inputs get their file
        flush()
        made = {"inputs": count, "hash": digest.hexdigest(), **_planned_from(job)}
        if check:
            check(made)
    plan.write_text(_PLAN_FILE, json.dumps(made))
    return made


def planned_inputs(job: Job, index: int) -> list[Input]:
    """The inputs of a shard; makes the plan if it is missing.

    Raises:
      UserError: as `make_plan` and `read_plan`, or the shard's part of the plan is missing.
    """
    if read_plan(job) is None:
        make_plan(job)
    plan, name = Folder(job.out) / PLAN, _plan_name(index, job.num_shards)
    lines = plan.read_text(name)
    if lines is None:
        raise UserError(f"{plan.url}/{name} is missing: list the inputs again with --plan")
    return without_repeats([Input.from_json(line) for line in lines.split("\n") if line])


def read_plan(job: Job) -> dict[str, Any] | None:
    """What `make_plan` returned; None if there is no plan.

    Raises:
      UserError: the plan that is there is of another list, folder or number of shards.
    """
    plan = Folder(job.out) / PLAN
    made = read_json(plan, _PLAN_FILE)
    if made is None:
        return None
    for name, ours in _planned_from(job).items():
        if made.get(name) != ours:
            raise UserError(
                f"{plan.url} is a plan for --{name}={made.get(name)}, got {ours}: give all steps "
                "the same, or list the inputs anew with --plan, or name another --out"
            )
    return made


@dataclasses.dataclass(frozen=True)
class ClipTask:
    """Makes the function that a worker process calls on inputs: see `make_clip`."""

    root: str
    options: ClipOptions
    estimator: str
    weights: str

    def __call__(self) -> Callable[[Input], dict[str, Any]]:
        # Clips are what is done in parallel; threads within one would only be in each other's way.
        cv2.setNumThreads(1)
        # The estimators stand on a higher floor, and learned ones bring JAX along.
        from nuwa_jax.estimation import load_estimators

        tracker, flow = load_estimators(self.estimator, self.weights)
        maker, root = RecordMaker(self.options, tracker, flow), Folder(self.root)
        made_by = {"tracker": tracker.name, "flow": flow.name if self.options.flow_divisor else ""}
        return lambda input: make_clip(input, root, maker) | made_by


def make_clip(input: Input, root: Folder, maker: RecordMaker) -> dict[str, Any]:
    """What becomes of one input.

    Returns:
      `records`, encoded, with `frames` and `hashes` of each, or `reason` and `detail` of its
      rejection; its `path`; and `seconds` of CPU time by stage.
    """
    watch = Stopwatch()
    path = fetched = input.places[0].path if input.places else ""
    try:
        if input.fault:
            raise Rejected(*input.fault)
        try:
            place = find_video(root, input.places)
        except OSError as error:
            raise Rejected("unreadable", f"{path} cannot be looked for: {error}") from error
        if place is None:
            tried = ", ".join(dict.fromkeys(each.path for each in input.places if each.path))
            raise Rejected("missing", f"no such file under --root: {tried}")
        path = place.path
        with contextlib.ExitStack() as stack:
            try:
                with watch("fetch"):
                    file = stack.enter_context(root.reading(path))
            except OSError as error:
                raise Rejected("unreadable", f"{path} cannot be fetched: {error}") from error
            fetched = str(file)
            made = maker.make(file, input.id, input.caption, watch, place.span)
        with watch("encode"):
            encoded = [encode_record(each.record) for each in made]
        result = {
            "records": encoded,
            "frames": [each.record.frames for each in made],
            "hashes": [each.perceptual_hash.hex() for each in made],
        }
    except Rejected as error:
        # A file from a bucket lay under a name that differs from run to run.
        detail = error.detail if root.local else error.detail.replace(fetched, path)
        result = {"reason": error.reason, "detail": detail}
    except Exception as error:  # a fault of this program: counted, shown, and the run fails of it
        where = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{error} ({Path(where.filename).name}:{where.lineno})"
        result = {"reason": f"bug:{type(error).__name__}", "detail": detail}
    return {**result, "path": path, "seconds": watch.seconds}


def clip_pool(job: Job, workers: int, timeout: float) -> IsolatedPool[Input]:
    """Processes for `write_shard`; they start when there is something to do."""
    task = ClipTask(job.root, job.options, job.estimator, job.estimator_weights)
    return IsolatedPool(task, workers, timeout)


def write_shard(job: Job, index: int, pool: IsolatedPool[Input]) -> dict[str, Any]:
    """Makes shard `index` as far as it can be made without the others.

    It depends on nothing but the job and the index, and does nothing if the part is there already.

    Returns:
      What became of its inputs: `clips` that were accepted, in order, and `rejects`.
    """
    name = shard_name(index, job.num_shards)
    out, parts = Folder(job.out), Folder(job.out) / PARTS
    parts.make()
    inputs = planned_inputs(job, index)
    fingerprint = job.fingerprint(_inputs_hash(inputs, Folder(job.root)))
    stats = read_json(parts, f"{name}.json")
    if stats and stats["fingerprint"] == fingerprint and _is_there(out, parts, name, stats):
        return stats
    for suffix in (".sealed.json", ".json"):
        parts.remove(name + suffix)

    clips, rejects, made_by = [], [], {}
    seconds: collections.Counter[str] = collections.Counter()
    progress = _Progress(name, len(inputs))
    with parts.writing(name) as path:
        with ShardWriter(path) as writer:
            for input, result in pool.map(inputs):
                if isinstance(result, Lost):
                    first = input.places[0].path if input.places else ""
                    result = {"reason": result.reason, "detail": result.detail, "path": first}
                seconds.update(result.get("seconds", {}))
                entry = {"id": input.id, "path": result["path"], "position": input.position}
                if "records" in result:
                    for data in result["records"]:
                        writer.write_encoded(data)
                    clips.append(entry | {key: result[key] for key in ("frames", "hashes")})
                    made_by = {key: result[key] for key in ("tracker", "flow")}
                else:
                    rejects.append(entry | {key: result[key] for key in ("reason", "detail")})
                progress.report(len(clips), len(rejects))
        stats = {
            "name": name,
            "fingerprint": fingerprint,
            "settings": job.settings,
            **made_by,
            "bytes": path.stat().st_size,
            "sha256": hash_file(path),
            "inputs": len(inputs),
            "clips": clips,
            "rejects": rejects,
        }
    parts.write_text(f"{name}.seconds.json", json.dumps(dict(seconds)))
    parts.write_text(f"{name}.json", json.dumps(stats, ensure_ascii=False))
    return stats


def read_stats(job: Job, index: int) -> dict[str, Any]:
    """What `write_shard` said of a shard.

    Raises:
      UserError: it was not written yet, or with other options, versions or weights than the job's.
    """
    name = shard_name(index, job.num_shards)
    stats = read_json(Folder(job.out) / PARTS, f"{name}.json")
    if stats is None:
        raise UserError(
            f"shard {index} of {job.num_shards} is not there yet: run it with "
            f"--shard_index={index}, then finish"
        )
    if stats.get("settings") != job.settings:
        raise UserError(
            f"shard {index} of {job.num_shards} was made with other options, library versions or "
            "estimator weights than are given now: give every step the same, on machines with the "
            f"same libraries, or make it again with --shard_index={index}"
        )
    return stats


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """A JSON object that this program wrote; None if there is none."""
    text = folder.read_text(name)
    try:
        value = None if text is None else json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def is_sealed(out: Folder, stats: Mapping[str, Any], sealed: Mapping[str, Any]) -> bool:
    """Whether the final shard of a part is there."""
    same = sealed["fingerprint"] == stats["fingerprint"]
    return same and out.size(stats["name"]) == sealed["bytes"]


def seconds_by_stage(job: Job) -> dict[str, float]:
    """CPU seconds that the clips of all shards took, by stage."""
    total: collections.Counter[str] = collections.Counter()
    parts = Folder(job.out) / PARTS
    for index in range(job.num_shards):
        total.update(read_json(parts, f"{shard_name(index, job.num_shards)}.seconds.json") or {})
    return {stage: round(seconds, 3) for stage, seconds in sorted(total.items())}


def _is_there(out: Folder, parts: Folder, name: str, stats: Mapping[str, Any]) -> bool:
    if parts.size(name) == stats["bytes"]:
        return True
    sealed = read_json(parts, f"{name}.sealed.json")
    return sealed is not None and is_sealed(out, stats, sealed)


def _planned_from(job: Job) -> dict[str, Any]:
    return {key: getattr(job, key) for key in ("layout", "csv", "root", "num_shards")}


def _inputs_hash(inputs: Sequence[Input], root: Folder) -> str:
    """Changes with the inputs and, on a disk, with their files."""
    digest = hashlib.sha256()
    for each in inputs:
        digest.update(each.to_json().encode())
        if root.local is not None:
            place = find_video(root, each.places)
            state = place and (place.path, root.size(place.path), root.changed(place.path))
            digest.update(repr(state).encode())
    return digest.hexdigest()


def _plan_name(index: int, count: int) -> str:
    return f"inputs-{index:05d}-of-{count:05d}.jsonl"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
