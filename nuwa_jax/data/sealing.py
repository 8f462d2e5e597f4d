"""From parts to final shards: what repeats a clip of any shard is left out.

- `find_removals`: near-duplicates among all shards' clips, in the order of the list.
- `seal_shard`: `NAME`, the part without the duplicates, and `parts/NAME.sealed.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from nuwa_jax.data.filters import find_duplicates
from nuwa_jax.data.records import ShardWriter, hash_file, shard_name
from nuwa_jax.data.shards import PARTS, Job, is_sealed, read_json, read_stats
from nuwa_jax.data.storage import Folder


def find_removals(job: Job) -> list[list[tuple[int, str]]]:
    """For each shard, which of its accepted clips repeat one of any shard, and what they repeat.

    Returns:
      Per shard, (index among its clips, one line) of each clip to drop.
    """
    removals: list[list[tuple[int, str]]] = [[] for _ in range(job.num_shards)]
    if job.options.max_distance < 0:
        return removals
    # Of ten million clips there is no more in memory than this.
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    hashes = bytearray()
    for shard in range(job.num_shards):
        for number, clip in enumerate(read_stats(job, shard)["clips"]):
            ids.append(clip["id"])
            places.append((clip["position"], shard, number))
            hashes += bytes.fromhex(clip["hashes"][0])  # a clip is known by its first window
    table = np.array(places, np.int64).reshape(-1, 3)
    order = np.argsort(table[:, 0])
    ordered = np.frombuffer(bytes(hashes), np.uint8).reshape(-1, 16)[order]
    for index, (original, bits) in find_duplicates(ordered, job.options.max_distance).items():
        _, shard, number = table[order[index]].tolist()
        removals[shard].append((number, f"{bits} bits from {ids[order[original]]}"))
    return [sorted(each) for each in removals]


def seal_shard(job: Job, index: int, removed: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Makes the final shard of a part: without the clips that are to be removed.

    Returns:
      What is in it: `records`, `bytes`, `sha256`, `rejects` of duplicates.

    Raises:
      RuntimeError: the part is gone, and the shard that was made of it lacks other clips.
    """
    name = shard_name(index, job.num_shards)
    out, parts = Folder(job.out), Folder(job.out) / PARTS
    stats = read_stats(job, index)
    removed = [list(each) for each in removed]
    sealed = read_json(parts, f"{name}.sealed.json")
    if sealed and is_sealed(out, stats, sealed) and sealed["removed"] == removed:
        parts.remove(name)
        return sealed
    drop = {clip for clip, _ in removed}
    frames = [clip["frames"] for i, clip in enumerate(stats["clips"]) if i not in drop]
    sealed = {
        "name": name,
        "fingerprint": stats["fingerprint"],
        "removed": removed,
        "records": sum(len(each) for each in frames),
        "min_frames": min((n for each in frames for n in each), default=0),
        "max_frames": max((n for each in frames for n in each), default=0),
    }
    if parts.size(name) != stats["bytes"]:
        raise RuntimeError(f"{parts.url}/{name} is not there any more: run write_shard again")
    # The plan of the end is written before the part goes, so that a kill between them loses
    # neither: what is sealed is known by the size of the final file.
    if not drop:
        sealed |= {"bytes": stats["bytes"], "sha256": stats["sha256"]}
        parts.write_text(f"{name}.sealed.json", json.dumps(sealed))
        parts.move(name, out, name)
        return sealed
    owners = [i for i, clip in enumerate(stats["clips"]) for _ in clip["frames"]]
    with parts.reading(name) as source, out.writing(name) as path:
        reader = ArrayRecordDataSource([os.fspath(source)])
        with ShardWriter(path) as writer:
            for record, owner in enumerate(owners):
                if owner not in drop:
                    writer.write_encoded(reader[record])
        sealed |= {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        parts.write_text(f"{name}.sealed.json", json.dumps(sealed))
    parts.remove(name)
    return sealed


def unseal(job: Job, index: int, removed: Sequence[tuple[int, str]]) -> bool:
    """Forgets a shard that was sealed without other clips than these; it must be written again."""
    name = shard_name(index, job.num_shards)
    out, parts = Folder(job.out), Folder(job.out) / PARTS
    sealed = read_json(parts, f"{name}.sealed.json")
    stats = read_json(parts, f"{name}.json")
    if not (sealed and stats) or sealed["removed"] == [list(each) for each in removed]:
        return False
    if parts.size(name) != stats["bytes"]:
        parts.remove(f"{name}.json")
    parts.remove(f"{name}.sealed.json")
    out.remove(name)
    return parts.size(f"{name}.json") < 0


def sealed_shards(job: Job) -> Iterator[dict[str, Any]]:
    """What `seal_shard` said of every shard."""
    parts = Folder(job.out) / PARTS
    for index in range(job.num_shards):
        name = shard_name(index, job.num_shards)
        sealed = read_json(parts, f"{name}.sealed.json")
        if sealed is None:
            raise RuntimeError(f"shard {index} was not sealed")
        yield sealed
