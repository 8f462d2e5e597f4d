"""Batches for training: clips from scenes and from records, drags made from their tracks.

Element i of the stream is a pure function of (seed, i), whatever the batch size, the number of
threads and the number of hosts; so one integer, the index of the next element, is the whole state
of the iteration. Nothing is ever filtered out while reading, as that would make element i depend
on those before it: a record that cannot be read is replaced by another one, and counted.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int

from nuwa_jax.data.batch import Batch
from nuwa_jax.data.records import Record, RecordError, RecordReader
from nuwa_jax.data.scenes import HELD_OUT_SEED, Scene, SceneConfig, render_scene
from nuwa_jax.data.tokenizer import load_tokenizer
from nuwa_jax.data.video import PointTransform, VideoError, read_video, resize_video
from nuwa_jax.errors import UserError
from nuwa_jax.motion.camera_motion import CameraConfig
from nuwa_jax.motion.drag_synthesis import PARTS, DragsOn, DragSynthesis, synthesise_drags
from nuwa_jax.motion.estimators import DISFlow
from nuwa_jax.motion.perturbation import PerturbConfig
from nuwa_jax.motion.schedules import at_step, build_config
from nuwa_jax.motion.tracks import Tracks, TrackState, inside
from nuwa_jax.motion.trajectory_samplers import SamplerConfig

# Records to try in the place of a damaged one before giving up.
_MAX_REPLACEMENTS = 16

# The order of records and the choices within an element are random streams of one seed; these
# numbers keep them apart.
_ORDER_STREAM = 1
_ELEMENT_STREAM = 2

_ENDLESS = 1 << 48  # elements; grain wants a length


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a batch is made of.

    Attributes:
      height, width: of the video in pixels.
      frames: of every clip.
      fps: frames per second of scenes. Clips keep the rate that they were prepared with.
      max_drags: k, the number of drags to which a clip is padded.
      text_length: l, the number of tokens to which a caption is padded or cut.
      tokenizer: files of CLIP's vocabulary, where the model's text encoder is CLIP's: a folder with
        vocab.json and merges.txt, or OpenCLIP's .txt.gz; "" makes tokens of bytes.
      scenes_weight, clips_weight: shares of elements that are scenes and real clips.
      clips: folder that `python -m nuwa_jax.data.webvid` made; "" for none.
      threads: that make batches; 0 makes them when they are asked for.
      prefetch: batches made ahead, at least.
      scenes: what scenes look like. Size, frames and fps are always those above.
      sampler: which tracks become drags.
      perturb: how imprecise drags are.
      drags_on: how often drags lie on objects, on the background, and on both.
      camera: how background and objects are told apart in clips.
    """

    height: int = 64
    width: int = 64
    frames: int = 8
    fps: float = 8.0
    max_drags: int = 8
    text_length: int = 64
    tokenizer: str = ""
    scenes_weight: float = 1.0
    clips: str = ""
    clips_weight: float = 0.0
    threads: int = 2
    prefetch: int = 4
    scenes: SceneConfig = SceneConfig()
    sampler: SamplerConfig = SamplerConfig()
    perturb: PerturbConfig = PerturbConfig()
    drags_on: DragsOn = DragsOn()
    camera: CameraConfig = CameraConfig()

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "max_drags", "text_length"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is at least 1, got {getattr(self, name)}")
        if not self.fps > 0:
            raise UserError(f"data.fps is above 0, got {self.fps}")
        for name in ("scenes_weight", "clips_weight", "threads", "prefetch"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} is at least 0, got {getattr(self, name)}")
        if self.scenes_weight + self.clips_weight <= 0:
            raise UserError(
                "data.scenes_weight and data.clips_weight are both 0: nothing to train on; set one"
            )
        if self.clips_weight > 0 and not self.clips:
            raise UserError(
                "data.clips_weight is set but data.clips is not: name a folder made by "
                "python -m nuwa_jax.data.webvid"
            )
        if self.sampler.most_drags > self.max_drags:
            raise UserError(
                f"data.sampler.max_count {self.sampler.most_drags} is more than data.max_drags "
                f"{self.max_drags}: drags would not fit"
            )
        size = {name: getattr(self, name) for name in ("height", "width", "frames", "fps")}
        object.__setattr__(self, "scenes", dataclasses.replace(self.scenes, **size))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DataConfig:
        """From the `data` part of a config; what it does not name keeps its default.

        Raises:
          UserError: an entry is unknown or its value makes no sense.
        """
        values = dict(config)
        if "scenes" in values:
            values["scenes"] = build_config(
                SceneConfig, values["scenes"], "data.scenes", schedules=False
            )
        synthesis = DragSynthesis.from_config(values)
        values |= {name: getattr(synthesis, name) for name in PARTS}
        return build_config(cls, values, "data", schedules=False)

    @property
    def synthesis(self) -> DragSynthesis:
        """How drags are made of tracks."""
        return DragSynthesis(**{name: getattr(self, name) for name in PARTS})


class Batches(Iterator[Batch]):
    """The endless stream of batches that `make_batches` starts.

    Attributes:
      next_index: the index of the first element that was not yet drawn; starting again at
        `start_index=next_index` goes on exactly here.
      fingerprint: of the records that are read, "" for none. Element i is the same only while this
        is: keep it beside `next_index`.
    """

    def __init__(
        self, elements: _Elements, config: DataConfig, batch_size: int, start: int
    ) -> None:
        dataset = grain.MapDataset.source(elements).batch(
            elements.local_batch_size, drop_remainder=True, batch_fn=_stack
        )
        # Batched before the threads, so that a thread makes whole batches and their order is kept.
        threads = config.threads
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(config.prefetch, threads) * bool(threads)
        )
        self._batches = iter(dataset.to_iter_dataset(options))
        self._batch_size = batch_size
        self._elements = elements
        self.next_index = start
        self.fingerprint = elements.fingerprint

    @property
    def num_replaced(self) -> int:
        """Elements, of those made so far, whose record could not be read and was replaced."""
        return self._elements.num_replaced

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.next_index += self._batch_size
        return batch

    def close(self) -> None:
        """Stops the threads."""
        self._batches.close()


def make_batches(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    start_index: int = 0,
    shard: int = 0,
    num_shards: int = 1,
    with_flow: bool = False,
    schedule_start: int = 0,
) -> Batches:
    """The stream of batches, from the element `start_index` on.

    Batch n is made of elements `start_index + n * batch_size` and on. Of each batch, shard s of S
    yields the s-th of S equal blocks: all shards' batches concatenated are the batch of one shard.

    Args:
      config: what a batch is made of.
      seed: of all randomness; other seeds give unrelated streams.
      batch_size: of all shards together.
      start_index: element at which to start: the state of an earlier iteration, its `next_index`.
      shard: which block of every batch to yield, usually `jax.process_index()`.
      num_shards: usually `jax.process_count()`.
      with_flow: fill `Batch.flow`.
      schedule_start: element at which step 0 of the config's schedules is, such as the first one
        of a stage. Where there are schedules, element i also depends on this and on `batch_size`.

    Raises:
      UserError: the batch does not divide among shards, or the clips cannot be opened: there are
        none, a shard is not what the manifest says, or they have fewer frames than are asked for.
    """
    if batch_size < 1 or num_shards < 1 or batch_size % num_shards:
        raise UserError(
            f"a batch of {batch_size} does not divide among {num_shards} hosts: "
            "make batch_size a multiple of the number of hosts"
        )
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard is in 0 .. {num_shards - 1}, got {shard}")
    if start_index < 0 or seed < 0:
        raise ValueError(f"start_index and seed are at least 0, got {start_index} and {seed}")
    elements = _Elements(
        config, seed, batch_size, start_index, shard, num_shards, with_flow, schedule_start
    )
    return Batches(elements, config, batch_size, start_index)


def to_device(batch: Batch, sharding: jax.sharding.Sharding | None = None) -> Batch:
    """The batch as arrays on devices; with a sharding, each host gives its block of the batch."""
    if sharding is None:
        return jax.device_put(batch)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )


def held_out_scene(index: int, config: DataConfig) -> Scene:
    """Scene `index` of those that training never sees."""
    if index < 0:
        raise ValueError(f"index of a held-out scene is at least 0, got {index}")
    return render_scene(HELD_OUT_SEED + index, config.scenes)


@dataclasses.dataclass(frozen=True)
class _Clip:
    """What scenes and records have in common."""

    video: np.ndarray
    tracks: Tracks
    groups: Int[np.ndarray, " k"] | None
    flow: Float[np.ndarray, "t h w 2"] | None
    caption: str
    fps: float


class _Elements:
    """A source for grain: position j of this shard is an element of the stream."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        batch_size: int,
        start: int,
        shard: int,
        num_shards: int,
        with_flow: bool,
        schedule_start: int,
    ) -> None:
        self._config = config
        self._schedule_start = schedule_start
        self._seed = seed
        self._batch_size = batch_size
        self._start = start
        self._shard = shard
        self._with_flow = with_flow
        self.local_batch_size = batch_size // num_shards
        self._tokenize = load_tokenizer(config.tokenizer)
        self._clips_share = config.clips_weight / (config.clips_weight + config.scenes_weight)
        self._reader = _open_clips(config) if config.clips_weight else None
        self.fingerprint = self._reader.fingerprint if self._reader else ""
        if self._reader:
            state = np.random.SeedSequence([seed, _ORDER_STREAM]).generate_state(1)
            # Every epoch has its own order; grain computes position i of it without a table.
            self._order = (
                grain.MapDataset.range(len(self._reader)).shuffle(seed=int(state[0])).repeat()
            )
        self._lock = threading.Lock()
        self._reported: set[int] = set()
        self.num_replaced = 0

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, position: int) -> Batch:
        batch, row = divmod(int(position), self.local_batch_size)
        row += self._shard * self.local_batch_size
        return self._element(self._start + batch * self._batch_size + row)

    def _element(self, index: int) -> Batch:
        """Element `index` of the stream: a batch without its first axis."""
        config = self._config
        rng = np.random.default_rng([self._seed, _ELEMENT_STREAM, index])
        # Clips are spread evenly: after n elements, floor(n * share) of them were clips.
        clips_before = int(index * self._clips_share)
        if int((index + 1) * self._clips_share) > clips_before:
            clip = self._prepared_clip(clips_before, rng)
        else:
            clip = self._scene(rng)
        step = max(index - self._schedule_start, 0) // self._batch_size
        drags = _synthesise_drags(clip, rng, config, step).pad(config.max_drags)
        return Batch(
            video=clip.video,
            flow=None if clip.flow is None else clip.flow.astype(np.float16),
            points=drags.points,
            state=drags.state,
            text=self._tokenize(clip.caption, config.text_length),
            fps=np.float32(clip.fps),
        )

    def _scene(self, rng: np.random.Generator) -> _Clip:
        scene = render_scene(int(rng.integers(HELD_OUT_SEED)), self._config.scenes)
        return _Clip(
            video=scene.video,
            tracks=scene.tracks,
            groups=scene.track_object,
            flow=scene.flow if self._with_flow else None,
            caption=scene.caption,
            fps=scene.fps,
        )

    def _prepared_clip(self, number: int, rng: np.random.Generator) -> _Clip:
        record, first, video = self._read(int(self._order[number]), rng.random())
        return _cut_to_size(record, first, video, self._config, self._with_flow)

    def _read(self, index: int, where: float) -> tuple[Record, int, np.ndarray]:
        """The record `index`, or the next one that is not damaged, and a window of its video.

        The window begins at `where` of its possible places, in [0, 1).
        """
        frames = self._config.frames
        count = len(self._reader)
        tries = min(count, _MAX_REPLACEMENTS + 1)
        for candidate in range(index, index + tries):
            try:
                record = self._reader.read(candidate % count)
                first = int(where * (record.frames - frames + 1))
                video, _ = read_video(record.video, max_frames=first + frames)
                if video.shape[:3] != (first + frames, record.height, record.width):
                    raise RecordError(f"its video has shape {video.shape}")
                return record, first, video[first:]
            except (RecordError, VideoError) as error:
                self._count_replaced(candidate % count, error)
        raise RecordError(
            f"{tries} records of {self._config.clips} in a row cannot be read: prepare the clips "
            "again"
        )

    def _count_replaced(self, index: int, error: UserError) -> None:
        with self._lock:
            self.num_replaced += 1
            if index in self._reported:
                return
            self._reported.add(index)
        logging.warning("record %d is replaced by the next one: %s", index, error)


def _open_clips(config: DataConfig) -> RecordReader:
    reader = RecordReader(config.clips)
    if reader.frames < config.frames:
        raise UserError(
            f"clips in {config.clips} have {reader.frames} frames or more, data.frames is "
            f"{config.frames}: prepare them with --min_frames={config.frames}"
        )
    return reader


def _cut_to_size(
    record: Record,
    first: int,
    video: np.ndarray,
    config: DataConfig,
    with_flow: bool,
) -> _Clip:
    """The window of a record that begins at frame `first`, in the size that the config asks for."""
    window = slice(first, first + config.frames)
    height, width = config.height, config.width
    video, transform = resize_video(video, height, width)
    points, state = transform(record.tracks.points[:, window]), record.tracks.state[:, window]
    known = state != TrackState.UNSPECIFIED
    # What was seen may lie in the part that another shape of picture cuts off.
    state = np.where(known & ~inside(points, height, width), TrackState.OUTSIDE, state)
    flow = None
    if with_flow:
        if record.flow is None:
            flow = DISFlow().estimate(video)
        else:
            flow = _resize_flow(record.flow[window], record, transform, height, width)
        flow[0] = 0  # the first frame of a window has none before it
    return _Clip(video, Tracks(points, state), None, flow, record.caption, record.fps)


def _resize_flow(
    flow: Float[np.ndarray, "t h w 2"],
    record: Record,
    transform: PointTransform,
    height: int,
    width: int,
) -> Float[np.ndarray, "t h w 2"]:
    # From the new picture to the record's, and from there to the reduced size of the flow.
    scale, offset = np.array(transform.scale), np.array(transform.offset)
    reduced = np.array([flow.shape[2] / record.width, flow.shape[1] / record.height])
    shift = (0.5 - offset / scale) * reduced - 0.5
    matrix = np.concatenate([np.diag(reduced / scale), shift[:, None]], axis=1)
    resized = [
        cv2.warpAffine(
            frame.astype(np.float32),
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        for frame in flow
    ]
    return np.stack(resized) * scale.astype(np.float32)


def _synthesise_drags(
    clip: _Clip, rng: np.random.Generator, config: DataConfig, step: int
) -> Tracks:
    height, width = clip.video.shape[1:3]
    synthesis = at_step(config.synthesis, step)
    return synthesise_drags(clip.tracks, rng, synthesis, height, width, clip.groups).tracks


def _stack(elements: Sequence[Batch]) -> Batch:
    return Batch(
        *(None if column[0] is None else np.stack(column) for column in zip(*elements, strict=True))
    )
