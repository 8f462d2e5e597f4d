"""Adds latents and text embeddings to prepared clips: training on them runs no encoder.

python -m nuwa_jax.generation.precompute --checkpoint=DIR --records=prepared --out=latents
python train.py ... --config.data.format=latents --config.data.clips=latents \\
    --config.train.init_from=DIR

A shard that is there already is kept, so that an interrupted run goes on where it was; and
--shards=3:7 makes some of them alone, on as many machines as there are. The last machine, or a run
without --shards, completes the folder.

A record that cannot be read is left out: it is told, listed in left_out/ under the name of its
shard, and counted in the manifest. Too many of them (--max_damaged) end the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Float16, UInt8

from nuwa_jax.data.records import (
    MANIFEST,
    Record,
    RecordError,
    RecordReader,
    ShardWriter,
    hash_file,
    tfds_metadata,
)
from nuwa_jax.data.storage import Folder
from nuwa_jax.data.tokenizer import tokenizer_of
from nuwa_jax.data.video import VideoError, read_video
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.generation.weights import Model, load_model
from nuwa_jax.models.video_ldm import VideoLDM, to_float
from nuwa_jax.training.precomputed import TEXT, encoder_hashes

PLAN, LEFT_OUT = "precompute.json", "left_out"
FRAMES_PER_CALL = 8

Encode = Callable[[Record], Record]


def precompute(
    model: Model,
    records: Path,
    out: Path,
    *,
    with_text: bool = True,
    keep_video: bool = True,
    shards: slice = slice(None),
    max_damaged: float = 0.01,
) -> dict[str, Any]:
    """Writes the records of a prepared folder with latents (and text embeddings) to another.

    Args:
      model: whose encoders are used.
      records: the prepared folder.
      out: the folder to make.
      with_text: also make text embeddings, if the model has a text encoder. A stage that trains
        the text encoder cannot use them.
      keep_video: keep the videos, which only models that look at pictures need then.
      shards: which to make.
      max_damaged: share of all records that may be left out because they cannot be read.

    Returns:
      How many `records` the folder has so far, how many were `left_out`, and whether it is
      `complete`.

    Raises:
      UserError: the folder is not usable, the records do not fit the model, too many cannot be
        read, or `out` was begun with another model, other clips or other options.
    """
    if not 0 <= max_damaged <= 1:
        raise UserError(f"--max_damaged is a share from 0 to 1, got {max_damaged}")
    reader = RecordReader(records)
    hashes = encoder_hashes(model.params)
    if not with_text:
        hashes.pop(TEXT, None)
    plan = {"records": reader.fingerprint, "encoders": hashes, "keep_video": keep_video}
    _begin(out, plan)
    listed = reader.manifest["shards"]
    encode = _encoder(model, TEXT in hashes, keep_video)
    left_out = _LeftOut(out, reader.manifest, max_damaged)
    first = 0
    for number, shard in enumerate(listed):
        count = shard["records"]
        if number in range(len(listed))[shards] and not (out / shard["name"]).exists():
            damaged: dict[int, str] = {}
            with ShardWriter(out / shard["name"]) as writer:
                for index in range(first, first + count):
                    try:
                        writer.write(encode(reader.read(index)))
                    except (RecordError, VideoError) as error:
                        damaged[index - first] = str(error)
                        left_out.check(shard["name"], damaged)
                left_out.note(shard["name"], damaged)  # before the shard is there
            print(f"{shard['name']}: {count - len(damaged)} records", flush=True)
        first += count
    there = [
        {**shard, "records": shard["records"] - len(left_out.of(shard["name"]))}
        for shard in listed
        if (out / shard["name"]).exists()
    ]
    complete = len(there) == len(listed)
    left_out.check()
    if complete:
        _finish(out, reader.manifest, plan, there)
    records = sum(shard["records"] for shard in there)
    return {"records": records, "left_out": left_out.count(), "complete": complete}


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Writes down what the folder is to hold; of machines that do so at once, one stays."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / PLAN
    if not path.exists():
        others = [each for each in out.iterdir() if not each.name.startswith((PLAN, f".{PLAN}"))]
        # Another machine's shards come after its plan.
        if others and not path.exists():
            raise UserError(f"--out={out} holds other files: name another folder")
        if not path.exists():
            Folder(out).write_text(PLAN, json.dumps(plan))
    if json.loads(path.read_text(encoding="utf-8")) != plan:
        raise UserError(
            f"--out={out} was begun with another model, other clips or other options: name "
            "another folder"
        )


class _LeftOut:
    """Records that could not be read: by shard, the place in it and why, in a file of its own."""

    def __init__(self, out: Path, source: dict[str, Any], max_damaged: float) -> None:
        self._folder = Folder(out / LEFT_OUT)
        self._names = [shard["name"] for shard in source["shards"]]
        self._total, self._max_damaged = source["records"], max_damaged

    def of(self, shard: str) -> dict[str, str]:
        """Those of a shard that was made."""
        text = self._folder.read_text(f"{shard}.json")
        return {} if text is None else json.loads(text)

    def note(self, shard: str, damaged: Mapping[int, str]) -> None:
        """Writes down those of a shard that is about to appear."""
        if damaged:
            self._folder.make()
            self._folder.write_text(f"{shard}.json", json.dumps(damaged, indent=1))
        else:
            self._folder.remove(f"{shard}.json")

    def count(self, besides: str = "") -> int:
        """Those of all shards but one."""
        return sum(len(self.of(name)) for name in self._names if name != besides)

    def check(self, shard: str = "", damaged: Mapping[int, str] | None = None) -> None:
        """Tells the last damaged record of a shard that is being made, and fails if it is too many.

        Raises:
          UserError: that are more than `max_damaged` of all records.
        """
        count = self.count(besides=shard) + len(damaged or {})
        last = ""
        if damaged:
            place, why = list(damaged.items())[-1]
            last = f"record {place} of {shard} cannot be read: {why}"
            print(f"left out: {last}", flush=True)
        if count > self._max_damaged * self._total:
            raise UserError(
                f"{count} of {self._total} records cannot be read{last and f' ({last})'}: copy the "
                "folder again or prepare the clips again, or leave them out with a higher "
                f"--max_damaged than {self._max_damaged:g}"
            )


def _encoder(loaded: Model, with_text: bool, keep_video: bool) -> Encode:
    """Record to record with latents and, if asked for, a text embedding."""
    config, params = loaded.config, loaded.params
    model = VideoLDM.from_config(config.model)
    tokenize = tokenizer_of(config, loaded.source) if with_text else None
    encode = jax.jit(lambda p, frames: model.encode(p, to_float(frames)[:, None])[:, 0])
    encode_text = jax.jit(model.encode_text)

    def latents(video: UInt8[np.ndarray, "t h w 3"]) -> Float16[np.ndarray, "t h w c"]:
        # The encoder looks at one frame at a time. Calls are of one size, or each length of clip
        # would be compiled anew.
        t = len(video)
        padded = np.pad(video, ((0, -t % FRAMES_PER_CALL), (0, 0), (0, 0), (0, 0)), mode="edge")
        calls = np.split(padded, len(padded) // FRAMES_PER_CALL)
        parts = [np.asarray(encode(params, frames), np.float16) for frames in calls]
        return np.concatenate(parts)[:t]

    def add(record: Record) -> Record:
        model.latent_shape(record.height, record.width, record.frames)  # or the error that it is
        video, _ = read_video(record.video)
        text = None
        if tokenize is not None:
            tokens = tokenize(record.caption, config.data.text_length)
            text = np.asarray(encode_text(params, tokens[None])[0], np.float16)
        return dataclasses.replace(
            record,
            latents=latents(video),
            text_embedding=text,
            video=record.video if keep_video else b"",
            content_hash="",
        )

    return add


def _finish(
    out: Path, source: dict[str, Any], plan: dict[str, Any], made: Sequence[dict[str, Any]]
) -> None:
    shards = []
    for shard in made:
        path = out / shard["name"]
        shards.append({**shard, "bytes": path.stat().st_size, "sha256": hash_file(path)})
    records = sum(shard["records"] for shard in shards)
    fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    manifest = {
        **source,
        "records": records,
        "left_out": source["records"] - records,
        "encoders": plan["encoders"],
        "fingerprint": fingerprint,
        "shards": shards,
    }
    for name, text in tfds_metadata(shards, "Clips with tracks and latents.").items():
        Folder(out).write_text(name, text)
    Folder(out).write_text(MANIFEST, json.dumps(manifest, indent=1))


def _slice(text: str) -> slice:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdigit() or not part for part in parts):
        raise UserError(f"--shards is first:end, such as 3:7, got {text!r}")
    return slice(*(int(part) if part else None for part in parts))


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Whose encoders to use; the shipped model by default.")
    flags.DEFINE_string("records", None, "Folder of prepared clips.")
    flags.DEFINE_string("out", None, "Folder to make.")
    flags.DEFINE_bool("text", True, "Make text embeddings too, if the model encodes text.")
    flags.DEFINE_bool("keep_video", True, "Keep the videos beside the latents.")
    flags.DEFINE_string("shards", ":", "Which shards to make, first:end; by default all.")
    flags.DEFINE_float("max_damaged", 0.01, "Share of records that may be unreadable.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    values = flags.FLAGS
    if not values.records or not values.out:
        raise UserError("give --records, a folder of prepared clips, and --out, the one to make")
    counts = precompute(
        load_model(values.checkpoint),
        Path(values.records),
        Path(values.out),
        with_text=values.text,
        keep_video=values.keep_video,
        shards=_slice(values.shards),
        max_damaged=values.max_damaged,
    )
    print(json.dumps(counts))


if __name__ == "__main__":
    _define_flags()
    run_main(main)
