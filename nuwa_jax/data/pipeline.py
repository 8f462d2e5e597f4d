"""Batches for training: clips of a mixture of sources, drags made from their tracks.

Element i of the stream is a pure function of (seed, i), whatever the batch size, the number of
threads, worker processes and hosts; so one integer, the index of the next element, is the whole
state of the iteration. (Schedules of the config add what step that is: see `make_batches`.)
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags, logging

from nuwa_jax.data.batch import Batch
from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.mixture import Clip, Damaged, Mixture
from nuwa_jax.data.records import RecordError
from nuwa_jax.data.scenes import HELD_OUT_SEED, Scene, render_scene
from nuwa_jax.data.tokenizer import load_tokenizer
from nuwa_jax.errors import UserError
from nuwa_jax.motion.drag_synthesis import synthesise_drags
from nuwa_jax.motion.schedules import at_step
from nuwa_jax.motion.tracks import Tracks

# Choices within an element, and whether it is mirrored, are random streams of one seed; these
# numbers keep them apart, and from the order of records (1).
_ELEMENT_STREAM = 2
_FLIP_STREAM = 3

_ENDLESS = 1 << 48  # elements; grain wants a length

# So few unreadable records are never too many, however small their share should be.
_FEWEST_REPLACED = 16
_SHOWN_REPLACED = 20

# Words that are no longer true of a mirrored picture.
_SIDES = re.compile(r"\b(left|right|(anti-?|counter-?)?clockwise|east|west)", re.IGNORECASE)

Transfer = Callable[[Batch], Any]


class Batches(Iterator[Batch]):
    """The stream of batches that `make_batches` starts.

    Attributes:
      next_index: the index of the first element that was not yet drawn; starting again at
        `start_index=next_index` goes on exactly here. What was made ahead does not count.
      fingerprint: of the records that are read, "" for none. Element i is the same only while this
        is: keep it beside `next_index`.
      encoders: with precomputed latents, what each folder's were made with (its manifest's entry).
      num_replaced: elements, of those drawn, whose record could not be read and was replaced;
        counted on this host.
    """

    def __init__(
        self,
        elements: _Elements,
        config: DataConfig,
        batch_size: int,
        start: int,
        num_batches: int | None,
        transfer: Transfer | None,
    ) -> None:
        dataset = grain.MapDataset.source(elements).batch(
            elements.local_batch_size, drop_remainder=True, batch_fn=_stack
        )
        if num_batches is not None:
            dataset = dataset[:num_batches]
        # Batched before threads and workers, so that one makes whole batches: of n workers, worker
        # w makes batches w, w + n, ... and their order does not depend on n.
        threads = config.threads
        ahead = max(config.prefetch, threads) * bool(threads)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        stream = dataset.to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=config.workers,
                    per_worker_buffer_size=max(1, config.prefetch // config.workers),
                ),
                worker_init_fn=_leave_signals,
            )
        if transfer is not None:
            stream = stream.map(lambda made: made._replace(batch=transfer(made.batch)))
            if config.prefetch_to_device:
                stream = grain.experimental.ThreadPrefetchIterDataset(
                    stream, prefetch_buffer_size=config.prefetch_to_device
                )
        self._batches = iter(stream)
        self._batch_size = batch_size
        self._elements = elements
        self._max_replaced_share = config.max_replaced_share
        self._from_records = 0
        self._replaced: dict[Damaged, None] = {}  # in the order in which they were met
        self.next_index = start
        self.fingerprint = elements.fingerprint
        self.encoders = elements.encoders
        self.num_replaced = 0

    def __next__(self) -> Batch:
        made = next(self._batches)
        self.next_index += self._batch_size
        self._count(made)
        return made.batch

    def _count(self, made: _Made) -> None:
        """Counts what was replaced.

        Raises:
          RecordError: that is a larger share of the elements than the config allows.
        """
        self._from_records += made.from_records
        for damaged in made.replaced:
            self.num_replaced += 1
            if damaged not in self._replaced:
                self._replaced[damaged] = None
                logging.warning("replaced by the next one: %s", self._elements.fault(damaged))
        share = self._max_replaced_share
        if self.num_replaced < max(_FEWEST_REPLACED, share * self._from_records):
            return
        if self.num_replaced > share * self._from_records:
            faults = [self._elements.fault(each) for each in list(self._replaced)[:_SHOWN_REPLACED]]
            more = len(self._replaced) - len(faults)
            raise RecordError(
                f"{self.num_replaced} of {self._from_records} records that were drawn cannot be "
                f"read, data.max_replaced_share is {share}: prepare the clips again or copy them "
                f"again. {'; '.join(faults)}{f'; and {more} more' if more else ''}"
            )

    def names(self, first: int, count: int) -> list[str]:
        """What so many elements of the stream, from `first` on, were made from."""
        return [self._elements.name(index) for index in range(first, first + count)]

    def close(self) -> None:
        """Stops the threads and the workers."""
        self._batches.close()


def make_batches(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    start_index: int = 0,
    shard: int = 0,
    num_shards: int = 1,
    rows: Sequence[int] | None = None,
    with_flow: bool = False,
    with_picture: bool = True,
    schedule_start: int = 0,
    num_batches: int | None = None,
    transfer: Transfer | None = None,
) -> Batches:
    """The stream of batches, from the element `start_index` on.

    Batch n is made of elements `start_index + n * batch_size` and on. Of each batch, shard s of S
    yields the s-th of S equal blocks: all shards' batches concatenated are the batch of one shard.

    With `config.workers`, processes are spawned, which import the main module again: it must guard
    what it does by `if __name__ == "__main__"`.

    Args:
      config: what a batch is made of.
      seed: of all randomness; other seeds give unrelated streams.
      batch_size: of all shards together.
      start_index: element at which to start: the state of an earlier iteration, its `next_index`.
      shard: which block of every batch to yield, usually `jax.process_index()`.
      num_shards: usually `jax.process_count()`.
      rows: instead of a block, the rows of every batch to yield, of 0 .. batch_size - 1: those that
        lie on the devices of this host (`nuwa_jax.parallel.mesh.local_rows`).
      with_flow: fill `Batch.flow`.
      with_picture: with precomputed latents, fill `Batch.video` with the first frame; without
        them, it is all frames in any case.
      schedule_start: element at which step 0 of the config's schedules is, such as the first one
        of a stage. Where there are schedules, element i also depends on this and on `batch_size`.
      num_batches: after which the stream ends; endless by default.
      transfer: applied to every batch, ahead of its being asked for by `config.prefetch_to_device`
        batches: usually `nuwa_jax.data.device.to_device`.

    Raises:
      UserError: the batch does not divide among shards, or the clips cannot be opened: there are
        none, a shard is not what the manifest says, they have fewer frames than are asked for, or
        the process may not open so many files.
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
    mixture = Mixture(config, seed, with_flow=with_flow, with_picture=with_picture)
    if rows is None:
        each = batch_size // num_shards
        rows = range(shard * each, (shard + 1) * each)
    elements = _Elements(config, mixture, seed, batch_size, start_index, rows, schedule_start)
    return Batches(elements, config, batch_size, start_index, num_batches, transfer)


def held_out_scene(index: int, config: DataConfig) -> Scene:
    """Scene `index` of those that training never sees."""
    if index < 0:
        raise ValueError(f"index of a held-out scene is at least 0, got {index}")
    return render_scene(HELD_OUT_SEED + index, config.scenes)


class _Made(NamedTuple):
    """A batch or, without its first axis, an element; and how reading it went."""

    batch: Any
    from_records: int
    replaced: tuple[Damaged, ...]


class _Elements:
    """A source for grain: position j of this shard is an element of the stream.

    Copied to worker processes: it holds no lock and changes in nothing.
    """

    def __init__(
        self,
        config: DataConfig,
        mixture: Mixture,
        seed: int,
        batch_size: int,
        start: int,
        rows: Sequence[int],
        schedule_start: int,
    ) -> None:
        self._config = config
        self._seed = seed
        self._batch_size = batch_size
        self._start = start
        self._rows = rows
        self._schedule_start = schedule_start
        self.local_batch_size = len(rows)
        self._tokenize = load_tokenizer(config.tokenizer)
        self._mixture = mixture
        self.fingerprint = mixture.fingerprint
        self.encoders = mixture.encoders if config.format == "latents" else []

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, position: int) -> _Made:
        batch, row = divmod(int(position), self.local_batch_size)
        return self._element(self._start + batch * self._batch_size + self._rows[row])

    def fault(self, damaged: Damaged) -> str:
        """Which record that is, and why it cannot be read."""
        return self._mixture.fault(damaged)

    def name(self, index: int) -> str:
        """What element `index` was made from."""
        return self._mixture.name(index)

    def _element(self, index: int) -> _Made:
        """Element `index` of the stream: a batch without its first axis."""
        config = self._config
        rng = np.random.default_rng([self._seed, _ELEMENT_STREAM, index])
        clip, from_records, damaged = self._mixture.read(index, rng)
        step = max(index - self._schedule_start, 0) // self._batch_size
        drags = _synthesise_drags(clip, rng, config, step).pad(config.max_drags)
        batch = Batch(
            video=clip.video,
            flow=None if clip.flow is None else clip.flow.astype(np.float16),
            points=drags.points,
            state=drags.state,
            text=self._tokenize(clip.caption, config.text_length),
            fps=np.float32(clip.fps),
            flip=self._flip(index, clip.caption),
            latents=clip.latents,
            text_embedding=clip.text_embedding,
        )
        return _Made(batch, int(from_records), damaged)

    def _flip(self, index: int, caption: str) -> np.bool_ | None:
        if not self._config.flip_probability:
            return None
        # A stream of its own: whether clips are mirrored changes nothing else about them.
        rng = np.random.default_rng([self._seed, _FLIP_STREAM, index])
        flip = rng.random() < self._config.flip_probability
        return np.bool_(flip and _SIDES.search(caption) is None)


def _leave_signals(_worker: int, _of: int) -> None:
    """Makes a worker process live until the one that started it closes it, or is gone.

    A signal to the whole group (Ctrl-C, scancel) is the run's affair, which still needs batches.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # it was killed: nobody takes batches any more, or says that it is over

    threading.Thread(target=follow, name="follow", daemon=True).start()


def _synthesise_drags(
    clip: Clip, rng: np.random.Generator, config: DataConfig, step: int
) -> Tracks:
    synthesis = at_step(config.synthesis, step)
    height, width = config.height, config.width
    return synthesise_drags(clip.tracks, rng, synthesis, height, width, clip.groups).tracks


def _stack(elements: Sequence[_Made]) -> _Made:
    columns = list(zip(*(each.batch for each in elements), strict=True))
    for name, column in zip(Batch._fields, columns, strict=True):
        lacking = [value is None for value in column]
        if any(lacking) and not all(lacking):
            raise RecordError(
                f"some records have {name} and some have none: prepare the clips again, all alike"
            )
    return _Made(
        Batch(*(None if column[0] is None else np.stack(column) for column in columns)),
        sum(each.from_records for each in elements),
        tuple(damaged for each in elements for damaged in each.replaced),
    )
