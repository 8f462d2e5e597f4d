"""A model of text, image and drag for a pod, trained from nothing; its U-Net has 1.56 B parameters.

With text encoder, flow encoder and drag tokens 1.75 B train in the drag stage. As configs/nuwa.py,
on latents that were made beforehand with an autoencoder of its size (the `autoencoder` stage of
configs/nuwa.py, exported); memory, arithmetic and time by the compiler's estimates:
docs/scaling.md. Once, on any machine:

python -m nuwa_jax.generation.precompute --checkpoint=autoencoder --records=clips \\
    --out=latents --notext
python -m nuwa_jax.parallel.aot --config=configs/pod_nuwa.py --topology=v5e:16x16

Then with RUN short for

    python train.py --config=configs/pod_nuwa.py --workdir=gs://BUCKET/run \\
        --config.data.clips=gs://BUCKET/latents --config.train.init_from=autoencoder

TPU VMs   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \\
              --command="cd nuwa_jax && RUN"
GKE       xpk workload create --cluster=CLUSTER --workload=nuwa --tpu-type=v5litepod-256 \\
              --num-slices=1 --docker-image=IMAGE --command="RUN"      (a JobSet)
SLURM     srun --nodes=32 --ntasks-per-node=8 RUN --config.mesh.fsdp=8     (8 GPUs in each node)

With N slices add --num-slices=N, --config.mesh.slices=N and, for every stage of the curriculum,
--config.stages.STAGE.batch_size=256*N: `data` then crosses the network between them.
`--config=configs/pod_nuwa.py:small` is the same at widths and sizes that a CPU can step.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, nuwa


def get_config(arg: str | None = None) -> ConfigDict:
    """The config, or its `small` variant."""
    return common.variant(common.pod(nuwa.get_config()), arg, "configs/pod_nuwa.py")
