"""Compiles a run's programs for a pod on a machine that has none, and says whether they fit.

python -m nuwa_jax.parallel.aot --config=configs/pod_svd.py --topology=v5e:16x16
python -m nuwa_jax.parallel.aot --config=configs/tiny.py --topology=v5e:2x2 --config.mesh.fsdp=4 \\
    --what=sample --json=report.json

It is the step that train.py runs (or the sampler), compiled by the TPU's own compiler from shapes
alone; libtpu has it and needs no TPU (`pip install 'nuwa_jax[tpu]'`). What is printed is what the
compiler allocated and scheduled, and estimates of time; nothing is measured. The full-size models
take 10 to 60 minutes and 10 GB of memory. `JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1.0` in the
environment compiles faster, and less well; `JAX_COMPILATION_CACHE_DIR` keeps what was compiled.

Exit code 0 if it fits, 1 if it does not, 2 if what was asked for makes no sense.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from nuwa_jax.errors import UserError, run_main
from nuwa_jax.parallel.topology import Topology, prepare_environment


def define_flags() -> None:
    """The flags of this program."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("topology", None, "Chips of a slice, as v5e:16x16, v5p:4x4x4, v6e:16x16.")
    flags.DEFINE_integer("slices", 0, "Slices; mesh.slices of the config by default.")
    flags.DEFINE_string("stage", None, "Whose step; the last of the curriculum by default.")
    flags.DEFINE_enum("what", "train", ["train", "sample"], "The step, or the sampler.")
    flags.DEFINE_string("json", None, "File to write the report to, besides printing it.")
    flags.DEFINE_bool("suggest", False, "If it does not fit: try changes, each a compilation.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call, and its report."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}: options start with --")
    if values.config is None or not values.topology:
        raise UserError(
            "give --config=FILE and --topology=CHIP:SHAPE, for example --config=configs/pod_svd.py "
            "--topology=v5e:16x16"
        )
    config = values.config
    if values.slices:
        config.mesh.slices = values.slices
    if config.data.clips_weight and not config.data.clips:
        config.data.clips = "none are read"
    topology = Topology.parse(values.topology, config.mesh.slices)
    prepare_environment()

    from nuwa_jax.parallel import advice, report

    made = report.compile_program(config, topology, values.what, values.stage)
    print(report.as_text(made), flush=True)
    tried = []
    if not made["memory"]["fits"]:
        told = advice.what_could_change(config, topology, values.what, values.stage)
        print(told, flush=True)
        if values.suggest:
            tried = advice.try_changes(config, topology, values.what, values.stage)
    if values.json:
        Path(values.json).write_text(json.dumps(made | {"tried": tried}, indent=1) + "\n")
    if not made["memory"]["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    run_main(main)
