"""python slow_run.py WHAT FLAGS    runs train.py with the fake model, one part of it made slow

  batches   each batch takes 50 ms
  steps     each step takes 3 s
  trace     compiling the step: its tracing, in Python
  compile   compiling the step: XLA itself
  sampler   sampling, many short pieces of Python
  native    sampling, one long call of a compiled program
  sampler_compile   compiling the sampler

What takes for ever says "slow part" when it has begun.
"""

from __future__ import annotations

import itertools
import runpy
import sys
import time

import fake_model
import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(fake_model.ROOT)]


def announce() -> None:
    print("slow part", flush=True)


def endless_compile(x: jax.Array) -> jax.Array:
    """`x`, whose compiling takes hours: XLA folds constants slowly, and holds no lock of Python."""
    window = jax.lax.reduce_window(
        jnp.ones(4_000_000), 0.0, jax.lax.add, (2_000_001,), (1,), "SAME"
    )
    return x + 0 * window[0]


def slow_batches() -> None:
    from nuwa_jax.data.pipeline import Batches

    draw = Batches.__next__

    def slowly(batches):
        time.sleep(0.05)
        return draw(batches)

    Batches.__next__ = slowly


def slow_steps() -> None:
    def pause(x):
        time.sleep(3)
        return x

    during_denoise(lambda x: jax.pure_callback(pause, jax.ShapeDtypeStruct(x.shape, x.dtype), x))


def during_denoise(change) -> None:
    plain = fake_model.FakeModel.denoise

    def denoise(model, params, x, sigma, condition):
        return plain(model, params, jax.lax.stop_gradient(change(x)), sigma, condition)

    fake_model.FakeModel.denoise = denoise


def slow_trace() -> None:
    def pause(x):
        announce()
        for _ in itertools.count():
            time.sleep(0.1)
        return x

    during_denoise(pause)


def slow_compile() -> None:
    def compile_slowly(x):
        announce()
        return endless_compile(x)

    during_denoise(compile_slowly)


def sample_with(sample) -> None:
    from nuwa_jax.generation.stage_samples import StageSamples

    def call(samples, params, stage):
        announce()
        sample(params)
        return np.zeros((1, 3, 16, 24, 3), np.uint8)

    StageSamples.__call__ = call


def pieces(params) -> None:
    for _ in itertools.count():
        np.asarray(params["unet"]["in"]).sum()
        time.sleep(0.05)


def native(params) -> None:
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: x * 0.5, x))
    np.asarray(endless(params["unet"]["in"][0, 0] * 0))


def compiling(params) -> None:
    jax.jit(endless_compile)(params["unet"]["in"])


PARTS = {
    "batches": slow_batches,
    "steps": slow_steps,
    "trace": slow_trace,
    "compile": slow_compile,
    "sampler": lambda: sample_with(pieces),
    "native": lambda: sample_with(native),
    "sampler_compile": lambda: sample_with(compiling),
}

if __name__ == "__main__":
    fake_model.install()
    PARTS[sys.argv.pop(1)]()
    sys.argv[0] = str(fake_model.ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
