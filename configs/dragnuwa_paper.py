"""DragNUWA as its paper describes it (arXiv 2308.08089): no drag tokens, dense then sparse flow.

python train.py --config=configs/dragnuwa_paper.py --workdir=runs/paper --config.data.clips=records

From the paper: trajectory sampler with λ = 16 and at most 8 tracks, Gaussian 99 / σ 10, multiscale
FiLM of the flow (§3.3), 576x320x16, batch 128, learning rate 5e-6 (Table 1). Not in the paper, and
ours: the backbone's details, the dropping of conditions, the autoencoder.
`--config=configs/dragnuwa_paper.py:small` is the same at widths and sizes that a CPU can step.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """The config, or its `small` variant."""
    c = common.full_size()
    c.preset = "dragnuwa_paper"
    c.data.frames = 16
    c.data.sampler = ConfigDict(dict(kind="grid", spacing=16.0, max_count=8))
    c.data.drags_on = ConfigDict(dict(object=0.0, camera=0.0, both=1.0))  # wherever the grid is
    c.data.perturb = ConfigDict(dict(jitter=0.0, tail_dropout=0.0, subsample_probability=0.0))
    c.raster = ConfigDict(dict(sigma=10.0, kernel_size=99))
    c.model.flow_encoder = ConfigDict(dict(injection="film", where="encoder+decoder"))
    c.model.text = ConfigDict(dict(channels=1024, layers=6, heads=16, max_length=256))
    c.model.autoencoder.scale = 1.0
    for stage in c.stages.values():
        stage.batch_size = 128
        stage.learning_rate = 5e-6
    c.stages.autoencoder.learning_rate = 1e-4
    # The paper trains the whole network in both of its stages, on dense then on sparse flow.
    c.stages.flow.rules = c.stages.drag.rules
    return common.variant(c, arg, "configs/dragnuwa_paper.py")
