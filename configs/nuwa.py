"""The default model: flow encoder, drag tokens, four stages, on prepared real clips.

python -m nuwa_jax.data.webvid --csv=F.csv --root=DIR --out=records --height=320 --width=576 \\
    --min_frames=14
python train.py --config=configs/nuwa.py --workdir=runs/nuwa --config.data.clips=records

`--config=configs/nuwa.py:small` is the same at widths and sizes that a CPU can step.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """The config, or its `small` variant."""
    c = common.full_size()
    c.preset = "nuwa"
    c.model.flow_encoder = ConfigDict(dict(injection="film", where="encoder+decoder"))
    c.model.drag = ConfigDict(
        dict(forms=("tokens",), levels=(0, 1, 2), token_channels=512, heads=8)
    )
    c.model.text = ConfigDict(dict(channels=1024, layers=6, heads=16, max_length=256))
    c.model.autoencoder.scale = 1.0  # measured after the autoencoder stage
    c.data.flip_probability = 0.5
    c.stages.drag.dense_to_sparse = (0.5, 0.0)
    return common.variant(c, arg, "configs/nuwa.py")
