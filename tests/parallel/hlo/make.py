"""Compiles small programs for a TPU and keeps their HLO, which the parser is tested on.

pip install 'nuwa_jax[tpu]'; python tests/parallel/hlo/make.py
"""

import functools
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[2])]

from nuwa_jax.parallel.topology import Topology, prepare_environment  # noqa: E402

prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from nuwa_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402


def scattered(w, x):
    """Gathers w [1024 512], bf16, and scatters its gradient, float32."""
    whole = jax.lax.all_gather(w.astype(jnp.bfloat16), "fsdp", axis=0, tiled=True)
    grad = jax.grad(lambda whole: jnp.sum(jnp.tanh(x @ whole) ** 2))(whole)
    return jax.lax.psum_scatter(grad.astype(jnp.float32), "fsdp", scatter_dimension=0, tiled=True)


def loop(w, x):
    """Seven times, gathers w [1024 512], bf16, and adds [512] over all; after it, once more."""

    def body(x, _):
        whole = jax.lax.all_gather(w.astype(jnp.bfloat16), "fsdp", axis=0, tiled=True)
        return jnp.tanh(jnp.tanh(x @ whole) @ whole.T), None

    x, _ = jax.lax.scan(body, x, length=7)
    return jax.lax.psum(jnp.sum(x.astype(jnp.float32), 0), "fsdp")


def exchanged(w, x):
    """Rows for columns, all-to-all; then a neighbour's."""
    del w
    x = jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True)
    return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])


def main():
    mesh = make_mesh(MeshConfig(fsdp=4), Topology.parse("v5e:2x2").devices())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P("fsdp")))
    args = array((1024, 512), jnp.float32), array((256, 1024), jnp.bfloat16)
    for program, out in ((scattered, P("fsdp")), (loop, P()), (exchanged, P("fsdp"))):
        mapped = jax.shard_map(
            program, mesh=mesh, in_specs=P("fsdp"), out_specs=out, check_vma=False
        )
        text = jax.jit(mapped).lower(*args).compile().as_text()
        head = text.index("\n\n%") if "\n\n%" in text else text.index("\n\nENTRY")
        # The tables of source lines, which tell of this machine.
        text = text.split("\n", 1)[0] + text[head:]
        text = re.sub(r" stack_frame_id=\d+", "", text)
        (HERE / f"{program.__name__}.hlo").write_text(text)


if __name__ == "__main__":
    main()
