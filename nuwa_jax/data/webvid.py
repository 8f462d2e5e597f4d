"""Prepares clips for training: videos and captions to ArrayRecord shards with tracks.

python -m nuwa_jax.data.webvid --csv=results.csv --root=videos --out=prepared
python -m nuwa_jax.data.webvid --root=folder --out=prepared      every video; captions: file names

The csv is WebVid's, videoid,contentUrl,duration,page_dir,name; --layout names others. A video is
looked for under --root as contentUrl, page_dir/videoid.mp4 and videoid.mp4. --csv, --root and --out
may be URLs of buckets. Every input ends either in records or, with its reason, in rejects.jsonl;
the last line of output is one JSON object with the counts. docs/data.md tells the rest.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from nuwa_jax.data.prepare import ClipOptions
from nuwa_jax.data.records import (
    DATASET,
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    shard_name,
    tfds_metadata,
)
from nuwa_jax.data.runners import RUNNERS, BeamRunner, LocalRunner, Runner
from nuwa_jax.data.sealing import find_removals, sealed_shards, unseal
from nuwa_jax.data.shards import (
    PARTS,
    PLAN,
    Job,
    clip_pool,
    make_plan,
    read_json,
    read_plan,
    read_stats,
    seconds_by_stage,
    write_shard,
)
from nuwa_jax.data.sources import LAYOUTS
from nuwa_jax.data.storage import Folder
from nuwa_jax.errors import UserError, run_main

REJECTS = "rejects.jsonl"

# Everything that belongs to shards, of whatever run.
_SHARD_FILES = f"{DATASET}-*-of-*"


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a run has failed although it came to its end: shares of the inputs, from 0 to 1.

    Attributes:
      max_rejected: that may be rejected, for whatever reason.
      max_bugs: that may be rejected because of a fault of this program (reasons `bug:...`).
    """

    max_rejected: float = 0.95
    max_bugs: float = 0.001

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise UserError(f"--{name} is a share from 0 to 1, got {value}")


def make_job(
    csv_path: str | os.PathLike[str] | None,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ClipOptions,
    layout: str | None = None,
    **settings: Any,
) -> Job:
    """A job in which most need not be said.

    Args:
      csv_path: path or URL; None takes the files of `root`.
      root: folder that holds the videos, path or URL.
      out: folder for the records, path or URL.
      options: how clips become records.
      layout: of the csv or the folder; by default webvid with a csv, folder without.
      settings: others of `Job`.
    """
    return Job(
        layout=layout or ("folder" if csv_path is None else "webvid"),
        csv="" if csv_path is None else os.fspath(csv_path),
        root=os.fspath(root),
        out=os.fspath(out),
        options=options,
        **settings,
    )


def prepare(
    job: Job,
    *,
    overwrite: bool = False,
    runner: Runner | None = None,
    limits: Limits = Limits(),
) -> dict[str, Any]:
    """Makes a folder of records from a csv, or from every video of a folder.

    Shards that are there already and were made of the same inputs with the same options are kept,
    so that an interrupted run goes on where it was.

    Args:
      job: see `make_job`.
      overwrite: replace records of other clips or options.
      runner: what calls the units of work; by default this machine's processes.
      limits: when the run counts as failed.

    Returns:
      The counts: `inputs` is the sum of `accepted` and `rejects`; `records` equals `accepted`
      unless clips have several windows; `reasons` counts rejects. `clips`, the inputs that were
      looked into, the `bytes` of the shards, and `seconds_by_stage`, CPU seconds of the runs that
      made them (no time is in the folder's manifest).

    Raises:
      UserError: the csv or the folder is not usable, `out` holds something else, or the limits were
        passed (then `rejects.jsonl` is there, but no manifest).
    """
    start(job, overwrite=overwrite)
    runner = runner or LocalRunner()
    runner.write(job, range(job.num_shards))
    return finish(job, runner, limits)


def start(job: Job, *, overwrite: bool = False) -> None:
    """Plans the job and makes its folder ready. Until `finish`, the folder is not complete.

    Raises:
      UserError: the inputs are not usable, or the folder holds something else.
    """
    out = Folder(job.out)
    out.make()
    make_plan(job, lambda plan: _check_out(job, plan, overwrite))
    out.remove(MANIFEST)


def finish(job: Job, runner: Runner, limits: Limits = Limits()) -> dict[str, Any]:
    """Removes near-duplicates of written shards, and writes the lists and the manifest.

    Returns:
      See `prepare`.

    Raises:
      UserError: shards are missing, were made of other inputs or with other options than the job's,
        or the limits were passed.
    """
    out = Folder(job.out)
    plan = _check_parts(job)
    removals = find_removals(job)
    again = [index for index, removed in enumerate(removals) if unseal(job, index, removed)]
    if again:
        runner.write(job, again)
    inputs, rejects, made_by = _outcome(job, removals)
    lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    out.write_text(REJECTS, lines)
    _check_limits(inputs, rejects, limits, f"{out.url}/{REJECTS}")
    runner.seal(job, list(enumerate(removals)))
    shards = list(sealed_shards(job))

    reasons = collections.Counter(reject["reason"] for reject in rejects)
    counts = {
        "inputs": inputs,
        "accepted": inputs - len(rejects),
        "records": sum(shard["records"] for shard in shards),
        "rejects": len(rejects),
        "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    }
    filled = [shard for shard in shards if shard["records"]]
    manifest = {
        "format": FORMAT,
        "version": SCHEMA_VERSION,
        **counts,
        "height": job.options.height,
        "width": job.options.width,
        "min_frames": min(shard["min_frames"] for shard in filled),
        "max_frames": max(shard["max_frames"] for shard in filled),
        "estimator": job.estimator,
        "estimator_weights": job.weights_hash(),
        **made_by,
        "encoders": {},
        "layout": job.layout,
        "options": dataclasses.asdict(job.options),
        "fingerprint": job.fingerprint(plan["hash"]),
        "versions": job.versions(),
        "shards": [
            {key: shard[key] for key in ("name", "records", "bytes", "sha256")} for shard in shards
        ],
    }
    described = tfds_metadata(manifest["shards"], "Clips with captions and point tracks.")
    for name, text in described.items():
        out.write_text(name, text)
    out.write_text(MANIFEST, json.dumps(manifest, indent=1))
    for folder in (out, out / PARTS, out / PLAN):
        folder.remove_temporary()
    return counts | {
        "clips": inputs - reasons["missing"] - reasons["bad_row"] - reasons["repeated"],
        "bytes": sum(shard["bytes"] for shard in shards),
        "seconds_by_stage": seconds_by_stage(job),
    }


def _check_out(job: Job, plan: Mapping[str, Any], overwrite: bool) -> None:
    """Refuses to mix with records of something else; with `overwrite`, removes them."""
    out = Folder(job.out)
    parts, old_plan = out / PARTS, read_json(out / PLAN, "plan.json")
    manifest = read_json(out, MANIFEST)
    if out.size(MANIFEST) >= 0 and (manifest is None or manifest.get("format") != FORMAT):
        raise UserError(f"{out.url}/{MANIFEST} is not of prepared clips: name another folder")
    shards = [name for folder in (out, parts) for name in folder.list(_SHARD_FILES)]
    if not shards and manifest is None:
        return
    if overwrite:
        for folder, pattern in ((out, _SHARD_FILES), (parts, _SHARD_FILES), (out / PLAN, "*")):
            for name in folder.list(pattern):
                if not name.startswith("."):  # the new plan, which is being written
                    folder.remove(name)
        return
    ours = {shard_name(index, job.num_shards) for index in range(job.num_shards)}
    others = [name for name in shards if not name.startswith(tuple(ours))]
    same = not others and old_plan is not None and old_plan["hash"] == plan["hash"]
    if manifest is not None:
        same &= manifest["fingerprint"] == job.fingerprint(plan["hash"])
    if not same:
        raise UserError(
            f"--out={out.url} holds records of other clips, options or versions: add --overwrite "
            "to replace them, or name another folder"
        )


def _check_parts(job: Job) -> dict[str, Any]:
    """The plan, of which all parts are. Nothing of a folder is changed before this is known.

    Raises:
      UserError: see `finish`.
    """
    plan = read_plan(job)
    if plan is None:
        raise UserError(f"--out={job.out} has no plan: make the shards first")
    inputs = sum(read_stats(job, index)["inputs"] for index in range(job.num_shards))
    if inputs != plan["inputs"]:
        raise UserError(
            f"the shards have {inputs} inputs, the plan has {plan['inputs']}: list the "
            "inputs again with --plan, then make the shards again (those that are right are kept)"
        )
    return plan


def _outcome(
    job: Job, removals: Sequence[Sequence[tuple[int, str]]]
) -> tuple[int, list[dict[str, str]], dict[str, str]]:
    """How many inputs there were, those without a record in the order of the list, and by whom.

    Raises:
      RuntimeError: an input is in none of records and rejects, or in both.
    """
    inputs, rejects, made_by = 0, [], {}
    for index, removed in enumerate(removals):
        stats = read_stats(job, index)
        ends = [each["position"] for each in stats["clips"] + stats["rejects"]]
        if len(ends) != stats["inputs"] or len(set(ends)) != len(ends):
            raise RuntimeError(f"inputs of {stats['name']} were lost or counted twice")
        inputs += len(ends)
        rejects += stats["rejects"]
        for clip, detail in removed:
            entry = {key: stats["clips"][clip][key] for key in ("id", "path", "position")}
            rejects.append(entry | {"reason": "duplicate", "detail": detail})
        if stats["clips"]:
            made_by = {key: stats[key] for key in ("tracker", "flow")}
    rejects.sort(key=lambda reject: reject["position"])
    keys = ("id", "path", "reason", "detail")
    return inputs, [{key: reject[key] for key in keys} for reject in rejects], made_by


def _check_limits(
    inputs: int, rejects: Sequence[Mapping[str, str]], limits: Limits, where: str
) -> None:
    if not inputs:
        raise UserError("there are no inputs: nothing was prepared")
    bugs = [reject for reject in rejects if reject["reason"].startswith("bug:")]
    if len(bugs) > limits.max_bugs * inputs:
        first = bugs[0]
        raise UserError(
            f"a fault of this program rejected {len(bugs)} of {inputs} inputs, such as "
            f"{first['id']} ({first['reason']}: {first['detail']}): see {where}; report it, or "
            "raise --max_bugs"
        )
    if len(rejects) == inputs or len(rejects) > limits.max_rejected * inputs:
        reasons = collections.Counter(reject["reason"] for reject in rejects)
        reason = reasons.most_common(1)[0][0]
        first = next(reject for reject in rejects if reject["reason"] == reason)
        share = "all" if len(rejects) == inputs else f"{len(rejects)} of"
        raise UserError(
            f"{share} {inputs} inputs were rejected, mostly as {reason!r} (such as {first['id']}: "
            f"{first['detail']}): see {where}; --max_rejected={limits.max_rejected:g} is allowed"
        )


def _define_flags() -> None:
    flags.DEFINE_string("csv", None, "List of clips; without it, every video under --root.")
    flags.DEFINE_string("root", None, "Folder that holds the videos.")
    flags.DEFINE_string("out", None, "Folder for shards, manifest.json and rejects.jsonl.")
    flags.DEFINE_enum("layout", None, LAYOUTS, "What the csv or the folder looks like.")
    flags.DEFINE_integer("num_shards", 1, "Shards to write.")
    flags.DEFINE_bool("overwrite", False, "Replace records of other clips or options in --out.")
    flags.DEFINE_enum("runner", "local", RUNNERS, "What calls the units of work.")
    flags.DEFINE_integer("workers", 0, "Processes of the local runner; 0: one per core.")
    flags.DEFINE_string("beam_options", "", "Options of Beam's pipeline, as on a command line.")
    flags.DEFINE_float("clip_timeout", 300.0, "Seconds after which a clip is given up.")
    flags.DEFINE_string("estimator", "lk_dis", "What follows points: lk_dis, gmflow or tapir.")
    flags.DEFINE_string("estimator_weights", "", "Weights of the estimator.")
    flags.DEFINE_bool("plan", False, "Array job, first: only list what each shard has.")
    flags.DEFINE_integer("shard_index", None, "Array job: make only this shard of --num_shards.")
    flags.DEFINE_bool("finish", False, "Array job, last: join the shards that were made.")
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for cls in (ClipOptions, Limits):
        meanings = _meanings(cls.__doc__ or "")
        for field in dataclasses.fields(cls):
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
    """Reads the flags, does what they ask for, prints the counts."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag: use --csv= --root= --out=")
    for name in ("root", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is needed: {values[name].help}")

    def built(cls: type) -> Any:
        return cls(**{field.name: values[field.name].value for field in dataclasses.fields(cls)})

    job = make_job(
        values.csv,
        values.root,
        values.out,
        built(ClipOptions),
        values.layout,
        num_shards=values.num_shards,
        estimator=values.estimator,
        estimator_weights=values.estimator_weights,
    )
    limits = built(Limits)
    if values.workers < 0:
        raise UserError(f"--workers is at least 0 (one per core), got {values.workers}")
    if not values.clip_timeout > 0:
        raise UserError(f"--clip_timeout is above 0 seconds, got {values.clip_timeout:g}")
    if (values.shard_index is not None) + values.plan + values.finish > 1:
        raise UserError("--plan, --shard_index and --finish are three steps: give one of them")
    if values.runner == "beam":
        runner = BeamRunner(shlex.split(values.beam_options), values.clip_timeout)
    else:
        runner = LocalRunner(values.workers, values.clip_timeout)

    if values.shard_index is not None:
        if not 0 <= values.shard_index < job.num_shards:
            raise UserError(
                f"--shard_index is from 0 to {job.num_shards - 1}, got {values.shard_index}"
            )
        with clip_pool(job, values.workers or os.cpu_count() or 1, values.clip_timeout) as pool:
            stats = write_shard(job, values.shard_index, pool)
        counts = {"shard": stats["name"], "inputs": stats["inputs"]}
        counts |= {"accepted": len(stats["clips"]), "rejects": len(stats["rejects"])}
    elif values.finish:
        counts = finish(job, runner, limits)
    elif values.plan:
        start(job, overwrite=values.overwrite)
        counts = read_plan(job)
    else:
        counts = prepare(job, overwrite=values.overwrite, runner=runner, limits=limits)
    print(json.dumps(counts))


if __name__ == "__main__":
    _define_flags()
    run_main(main)
