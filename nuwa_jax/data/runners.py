"""What calls the units of work: this machine, or Apache Beam and through it a cluster.

The units are the same functions of a job and an index (`nuwa_jax.data.shards` and `.sealing`), so
that the shards are too, to the byte. An array job calls `write_shard` by itself and needs nothing
of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from nuwa_jax.data.sealing import seal_shard
from nuwa_jax.data.shards import Job, clip_pool, write_shard
from nuwa_jax.errors import UserError

RUNNERS = ("local", "beam")

# (index of the shard, (clip, why) to remove from it)
Removal = tuple[int, Sequence[tuple[int, str]]]


class Runner(Protocol):
    """Runs units of work, each at least once, in any order."""

    def write(self, job: Job, indices: Sequence[int]) -> None:
        """`write_shard` for each index."""
        ...

    def seal(self, job: Job, removals: Sequence[Removal]) -> None:
        """`seal_shard` for each shard."""
        ...


class LocalRunner:
    """One shard after the other; of each, as many clips at a time as there are processes."""

    def __init__(self, workers: int | None = None, timeout: float = 300.0) -> None:
        self.workers = workers or os.cpu_count() or 1
        self._timeout = timeout

    def write(self, job: Job, indices: Sequence[int]) -> None:
        """See `Runner`."""
        with clip_pool(job, self.workers, self._timeout) as pool:
            for index in indices:
                write_shard(job, index, pool)

    def seal(self, job: Job, removals: Sequence[Removal]) -> None:
        """See `Runner`."""
        for index, removed in removals:
            seal_shard(job, index, removed)


class BeamRunner:
    """One element per shard: no clip passes through Beam, which only hands out numbers.

    Args:
      options: of the pipeline, such as `--runner=DataflowRunner --project=...`; by default Beam's
        direct runner with a process per core.
      timeout: seconds that a clip may take.

    Raises:
      UserError: Beam is not installed.
    """

    def __init__(self, options: Sequence[str] = (), timeout: float = 300.0) -> None:
        try:
            import apache_beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise UserError(
                "--runner=beam needs Apache Beam: pip install 'nuwa_jax[prepare]'"
            ) from error
        default = [
            "--runner=DirectRunner",
            "--direct_running_mode=multi_processing",
            f"--direct_num_workers={os.cpu_count() or 1}",
        ]
        self._beam = apache_beam
        self._options = PipelineOptions(list(options) or default)
        self._timeout = timeout

    def write(self, job: Job, indices: Sequence[int]) -> None:
        """See `Runner`."""
        self._map(_WriteShard(job, self._timeout), list(indices))

    def seal(self, job: Job, removals: Sequence[Removal]) -> None:
        """See `Runner`."""
        self._map(_SealShard(job), list(removals))

    def _map(self, function: Callable[..., None], elements: Sequence[object]) -> None:
        beam = self._beam
        with beam.Pipeline(options=self._options) as pipeline:
            # The reshuffle keeps Beam from fusing all shards into one bundle on one machine.
            _ = pipeline | beam.Create(elements) | beam.Reshuffle() | beam.Map(function)


class _WriteShard:
    """Picklable, since Beam sends it to its workers."""

    def __init__(self, job: Job, timeout: float) -> None:
        self._job, self._timeout = job, timeout

    def __call__(self, index: int) -> None:
        # Beam has a worker per core already.
        with clip_pool(self._job, 1, self._timeout) as pool:
            write_shard(self._job, index, pool)


class _SealShard:
    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, removal: Removal) -> None:
        seal_shard(self._job, *removal)
