"""The small model that the package ships: 64x64, 8 frames, procedural scenes.

python train.py --config=configs/tiny.py --workdir=runs/tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; it has no variants."""
    if arg:
        raise ValueError(f"configs/tiny.py has no variant {arg!r}: use it without one")
    c = common.base()
    c.preset = "nuwa"
    c.model.autoencoder = ConfigDict(
        dict(
            base_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            latent_channels=16,
            patch_size=4,
            scale=1.0,
            quant_conv=False,
        )
    )
    c.model.unet = ConfigDict(
        dict(
            model_channels=64,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_factors=(1,),
            head_channels=32,
            ff_multiplier=2,
        )
    )
    c.model.flow_encoder = ConfigDict(
        dict(injection="film", where="encoder+decoder", channel_scale=0.5, patch_size=4)
    )
    c.model.drag = ConfigDict(dict(forms=("tokens",), levels=(0,), token_channels=128, heads=4))
    c.model.text = ConfigDict(dict(channels=64, layers=1, heads=2, max_length=64))
    return c
