"""The other side of `nuwa_jax.data.bench`: a PyTorch DataLoader over the source videos.

    python bench_torch.py OPTIONS    reads one line per run, answers each with one line of JSON

Run by an interpreter that has PyTorch and decord or torchcodec; it needs nothing of this package.
Done as such loaders commonly are, without waste: worker processes, one decoding thread in each,
uint8 throughout, a random window of every clip, cropped and resized with antialiasing.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

# (path, random number in [0, 1)) -> uint8 [t 3 h w] of the file's own size
Decode = Callable[[str, float], torch.Tensor]


class Windows(Dataset):
    """Item (i, where) is the window of file i that begins at `where` of its possible places."""

    def __init__(self, paths: Sequence[str], decode: Decode, height: int, width: int) -> None:
        self._paths, self._decode = paths, decode
        self._size = height, width

    def __getitem__(self, item: tuple[int, float]) -> torch.Tensor:
        video = self._decode(self._paths[item[0]], item[1])
        height, width = self._size
        old_height, old_width = video.shape[-2:]
        crop_height = min(old_height, round(old_width * height / width))
        crop_width = min(old_width, round(old_height * width / height))
        top, left = (old_height - crop_height) // 2, (old_width - crop_width) // 2
        video = video[..., top : top + crop_height, left : left + crop_width]
        return interpolate(video, self._size, mode="bilinear", antialias=True)


def decoder(name: str, frames: int, fps: float) -> Decode:
    """Decodes `frames` frames of a file, about `fps` of them a second."""
    library = importlib.import_module("torchcodec.decoders" if name == "torchcodec" else name)

    def chosen(length: int, rate: float, where: float) -> list[int]:
        stride = max(1, round(rate / fps))
        stride = max(1, min(stride, (length - 1) // max(frames - 1, 1)))
        start = int(where * max(1, length - (frames - 1) * stride))
        return [min(start + i * stride, length - 1) for i in range(frames)]

    def decord(path: str, where: float) -> torch.Tensor:
        reader = library.VideoReader(path, num_threads=1)
        indices = chosen(len(reader), reader.get_avg_fps(), where)
        return torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)

    def torchcodec(path: str, where: float) -> torch.Tensor:
        reader = library.VideoDecoder(path, num_ffmpeg_threads=1)
        found = reader.metadata
        indices = chosen(found.num_frames, found.average_fps, where)
        return reader.get_frames_at(indices).data

    return {"decord": decord, "torchcodec": torchcodec}[name]


def run(windows: Windows, options: dict[str, Any], seed: int) -> dict[str, float]:
    """Reads `clips` windows; returns how many, their bytes, and seconds: wall, CPU, waiting."""
    rng = random.Random(seed)
    count, files = options["clips"], len(options["paths"])
    order = [i for _ in range(-(-count // files)) for i in rng.sample(range(files), files)]
    sampler = [(i, rng.random()) for i in order[:count]]
    begin, cpu = time.perf_counter(), _cpu()
    loader = DataLoader(
        windows,
        options["batch_size"],
        sampler=sampler,
        num_workers=options["workers"],
        multiprocessing_context="fork" if options["workers"] else None,
    )
    size = waited = clips = 0
    batches = iter(loader)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        waited += time.perf_counter() - asked
        clips, size = clips + len(batch), size + batch.nbytes
        time.sleep(options["step_seconds"])
    wall = time.perf_counter() - begin
    del batches, loader  # its workers end, and their seconds are counted
    return {"clips": clips, "bytes": size, "wall": wall, "cpu": _cpu() - cpu, "waited": waited}


def _cpu() -> float:
    return sum(os.times()[:4])


def main() -> None:
    """Answers runs until there are no more lines."""
    options = json.loads(sys.argv[1])
    library = options["backend"]
    torch.set_num_threads(1)
    decode = decoder(library, options["frames"], options["fps"])
    windows = Windows(options["paths"], decode, options["height"], options["width"])
    version = importlib.import_module(library).__version__
    print(json.dumps({"name": f"torch {torch.__version__}, {library} {version}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(windows, options, int(line))), flush=True)


if __name__ == "__main__":
    main()
