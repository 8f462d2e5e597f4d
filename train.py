"""Trains a model through its curriculum, or goes on with a run that was stopped.

python train.py --config=configs/tiny.py --workdir=runs/tiny
python train.py --config=configs/tiny.py --workdir=runs/tiny --config.stages.drag.steps=2000
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from nuwa_jax.errors import UserError, run_main
from nuwa_jax.host_memory import keep_host_memory

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is stored; may exist already.")
# How several processes find each other. TPU pods, srun and mpirun of Open MPI 4 need nothing of it
# (nuwa_jax/parallel/distributed.py).
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens.")
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the job; an error if fewer come. 1: this one alone."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all processes.")
PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout", 30, "Seconds without a sign of life after which a process is taken as lost."
)
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the config and exit.")


def main(argv: Sequence[str]) -> None:
    """Flags to config to one call."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    if CONFIG.value is None:
        raise UserError("give --config=FILE, for example --config=configs/tiny.py")
    if PRINT_CONFIG.value:
        print(CONFIG.value)
        return
    if not WORKDIR.value:
        raise UserError("give --workdir=DIR, where the run is to be stored")

    from nuwa_jax.parallel.distributed import Launch, job

    keep_host_memory()
    config = CONFIG.value
    launch = Launch(
        COORDINATOR.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        join_timeout=JOIN_TIMEOUT.value,
        peer_timeout=PEER_TIMEOUT.value,
    )
    with job(launch) as process:
        from nuwa_jax.generation.stage_samples import StageSamples
        from nuwa_jax.generation.weights import load_model
        from nuwa_jax.training.loop import train
        from nuwa_jax.training.stopping import exit_after
        from nuwa_jax.watching.compile_cache import use_compile_cache

        use_compile_cache(config.train.compile_cache, below=WORKDIR.value)
        sample_fn = StageSamples(config) if config.train.sample_every else None
        initial = None
        if config.train.init_from:
            initial = lambda: load_model(config.train.init_from).params  # noqa: E731
        result = train(config, WORKDIR.value, sample_fn, initial)
    if result.signal is not None:
        told = f"stopped in {result.stage} after step {result.step}: run again to go on"
    else:
        told = f"done: {WORKDIR.value}"
    if process == 0:
        print(told, flush=True)
    if result.signal is not None:
        exit_after(result.signal)


def read_flags(argv: Sequence[str]) -> list[str]:
    """Reads the flags before `run_main` does, as it cannot catch what config files raise.

    Returns:
      What is left for `run_main`: reading an override twice is an error.
    """
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)
        file = config_flags.get_config_filename(flags.FLAGS["config"]) if CONFIG.present else ""
        if file and not Path(file.partition(":")[0]).is_file():
            raise UserError(f"--config={file}: there is no such file")
    except (flags.Error, UserError, OSError, AttributeError, KeyError, TypeError) as error:
        # What a config file raises arrives wrapped; its own words are the innermost ones.
        told: BaseException = error
        inner = error.__context__
        while inner is not None:
            told = inner if isinstance(inner, UserError) else told
            inner = inner.__context__
        message = str(told).replace("\\n", " ").replace("\\'", "'")
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    return rest


if __name__ == "__main__":
    sys.argv = read_flags(sys.argv)
    run_main(main)
