"""Small prepared folders whose records are scenes, and batches of them; for tests."""

from __future__ import annotations

import json

import numpy as np

from nuwa_jax.data.batch import Batch
from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.data.records import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    Record,
    ShardWriter,
    hash_file,
    shard_name,
)
from nuwa_jax.data.scenes import SceneConfig, render_scene
from nuwa_jax.data.video import encode_video
from nuwa_jax.motion.perturbation import PerturbConfig
from nuwa_jax.motion.trajectory_samplers import SamplerConfig

EXACT = PerturbConfig(jitter=0.0, tail_dropout=0.0, subsample_probability=0.0)
SMALL = DataConfig(
    height=24,
    width=32,
    frames=5,
    max_drags=4,
    text_length=20,
    threads=0,
    scenes=SceneConfig(supersample=1, background_points=6),
    sampler=SamplerConfig(max_count=4),
)


def take(config, count, **options):
    batches = make_batches(config, **{"seed": 7, "batch_size": 2, **options})
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def joined(batches):
    columns = zip(*batches, strict=True)
    return Batch(*(None if each[0] is None else np.concatenate(each) for each in columns))


def assert_equal(a, b):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def make_clips(
    folder, count=7, frames=8, height=32, width=40, flow=True, name="clip", shards=1, change=None
):
    """A prepared folder whose records are scenes, so that the truth about them is known.

    `change(record, scene)` gives the record that is written instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = SceneConfig(height=height, width=width, frames=frames, supersample=1)
    listed = []
    for part in np.array_split(np.arange(count), shards):
        path = folder / shard_name(len(listed), shards)
        write_shard(path, part, config, flow, name, change)
        shard = {"name": path.name, "records": len(part), "bytes": path.stat().st_size}
        listed.append({**shard, "sha256": hash_file(path)})
    manifest = {"format": FORMAT, "version": SCHEMA_VERSION, "records": count}
    manifest |= {"min_frames": frames, "shards": listed}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return str(folder)


def write_shard(path, numbers, config, flow, name, change):
    with ShardWriter(path) as writer:
        for index in map(int, numbers):
            scene = render_scene(index, config)
            record = Record(
                source_id=str(index),
                caption=f"{name} {index}",
                video=encode_video(scene.video, 10, crf=4),
                fps=10.0,
                height=config.height,
                width=config.width,
                frames=config.frames,
                start=0.0,
                tracks=scene.tracks,
                flow=scene.flow.astype(np.float16) if flow else None,
            )
            writer.write(record if change is None else change(record, scene))


def captions(batch):
    return [bytes((row[row > 0] - 1).astype(np.uint8)).decode() for row in batch.text]
