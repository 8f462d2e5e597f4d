"""One host, with two virtual devices, of a run with the fake model.

python hosts_run.py HOST HOSTS PORT WORKDIR BATCHES

It dies after so many batches, if not 0, when the last checkpoint before that is there.
"""

import os
import sys
import time

import jax

HOST, HOSTS, PORT, WORKDIR, DIE_AFTER = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_num_cpu_devices", 2)
if HOSTS > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", HOSTS, HOST)

import fake_model  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

sys.path[:0] = [str(fake_model.ROOT)]

from micro_config import get_config  # noqa: E402

from nuwa_jax.data.pipeline import Batches  # noqa: E402
from nuwa_jax.parallel import sharding  # noqa: E402
from nuwa_jax.training import loop  # noqa: E402


def die_after(count: int) -> None:
    draw, left = Batches.__next__, iter(range(count))

    def dying(batches):
        if next(left, None) is None:
            while not os.path.exists(f"{WORKDIR}/stages/00_drag/{count // 2 * 2}"):
                time.sleep(0.01)  # checkpoints are written in the background
            os._exit(9)
        return draw(batches)

    Batches.__next__ = dying


if __name__ == "__main__":
    fake_model.install()
    sharding.MIN_SIZE = 1  # so that parameters as small as these are split, too
    if int(DIE_AFTER):
        die_after(int(DIE_AFTER))
    config = get_config()
    config.curriculum = ("drag",)
    config.mesh.update(data=-1, fsdp=2)
    config.stages.drag.batch_size = 4
    config.train.update(log_every=1, checkpoint_every=2)
    # They compile at the same time then: the first who sends does not wait for long.
    multihost_utils.sync_global_devices("start")
    loop.train(config, WORKDIR)
