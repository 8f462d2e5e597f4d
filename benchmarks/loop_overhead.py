"""What the training loop costs beside its compiled step, at tiny size; see `benchmarks.train_step`.

The stage `drag` of configs/tiny.py is trained by `nuwa_jax.training.loop.train` itself, and in
turns with every block of its steps as many calls of the same compiled step are timed that see one
batch again and again. Ratios are of the loop to the step alone. Batches come from memory in one
line of the table, and are rendered by threads beside the step in the other: on a CPU these use the
cores of the step.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from benchmarks.beside import Times, print_pairs
from configs import tiny
from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.device import to_device
from nuwa_jax.data.pipeline import Batches, make_batches
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from nuwa_jax.parallel.sharding import place
from nuwa_jax.training import loop
from nuwa_jax.training.curriculum import Params, Stage, stages_from_config
from nuwa_jax.training.optim import make_optimizer
from nuwa_jax.training.state import init_state
from nuwa_jax.training.step import init_key, make_train_step

REPLAYED = 4  # batches that come again and again


class _Replayed:
    """Batches that were made before; everything else is that of real ones."""

    def __init__(self, batches: Batches, size: int) -> None:
        self._batches, self._size = batches, size
        self._kept = [next(batches) for _ in range(REPLAYED)]
        self._drawn = 0
        self.next_index = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __next__(self) -> Any:
        self._drawn += 1
        self.next_index += self._size
        return self._kept[self._drawn % REPLAYED]

    def close(self) -> None:
        pass  # of the real ones the threads have ended


def measure(blocks: int, steps: int) -> None:
    """Prints a table line for batches from memory, and one for rendered ones.

    Args:
      blocks: pairs that are timed.
      steps: of the loop, and of the compiled step alone, in each.
    """
    config = tiny.get_config()
    config.curriculum = ("drag",)
    (stage,) = stages_from_config(config)
    config.stages.drag.steps = (blocks + 1) * steps
    config.train.update(sample_every=steps, checkpoint_every=10**9)
    alone = _Alone(config, stage)
    for name, made in (("replayed", _replay), ("rendered", make_batches)):
        with tempfile.TemporaryDirectory() as workdir:
            loop.make_batches, before = made, loop.make_batches
            try:
                in_turns = _InTurns(alone, steps)
                loop.train(config, workdir, sample_fn=in_turns)
            finally:
                loop.make_batches = before
        # The first block holds compilation.
        pairs = [
            ((a[0] / steps, a[1] / steps), (b[0] / steps, b[1] / steps))
            for a, b in in_turns.times[1:]
        ]
        print_pairs(f"batches {name}", pairs, "loop", "step")


def _replay(*args: Any, **kwargs: Any) -> _Replayed:
    batches = make_batches(*args, **kwargs)
    replayed = _Replayed(batches, kwargs["batch_size"])
    batches.close()
    return replayed


class _Alone:
    """The compiled step with a state of its own and one batch."""

    def __init__(self, config: Any, stage: Stage) -> None:
        mesh = make_mesh(MeshConfig())
        model, data = VideoLDM.from_config(config.model), DataConfig.from_config(config.data)
        size = dict(height=data.height, width=data.width, frames=data.frames)
        params = model.init(init_key(config.seed), **size)
        self._state = place(init_state(params, stage, make_optimizer(config.train)), mesh)
        batches = make_batches(data, seed=1, batch_size=stage.batch_size, num_batches=1)
        self._batch = to_device(next(batches), batch_sharding(mesh))
        batches.close()
        self._numbers = jax.device_put((np.float32(1e-4), np.float32(0)), replicated(mesh))
        self._step = make_train_step(model, config, stage, mesh)

    def run(self, steps: int) -> None:
        """As many steps, given to the device as far ahead as the loop does."""
        under_way = []
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch, *self._numbers)
            under_way.append(metrics)
            if len(under_way) > loop.RUN_AHEAD:
                jax.block_until_ready(under_way.pop(0))
        jax.block_until_ready(self._state)


class _InTurns:
    """What the loop takes for a sampler: called after every block of its steps."""

    def __init__(self, alone: _Alone, steps: int) -> None:
        self.times: list[tuple[Times, Times]] = []
        self._alone, self._steps = alone, steps
        self._alone.run(1)  # compiled
        self._begin = _now()

    def __call__(self, params: Params, stage: Stage) -> UInt8[np.ndarray, "b t h w 3"]:
        del stage
        jax.block_until_ready(params)
        end = _now()
        self._alone.run(self._steps)
        after = _now()
        self.times.append((_between(self._begin, end), _between(end, after)))
        self._begin = _now()
        return np.zeros((1, 1, 16, 16, 3), np.uint8)


def _now() -> Times:
    return time.perf_counter(), time.process_time()


def _between(start: Times, end: Times) -> Times:
    return end[0] - start[0], end[1] - start[1]
