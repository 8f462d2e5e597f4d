"""Where clips come from: scenes, prepared folders, and mixtures of them by weight.

Clip i of a mixture is a pure function of the seed, i and the records: nothing is filtered out, as
that would make a clip depend on those before it. A record that cannot be read is replaced by the
next one, and told.
"""

from __future__ import annotations

import dataclasses
import hashlib
import resource
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import cv2
import grain
import numpy as np
from jaxtyping import Float, Int, UInt8

from nuwa_jax.data.config import DataConfig, SourceConfig
from nuwa_jax.data.records import Record, RecordError, RecordReader
from nuwa_jax.data.scenes import HELD_OUT_SEED, render_scene
from nuwa_jax.data.video import PointTransform, VideoError, read_video, resize_video
from nuwa_jax.errors import UserError
from nuwa_jax.motion.estimators import DISFlow
from nuwa_jax.motion.tracks import Tracks, TrackState, inside

# Records to try in the place of a damaged one before giving up.
_MAX_REPLACEMENTS = 16

# The order of records is a random stream of its own under the seed of the run.
_ORDER_STREAM = 1

# Files that a process has open besides shards: libraries, logs, pipes to workers, checkpoints.
_OTHER_FILES = 128


@dataclasses.dataclass(frozen=True)
class Clip:
    """What scenes and records have in common, in the size that the config asks for.

    Attributes:
      video: all frames; with precomputed latents the first one alone, or None if not asked for.
      tracks: what moves in it.
      groups: the object that each track lies on, 0 the background; None where not known.
      flow: at 1 / `flow_divisor` of the size, displacements in pixels of the whole one; or None.
      caption: what is seen.
      fps: frames per second.
      latents: as the model's `encode` gives them, or None.
      text_embedding: of the caption, as the model's text encoder gives it, or None.
    """

    video: UInt8[np.ndarray, "t h w 3"] | None
    tracks: Tracks
    groups: Int[np.ndarray, " k"] | None
    flow: Float[np.ndarray, "t h2 w2 2"] | None
    caption: str
    fps: float
    latents: Float[np.ndarray, "t h3 w3 c"] | None = None
    text_embedding: Float[np.ndarray, "l c"] | None = None


class Damaged(NamedTuple):
    """A record that could not be read: record `index` of the mixture's source `source`."""

    source: int
    index: int


class Read(NamedTuple):
    """A clip, whether it is of a record, and the records that could not be read in its place."""

    clip: Clip
    from_records: bool
    damaged: tuple[Damaged, ...]


class _Source(Protocol):
    fingerprint: str

    def clip(self, number: int, rng: np.random.Generator) -> tuple[Clip, tuple[int, ...]]:
        """Clip `number` of the endless stream, and the records that were damaged before it."""

    def fault(self, index: int) -> str:
        """Why record `index` cannot be read."""

    def name(self, number: int) -> str:
        """What clip `number` of the endless stream was made from."""


class Mixture:
    """Clips of all sources of a config, in an order that depends on the seed alone.

    Attributes:
      fingerprint: of all records, "" without any: clip i is the same only while this is.
      encoders: of each prepared folder, what its latents and text embeddings were made with.

    Raises:
      UserError: records cannot be opened, are not what their manifest says, do not fit the config
        or each other, or lie in more shards than this process may open files.
    """

    def __init__(
        self, config: DataConfig, seed: int, *, with_flow: bool, with_picture: bool
    ) -> None:
        chosen = config.mixed_sources()
        self._shares = shares([source.weight for source in chosen])
        self._sources: list[_Source] = []
        self._of_records = [source.kind == "records" for source in chosen]
        for source in chosen:
            if source.kind == "scenes":
                self._sources.append(_Scenes(config, with_flow))
            else:
                order = sum(self._of_records[: len(self._sources)])
                wanted = _Wanted(with_flow, with_picture)
                self._sources.append(_Records(config, source, seed, order, wanted))
        _check_open_files([s.num_shards for s in self._sources if isinstance(s, _Records)])
        self.encoders = [s.encoders for s in self._sources if isinstance(s, _Records)]
        if config.format == "latents":
            _check_same_parts([s.path for s in chosen if s.kind == "records"], self.encoders)
        prints = [s.fingerprint for s in self._sources if s.fingerprint]
        joined = hashlib.sha256("".join(prints).encode()).hexdigest() if prints else ""
        self.fingerprint = prints[0] if len(prints) == 1 else joined

    def read(self, index: int, rng: np.random.Generator) -> Read:
        """Clip `index`; `rng` is its own and makes what is random within it."""
        number, within = place(index, self._shares)
        clip, damaged = self._sources[number].clip(within, rng)
        told = tuple(Damaged(number, record) for record in damaged)
        return Read(clip, self._of_records[number], told)

    def fault(self, damaged: Damaged) -> str:
        """Which record that is, and why it cannot be read."""
        return self._sources[damaged.source].fault(damaged.index)

    def name(self, index: int) -> str:
        """What clip `index` was made from."""
        number, within = place(index, self._shares)
        return self._sources[number].name(within)


def shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Of each source, its share of what the sources before it leave over."""
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    rest = [sum(exact[i:]) for i in range(len(exact))]
    if not rest or rest[-1] <= 0:
        raise UserError(f"weights of sources are at least 1e-6, got {list(weights)}")
    return tuple(weight / total for weight, total in zip(exact, rest, strict=True))


def place(index: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Which source element `index` is of, and which of that source's elements it is.

    Sources are spread evenly: of n elements, floor(n * share) are of the first source; of the
    others, as many in proportion are of the second, and so on. Exact, so that no element is ever
    left out or repeated however far the stream goes.
    """
    for source, share in enumerate(shares):
        before = index * share.numerator // share.denominator
        if (index + 1) * share.numerator // share.denominator > before:
            return source, before
        index -= before
    raise AssertionError("the last source's share of what is left over is all of it")


class _Wanted(NamedTuple):
    """What a batch is to hold besides drags; pictures matter with precomputed latents alone."""

    flow: bool
    picture: bool


class _Scenes:
    """Rendered as they are asked for; there is no end of them."""

    fingerprint = ""

    def __init__(self, config: DataConfig, with_flow: bool) -> None:
        self._config, self._with_flow = config, with_flow

    def clip(self, number: int, rng: np.random.Generator) -> tuple[Clip, tuple[int, ...]]:
        del number
        scene = render_scene(int(rng.integers(HELD_OUT_SEED)), self._config.scenes)
        flow = _reduced(scene.flow, self._config.flow_divisor) if self._with_flow else None
        clip = Clip(scene.video, scene.tracks, scene.track_object, flow, scene.caption, scene.fps)
        return clip, ()

    def fault(self, index: int) -> str:
        raise AssertionError(f"scenes have no record {index}")

    def name(self, number: int) -> str:
        return f"scene {number}"


class _Records:
    """The records of a prepared folder, in another order every epoch."""

    def __init__(
        self, config: DataConfig, source: SourceConfig, seed: int, order: int, wanted: _Wanted
    ) -> None:
        self._config, self._path, self._wanted = config, source.path, wanted
        self._reader = RecordReader(source.path)
        if self._reader.frames < config.frames:
            raise UserError(
                f"clips in {source.path} have {self._reader.frames} frames or more, data.frames is "
                f"{config.frames}: prepare them with --min_frames={config.frames}"
            )
        self.fingerprint = self._reader.fingerprint
        self.encoders: dict[str, str] = self._reader.manifest.get("encoders", {})
        self.num_shards = len(self._reader.manifest["shards"])
        streams = [seed, _ORDER_STREAM] + [order] * (order > 0)
        state = np.random.SeedSequence(streams).generate_state(1)
        # Every epoch has its own order; grain computes position i of it without a table.
        self._order = grain.MapDataset.range(len(self._reader)).shuffle(seed=int(state[0])).repeat()

    def clip(self, number: int, rng: np.random.Generator) -> tuple[Clip, tuple[int, ...]]:
        index, where = int(self._order[number]), rng.random()
        count = len(self._reader)
        tries = min(count, _MAX_REPLACEMENTS + 1)
        damaged: list[int] = []
        for candidate in range(index, index + tries):
            try:
                return self._read(candidate % count, where), tuple(damaged)
            except (RecordError, VideoError):
                damaged.append(candidate % count)
        raise RecordError(
            f"{tries} records of {self._path} in a row cannot be read, the first as "
            f"{self.fault(damaged[0])}: prepare the clips again"
        )

    def fault(self, index: int) -> str:
        try:
            self._read(index, 0.0)
        except (RecordError, VideoError) as error:
            return f"record {index} of {self._path}: {error}"
        return f"record {index} of {self._path}: it can be read now"

    def name(self, number: int) -> str:
        index = int(self._order[number])
        try:
            source = self._reader.read(index).source_id
        except RecordError:
            source = "cannot be read, the next one was taken"
        return f"record {index} of {self._path} ({source})"

    def _read(self, index: int, where: float) -> Clip:
        """A window of the record, which begins at `where` of its possible places, in [0, 1)."""
        record = self._reader.read(index)
        frames = self._config.frames
        first = int(where * (record.frames - frames + 1))
        window = slice(first, first + frames)
        if self._config.format == "latents":
            return self._with_latents(record, window)
        video = self._decode(record, first, frames)
        return _cut_to_size(record, window, video, self._config, self._wanted.flow)

    def _decode(self, record: Record, first: int, frames: int) -> UInt8[np.ndarray, "t h w 3"]:
        if not record.video:
            raise UserError(
                f"{self._path} has latents without videos: prepare it with videos, or set "
                'data.format="latents" and train a model that needs no pictures'
            )
        # From its time rather than its number: frames before it need not become pictures.
        video, _ = read_video(record.video, start=first / record.fps, max_frames=frames)
        if video.shape[:3] != (frames, record.height, record.width):
            raise RecordError(f"its video has shape {video.shape}")
        return video

    def _with_latents(self, record: Record, window: slice) -> Clip:
        config = self._config
        height, width = config.height, config.width
        if record.latents is None:
            raise UserError(
                f'{self._path} has no latents: prepare it with them, or set data.format="video"'
            )
        if (record.height, record.width) != (height, width):
            raise UserError(
                f"{self._path} has latents of {record.height}x{record.width}, data is "
                f"{height}x{width}: latents cannot be resized, prepare the clips at that size"
            )
        flow = None
        if self._wanted.flow:
            if record.flow is None:
                raise UserError(
                    f"{self._path} has latents but no dense flow, which this stage needs: prepare "
                    "it with --flow_divisor"
                )
            flow = _window_flow(record, window, PointTransform((1.0, 1.0), (0.0, 0.0)), config)
        tracks = Tracks(record.tracks.points[:, window], record.tracks.state[:, window])
        return Clip(
            video=self._decode(record, window.start, 1) if self._wanted.picture else None,
            tracks=tracks,
            groups=None,
            flow=flow,
            caption=record.caption,
            fps=record.fps,
            latents=record.latents[window],
            text_embedding=record.text_embedding,
        )


def _cut_to_size(
    record: Record,
    window: slice,
    video: UInt8[np.ndarray, "t h w 3"],
    config: DataConfig,
    with_flow: bool,
) -> Clip:
    """The window of a record, of which `video` are the frames, in the config's size."""
    height, width = config.height, config.width
    video, transform = resize_video(video, height, width)
    points, state = transform(record.tracks.points[:, window]), record.tracks.state[:, window]
    known = state != TrackState.UNSPECIFIED
    # What was seen may lie in the part that another shape of picture cuts off.
    state = np.where(known & ~inside(points, height, width), TrackState.OUTSIDE, state)
    flow = None
    if with_flow:
        if record.flow is None:
            flow = _reduced(DISFlow().estimate(video), config.flow_divisor)
            flow[0] = 0
        else:
            flow = _window_flow(record, window, transform, config)
    return Clip(video, Tracks(points, state), None, flow, record.caption, record.fps)


def _reduced(flow: Float[np.ndarray, "t h w 2"], divisor: int) -> Float[np.ndarray, "t h2 w2 2"]:
    """The mean over squares of `divisor` pixels: still in pixels of the whole size."""
    if divisor == 1:
        return flow
    t, h, w, _ = flow.shape
    squares = flow.reshape(t, h // divisor, divisor, w // divisor, divisor, 2)
    return squares.mean(axis=(2, 4), dtype=np.float32)


def _window_flow(
    record: Record, window: slice, transform: PointTransform, config: DataConfig
) -> Float[np.ndarray, "t h2 w2 2"]:
    """The record's own flow where `transform` has put its picture, at the size that is sent."""
    stored = record.flow[window]
    height, width = config.height // config.flow_divisor, config.width // config.flow_divisor
    # From the flow that is sent to the whole picture, to the record's, to the flow that is stored.
    scale, offset = np.array(transform.scale), np.array(transform.offset)
    reduced = np.array([stored.shape[2] / record.width, stored.shape[1] / record.height])
    step = config.flow_divisor * reduced / scale
    # Pixel centres are at integers: a whole picture reaches from -0.5 to its size less 0.5.
    corner = (-0.5 - offset) / scale
    shift = (corner + 0.5) * reduced - 0.5 + 0.5 * step
    matrix = np.concatenate([np.diag(step), shift[:, None]], axis=1)
    resized = [
        cv2.warpAffine(
            frame.astype(np.float32),
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        for frame in stored
    ]
    flow = np.stack(resized) * scale.astype(np.float32)
    flow[0] = 0  # the first frame of a window has none before it
    return flow


def _check_same_parts(paths: Sequence[str], encoders: Sequence[Mapping[str, str]]) -> None:
    """A batch has text embeddings or none: the first that mixes them would come after hours."""
    made = [" and ".join(sorted(each)) or "nothing that it says" for each in encoders]
    other = next((number for number, what in enumerate(made) if what != made[0]), None)
    if other is not None:
        raise UserError(
            f"{paths[0]} was encoded with {made[0]}, {paths[other]} with {made[other]}, so their "
            "records do not make batches: run python -m nuwa_jax.generation.precompute on both "
            "with the same --text"
        )


def _check_open_files(shards: Sequence[int]) -> None:
    """Each shard that was read from stays open: the limit would be met after hours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = sum(shards) + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and needed > soft:
        allowed = "unlimited" if hard == resource.RLIM_INFINITY else hard
        raise UserError(
            f"the prepared clips have {sum(shards)} shards, each of which stays open, and this "
            f"process may open {soft} files: run `ulimit -n {needed}` before it (at most {allowed} "
            "here), or prepare the clips with a smaller --num_shards"
        )
