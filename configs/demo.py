"""What `make demo` trains from nothing in about eight minutes: 32x32, 8 frames.

python train.py --config=configs/demo.py --workdir=runs/demo

Every stage has a time budget: it ends after its minutes, whatever it has reached by then.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; it has no variants."""
    common.no_variants(arg, "configs/demo.py")
    c = tiny.get_config()
    c.data.height = c.data.width = 32
    c.data.scenes.max_sprites = 2
    c.data.sampler.max_count = 4
    c.data.max_drags = 4
    c.raster.update(sigma=2.0, kernel_size=17)
    budgets = {"autoencoder": 1.5, "text_to_video": 1.5, "flow": 0.8, "drag": 4.2}
    for name, minutes in budgets.items():
        c.stages[name].update(steps=100_000, time_budget_minutes=minutes, batch_size=16)
    c.train.ema_decay = 0.99
    return c
