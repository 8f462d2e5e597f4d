"""Batches from worker processes; what to do next, and what comes of it, line by line.

python workers_run.py: "draw", "close" or "end" on stdin; on stdout after each what is alive.
"""

import dataclasses
import multiprocessing
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from prepared_clips import SMALL  # noqa: E402

from nuwa_jax.data.pipeline import make_batches  # noqa: E402

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # as a run, which goes on and is saved
    config = dataclasses.replace(SMALL, workers=1, prefetch=1)
    batches = None
    for line in sys.stdin:
        if line == "end\n":
            break
        if line == "draw\n":
            batches = batches or make_batches(config, seed=1, batch_size=1)
            for _ in range(8):  # more than are made ahead
                next(batches)
        else:
            batches.close()
            batches = None
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
