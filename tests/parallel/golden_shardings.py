"""Where every parameter of the models for pods lies, on three meshes, as files to compare with.

python tests/parallel/golden_shardings.py    writes tests/parallel/golden/*.json anew

A line is the path with its numbers as *, the shape, how many parameters that is, and the axis along
each dimension. Parameters that stay whole for being small are counted in one line.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = ("pod_svd", "pod_nuwa")
MESHES = {
    "fsdp": dict(data=16, fsdp=16, frame=1, tensor=1),
    "tensor": dict(data=4, fsdp=16, frame=1, tensor=4),
    "frame": dict(data=1, fsdp=64, frame=2, tensor=2),
}


def lines(params, sizes):
    """The lines of a golden file, for a tree of shapes."""
    from flax.traverse_util import flatten_dict

    from nuwa_jax.parallel import sharding

    table, small = {}, 0
    for path, leaf in flatten_dict(params, sep="/").items():
        spec = sharding.partition_spec(path, leaf.shape, sizes)
        if math.prod(leaf.shape) < sharding.MIN_SIZE and not any(spec):
            small += 1
            continue
        axes = [*spec, *[None] * (len(leaf.shape) - len(spec))]
        where = " ".join(axis or "-" for axis in axes)
        shape = "x".join(map(str, leaf.shape))
        key = (re.sub(r"\d+", "*", path), shape, where)
        table[key] = table.get(key, 0) + 1
    rows = [f"{path} {shape}: {n} as {where}" for (path, shape, where), n in table.items()]
    return [f"{small} small ones whole", *sorted(rows)]


def golden_file(config, mesh):
    return GOLDEN / f"{config}_{mesh}.json"


def main():
    from nuwa_jax.parallel.programs import abstract_params
    from nuwa_jax.presets import load_preset

    GOLDEN.mkdir(exist_ok=True)
    for config in CONFIGS:
        params = abstract_params(load_preset(config))
        for mesh, sizes in MESHES.items():
            made = {"mesh": sizes, "parameters": lines(params, sizes)}
            golden_file(config, mesh).write_text(json.dumps(made, indent=0) + "\n")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
