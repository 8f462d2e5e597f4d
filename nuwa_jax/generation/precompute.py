"""Adds latents and text embeddings to prepared clips: training on them runs no encoder.

python -m nuwa_jax.generation.precompute --checkpoint=DIR --records=prepared --out=latents
python train.py ... --config.data.format=latents --config.data.clips=latents \\
    --config.train.init_from=DIR

A shard that is there already is kept, so that an interrupted run goes on where it was; and
--shards=3:7 makes some of them alone, on as many machines as there are. The last machine, or a run
without --shards, completes the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Float16, UInt8

from nuwa_jax.data.records import (
    MANIFEST,
    Record,
    RecordReader,
    ShardWriter,
    hash_file,
    tfds_metadata,
)
from nuwa_jax.data.tokenizer import tokenizer_of
from nuwa_jax.data.video import read_video
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.generation.weights import Model, load_model
from nuwa_jax.models.video_ldm import VideoLDM, to_float
from nuwa_jax.training.precomputed import TEXT, encoder_hashes

PLAN = "precompute.json"
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

    Returns:
      How many `records` the folder has so far, and whether it is `complete`.

    Raises:
      UserError: the folder is not usable, the records do not fit the model, or `out` was begun
        with another model, other clips or other options.
    """
    reader = RecordReader(records)
    hashes = encoder_hashes(model.params)
    if not with_text:
        hashes.pop(TEXT, None)
    plan = {"records": reader.fingerprint, "encoders": hashes, "keep_video": keep_video}
    _begin(out, plan)
    listed = reader.manifest["shards"]
    encode = _encoder(model, TEXT in hashes, keep_video)
    first = 0
    for number, shard in enumerate(listed):
        count = shard["records"]
        if number in range(len(listed))[shards] and not (out / shard["name"]).exists():
            with ShardWriter(out / shard["name"]) as writer:
                for index in range(first, first + count):
                    writer.write(encode(reader.read(index)))
            print(f"{shard['name']}: {count} records", flush=True)
        first += count
    there = [shard for shard in listed if (out / shard["name"]).exists()]
    complete = len(there) == len(listed)
    if complete:
        _finish(out, reader.manifest, plan)
    return {"records": sum(shard["records"] for shard in there), "complete": complete}


def _begin(out: Path, plan: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / PLAN
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise UserError(
                f"--out={out} was begun with another model, other clips or other options: name "
                "another folder"
            )
    elif any(out.iterdir()):
        raise UserError(f"--out={out} holds other files: name another folder")
    path.write_text(json.dumps(plan), encoding="utf-8")


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


def _finish(out: Path, source: dict[str, Any], plan: dict[str, Any]) -> None:
    shards = []
    for shard in source["shards"]:
        path = out / shard["name"]
        shards.append({**shard, "bytes": path.stat().st_size, "sha256": hash_file(path)})
    fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    manifest = {
        **source,
        "encoders": plan["encoders"],
        "fingerprint": fingerprint,
        "shards": shards,
    }
    for name, text in tfds_metadata(shards, "Clips with tracks and latents.").items():
        (out / name).write_text(text, encoding="utf-8")
    temporary = out / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    temporary.replace(out / MANIFEST)


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
    )
    print(json.dumps(counts))


if __name__ == "__main__":
    _define_flags()
    run_main(main)
