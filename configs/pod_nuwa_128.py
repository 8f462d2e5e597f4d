"""configs/pod_nuwa.py with widths that are multiples of 128, for the TPU's matrix unit.

384, 768, 1152, 1152 channels in place of 320, 640, 1280, 1280, and heads of 128 in place of 64:
the U-Net has 1.46 B parameters, 1.63 B train in the drag stage. What padding wastes of both:
docs/scaling.md. Latents are made as for configs/pod_nuwa.py. With RUN short for

    python train.py --config=configs/pod_nuwa_128.py --workdir=gs://BUCKET/run \\
        --config.data.clips=gs://BUCKET/latents --config.train.init_from=autoencoder

TPU VMs   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \\
              --command="cd nuwa_jax && RUN"
GKE       xpk workload create --cluster=CLUSTER --workload=nuwa --tpu-type=v5litepod-256 \\
              --num-slices=1 --docker-image=IMAGE --command="RUN"      (a JobSet)
SLURM     srun --nodes=32 --ntasks-per-node=8 RUN --config.mesh.fsdp=8     (8 GPUs in each node)

`--config=configs/pod_nuwa_128.py:small` is the same at widths and sizes that a CPU can step.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, pod_nuwa


def get_config(arg: str | None = None) -> ConfigDict:
    """The config, or its `small` variant."""
    c = pod_nuwa.get_config()
    c.model.unet.update(model_channels=384, channel_mult=(1, 2, 3, 3), head_channels=128)
    return common.variant(c, arg, "configs/pod_nuwa_128.py")
