"""DragNUWA 1.5's layout on a pod: 2.37 B parameters, of which 1.64 B train in the drag stage.

As configs/dragnuwa_svd.py, on latents that were made beforehand; memory, arithmetic and time by the
compiler's estimates: docs/scaling.md. Once, on any machine:

python -m nuwa_jax.convert --from=drag_nuwa_svd.pth --out=released
python -m nuwa_jax.generation.precompute --checkpoint=released --records=clips --out=latents
python -m nuwa_jax.parallel.aot --config=configs/pod_svd.py --topology=v5e:16x16

Then with RUN short for

    python train.py --config=configs/pod_svd.py --workdir=gs://BUCKET/run \\
        --config.data.clips=gs://BUCKET/latents --config.train.init_from=released

TPU VMs   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \\
              --command="cd nuwa_jax && RUN"
GKE       xpk workload create --cluster=CLUSTER --workload=svd --tpu-type=v5litepod-256 \\
              --num-slices=1 --docker-image=IMAGE --command="RUN"      (a JobSet)
SLURM     srun --nodes=32 --ntasks-per-node=8 RUN --config.mesh.fsdp=8     (8 GPUs in each node)

With N slices add --num-slices=N, --config.mesh.slices=N and, for the stages flow and drag,
--config.stages.STAGE.batch_size=256*N: `data` then crosses the network between them.
`--config=configs/pod_svd.py:small` is the same at widths and sizes that a CPU can step.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, dragnuwa_svd


def get_config(arg: str | None = None) -> ConfigDict:
    """The config, or its `small` variant."""
    return common.variant(common.pod(dragnuwa_svd.get_config()), arg, "configs/pod_svd.py")
