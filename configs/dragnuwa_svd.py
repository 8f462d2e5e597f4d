"""DragNUWA 1.5: Stable Video Diffusion with a flow encoder; the sizes of the released weights.

python train.py --config=configs/dragnuwa_svd.py --workdir=runs/svd --config.data.clips=records

14 frames of 320x576, CLIP image embedding as context, no text, Gaussian 199 / σ 20, 25 Euler steps,
guidance of the image 1.0 to 2.5 over the frames; text and drag are in both branches, as released.
`--config=configs/dragnuwa_svd.py:small` is the same at widths and sizes that a CPU can step.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """The config, or its `small` variant."""
    c = common.full_size()
    c.preset = "dragnuwa_svd"
    c.data.fps = 4.0
    # Drawn at whole pixels, as the released weights saw it.
    c.raster = ConfigDict(dict(sigma=20.0, kernel_size=199, snap=True))
    c.model.flow_encoder = ConfigDict(dict(injection="film", where="encoder+decoder"))
    c.model.image_encoder = ConfigDict()
    c.model.vector = ("fps", "motion_bucket", "augmentation")
    c.model.motion_bucket = 4.0
    c.model.augmentation = 0.02
    c.model.image_concat_raw = True
    c.model.image_mask = False
    # The autoencoder and the base come with the released weights.
    c.curriculum = ("flow", "drag")
    c.sampling.guidance = ConfigDict(dict(text=None, image=(1.0, 2.5), drag=None))
    return common.variant(c, arg, "configs/dragnuwa_svd.py")
