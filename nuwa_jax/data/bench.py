"""Measures what data costs: preparing clips, and reading them beside a PyTorch DataLoader.

python -m nuwa_jax.data.bench --root=videos [--torch_python=PATH]    prepares them, then reads
python -m nuwa_jax.data.bench --root=videos --records=prepared       reads what is prepared
python -m nuwa_jax.data.bench --records=prepared --soak=10000        memory and compilations

Rates are per core: a second of it is one of CPU time of the process and of all that it starts, so
that what else the machine does weighs little. Our reading and the loader's run in turns, and each
pair of runs gives one ratio. The last line printed is a JSON object. PATH is a Python interpreter
that has PyTorch and decord or torchcodec.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
from absl import flags

from nuwa_jax.data.config import FORMATS, DataConfig
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.data.prepare import ClipOptions
from nuwa_jax.data.records import RecordReader
from nuwa_jax.data.soak import Soak, soak
from nuwa_jax.data.webvid import make_job, prepare
from nuwa_jax.errors import UserError, run_main

_THEIRS = Path(__file__).with_name("bench_torch.py")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of reading.

    Attributes:
      clips: that were read.
      bytes: of them as arrays.
      wall: seconds from the first batch asked for to the last one used.
      cpu: seconds of CPU, of all processes.
      waited: seconds in which there was no batch to use.
    """

    clips: int
    bytes: int
    wall: float
    cpu: float
    waited: float

    @property
    def clips_per_second(self) -> float:
        """Clips per second of wall time."""
        return self.clips / self.wall

    @property
    def clips_per_core(self) -> float:
        """Clips per second of CPU time."""
        return self.clips / self.cpu


def time_preparation(root: Path, out: Path, options: ClipOptions) -> dict[str, Any]:
    """Prepares the videos below `root`; what `prepare` counts, with CPU and wall seconds.

    `cpu` is of everything, also of starting worker processes, which weighs on small folders alone;
    `clips_per_core` goes by the seconds of the stages that the clips went through.
    """
    wall, cpu = time.perf_counter(), cpu_seconds()
    counts = prepare(make_job(None, root, out, options), overwrite=True)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return {
        **counts,
        "wall": wall,
        "cpu": cpu,
        "clips_per_core": counts["clips"] / sum(counts["seconds_by_stage"].values()),
        "clips_per_core_with_start": counts["clips"] / cpu,
        "bytes_per_record": counts["bytes"] / counts["records"],
    }


def time_reading(
    config: DataConfig, *, batch_size: int, num_batches: int, seed: int, step_seconds: float
) -> Run:
    """Reads so many batches in a loop whose step takes `step_seconds` and leaves the host idle."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    batches = make_batches(
        config, seed=seed, batch_size=batch_size, num_batches=num_batches, with_picture=False
    )
    clips = size = 0
    waited = 0.0
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        waited += time.perf_counter() - asked
        clips += len(batch.fps)
        size += sum(array.nbytes for array in batch if array is not None)
        time.sleep(step_seconds)
    wall = time.perf_counter() - wall
    batches.close()
    return Run(clips, size, wall, cpu_seconds() - cpu, waited)


class TorchLoader:
    """A PyTorch DataLoader over source videos, in an interpreter of its own."""

    def __init__(self, python: str, options: dict[str, Any]) -> None:
        """Starts it.

        Raises:
          UserError: there is no such interpreter, or it lacks a library; the message says which.
        """
        command = [python, str(_THEIRS), json.dumps(options)]
        # Its folder holds modules whose names others may have too.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise UserError(f"--torch_python={python} cannot be run: {error.strerror}") from error
        self.name = self._answer()["name"]

    def run(self, seed: int) -> Run:
        """Reads the `clips` of the options once more, in another order."""
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return Run(**self._answer())

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            told = self._process.stderr.read().strip().splitlines() or ["it ended silently"]
            raise UserError(f"the PyTorch loader failed: {told[-1]}")
        return json.loads(line)

    def __enter__(self) -> TorchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the narrowest interval between two of the values that holds 95 %.

    It supposes nothing of how they are distributed: the number of values below the true median is
    binomial. Fewer than six values cannot bound it so surely; their extremes are given then.
    """
    ordered, n = sorted(values), len(values)
    outside = 0
    while True:
        beyond = 2 * sum(math.comb(n, i) for i in range(outside + 2)) / 2**n
        if beyond > 0.05 or 2 * (outside + 1) >= n:
            break
        outside += 1
    return statistics.median(ordered), ordered[outside], ordered[n - 1 - outside]


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has started and seen end."""
    return sum(os.times()[:4])


def source_videos(root: Path, records: Path) -> list[Path]:
    """The videos below `root` that the records were made of.

    Raises:
      UserError: they were made of others.
    """
    reader = RecordReader(records)
    names = sorted({reader.read(index).source_id for index in range(len(reader))})
    found = [root / name for name in names if (root / name).is_file()]
    if not found:
        raise UserError(
            f"none of the clips in --records={records} is a file below --root={root}: give the "
            "folder that they were prepared from"
        )
    return found


def bench_reading(
    config: DataConfig,
    videos: Sequence[Path],
    *,
    torch_python: str,
    backend: str,
    fps: float,
    batch_size: int,
    num_batches: int,
    rounds: int,
    step_seconds: float,
) -> dict[str, Any]:
    """Our runs and, with `torch_python`, the loader's between them; medians and ratios."""

    def ours(seed: int) -> Run:
        return time_reading(
            config,
            batch_size=batch_size,
            num_batches=num_batches,
            seed=seed,
            step_seconds=step_seconds,
        )

    sides: dict[str, Callable[[int], Run]] = {"ours": ours}
    with contextlib.ExitStack() as stack:
        if torch_python:
            options = {
                "paths": [str(path) for path in videos],
                "backend": backend,
                "frames": config.frames,
                "fps": fps,
                "height": config.height,
                "width": config.width,
                "clips": batch_size * num_batches,
                "batch_size": batch_size,
                "workers": max(config.threads, config.workers),
                "step_seconds": step_seconds,
            }
            try:
                loader = stack.enter_context(TorchLoader(torch_python, options))
                sides[loader.name] = loader.run
            except UserError as error:
                print(f"not compared with a PyTorch loader: {error}", flush=True)
        else:
            print("not compared with a PyTorch loader: no --torch_python", flush=True)
        for run in sides.values():
            run(0)  # what is loaded once is not counted
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        for seed in range(1, rounds + 1):
            # In turns also as to who goes first, so that neither always has the warmer machine.
            for name in list(sides)[:: 1 if seed % 2 else -1]:
                runs[name].append(sides[name](seed))
    found: dict[str, Any] = {name: summary(each) for name, each in runs.items()}
    if len(sides) > 1:
        pairs = list(zip(*runs.values(), strict=True))
        for what in ("clips_per_core", "clips_per_second"):
            ratios = [getattr(ours, what) / getattr(theirs, what) for ours, theirs in pairs]
            found[f"ratio_{what}"] = median_interval(ratios)
    return found


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians with their intervals, of runs alike."""
    return {
        "clips_per_core": median_interval([run.clips_per_core for run in runs]),
        "clips_per_second": median_interval([run.clips_per_second for run in runs]),
        "megabytes_per_second": median_interval([run.bytes / run.wall / 1e6 for run in runs]),
        "waited_share": median_interval([run.waited / run.wall for run in runs]),
        "waited_seconds": median_interval([run.waited for run in runs]),
        "clips": runs[0].clips,
    }


def print_preparation(counts: dict[str, Any]) -> None:
    """What preparing cost, for people."""
    print(
        f"preparation: {counts['inputs']} videos, {counts['records']} records in "
        f"{counts['cpu']:.1f} CPU seconds ({counts['wall']:.1f} of wall time)\n"
        f"  {counts['clips_per_core']:.2f} clips per second and core, "
        f"{counts['clips_per_core_with_start']:.2f} with the start of the processes; "
        f"{counts['bytes_per_record'] / 1e3:.1f} kB a record"
    )
    for stage, seconds in counts["seconds_by_stage"].items():
        print(f"  {stage:<12} {seconds:8.2f} s {1e3 * seconds / counts['clips']:8.1f} ms a clip")


def print_reading(found: dict[str, Any], rounds: int) -> None:
    """What reading cost, for people."""
    print(f"reading: medians of {rounds} runs [95 % interval]")
    for name, values in found.items():
        if not name.startswith("ratio_"):
            print(
                f"  {name}: {_interval(values['clips_per_core'])} clips per second and core, "
                f"{_interval(values['clips_per_second'])} a second, "
                f"{_interval(values['megabytes_per_second'], '.0f')} MB/s, waited "
                f"{_interval(values['waited_seconds'], '.2f')} s a run of {values['clips']} clips"
            )
    for name, values in found.items():
        if name.startswith("ratio_"):
            what = name.removeprefix("ratio_").replace("_", " ")
            print(f"  ours / theirs, {what}: {_interval(values, '.2f')}")


def print_soak(seen: Soak) -> None:
    """What a long run left behind, for people."""
    memory = [size / 1e6 for size in seen.memory]
    print(
        f"soak: {seen.batches} batches, {seen.compilations} compilations after the first, "
        f"{seen.num_replaced} records replaced; memory {memory[0]:.0f} MB after a twentieth, "
        f"{memory[len(memory) // 2]:.0f} half way, {memory[-1]:.0f} at the end; open files "
        f"{seen.files[0]} to {seen.files[-1]}"
    )


def _interval(values: tuple[float, float, float], form: str = ".1f") -> str:
    middle, low, high = (format(value, form) for value in values)
    return f"{middle} [{low}, {high}]"


def _define_flags() -> None:
    flags.DEFINE_string("root", None, "Folder of source videos.")
    flags.DEFINE_string("records", None, "Prepared folder; without it, --root is prepared.")
    flags.DEFINE_integer("height", 256, "Of the clips in pixels.")
    flags.DEFINE_integer("width", 256, "Of the clips in pixels.")
    flags.DEFINE_integer("frames", 16, "Of the clips.")
    flags.DEFINE_float("fps", 8.0, "Frames per second to prepare and to read.")
    flags.DEFINE_integer("batch_size", 8, "Clips of a batch.")
    flags.DEFINE_integer("num_batches", 16, "Batches of a run.")
    flags.DEFINE_integer("rounds", 7, "Runs, or pairs of them; six or more give an interval.")
    flags.DEFINE_float("step_ms", 0.0, "Milliseconds that the simulated step takes.")
    flags.DEFINE_integer("threads", 2, "That make batches; the loader has as many workers.")
    flags.DEFINE_integer("workers", 0, "Processes that make batches.")
    flags.DEFINE_string("torch_python", "", "Python that has PyTorch, to compare with.")
    flags.DEFINE_enum("torch_decoder", "decord", ["decord", "torchcodec"], "What it decodes with.")
    flags.DEFINE_enum("format", "video", FORMATS, "What of the records is read.")
    flags.DEFINE_integer("soak", 0, "Read so many batches onto the device instead.")


def main(argv: Sequence[str]) -> None:
    """Flags to figures."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    values = flags.FLAGS
    if not values.records and not values.root:
        raise UserError("give --root, a folder of videos, or --records, a prepared one")
    if values.torch_python and not values.root:
        raise UserError("--torch_python reads source videos: give their folder as --root")
    size = {"height": values.height, "width": values.width, "frames": values.frames}
    found: dict[str, Any] = {"options": dict(size, threads=values.threads, workers=values.workers)}
    cv2.setNumThreads(0)  # clips are what is made in parallel
    with tempfile.TemporaryDirectory() as temporary:
        records = Path(values.records or temporary)
        if not values.records:
            options = ClipOptions(**size, fps=values.fps, min_frames=values.frames)
            found["preparation"] = time_preparation(Path(values.root), records, options)
            print_preparation(found["preparation"])
        config = DataConfig(
            **size,
            clips=str(records),
            clips_weight=1.0,
            scenes_weight=0.0,
            threads=values.threads,
            workers=values.workers,
            format=values.format,
            flip_probability=0.5 if values.format == "video" else 0.0,
        )
        if values.soak:
            seen = soak(config, values.soak, values.batch_size)
            print_soak(seen)
            found["soak"] = dataclasses.asdict(seen)
        else:
            found["reading"] = bench_reading(
                config,
                source_videos(Path(values.root), records) if values.torch_python else (),
                torch_python=values.torch_python,
                backend=values.torch_decoder,
                fps=values.fps,
                batch_size=values.batch_size,
                num_batches=values.num_batches,
                rounds=values.rounds,
                step_seconds=values.step_ms / 1e3,
            )
            print_reading(found["reading"], values.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    _define_flags()
    run_main(main)
