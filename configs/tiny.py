"""The small model that the package ships: 64x64 pixels, 8 frames, procedural scenes.

python train.py --config=configs/tiny.py --workdir=runs/tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; it has no variants."""
    common.no_variants(arg, "configs/tiny.py")
    c = common.base()
    # Few, wide layers at 8x8 latents: XLA on CPU is at its best there.
    c.model.autoencoder = ConfigDict(
        dict(
            base_channels=64,
            channel_mult=(1, 1),
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
            channel_mult=(1,),
            num_res_blocks=1,
            attention_factors=(1,),
            head_channels=32,
            ff_multiplier=2,
            temporal_context=False,
        )
    )
    c.model.flow_encoder = ConfigDict(dict(injection="film", patch_size=4, flow_scale=0.25))
    c.model.drag = ConfigDict(
        dict(forms=("query_key", "tokens"), levels=(0,), token_channels=96, heads=4)
    )
    c.model.text = ConfigDict(dict(channels=64, layers=1, heads=2, max_length=64, stride=4))
    c.model.vector = ()

    c.raster = ConfigDict(dict(sigma=4.0, kernel_size=33))
    c.diffusion = ConfigDict(dict(p_mean=0.3, p_std=1.3, sigma_min=0.02, sigma_max=80.0))
    c.sampling.steps = 16
    c.sampling.method = "dpmpp_2m"
    c.sampling.temperature = 0.6
    c.sampling.guidance.drag = 2.0

    stages = c.stages
    stages.autoencoder.update(steps=2000, batch_size=4, learning_rate=1.5e-3)
    stages.text_to_video.update(steps=1000, batch_size=8, learning_rate=1e-3)
    stages.flow.update(steps=400, batch_size=8, learning_rate=1e-3)
    stages.drag.update(steps=3000, batch_size=8, learning_rate=1e-3)
    c.train.adam_b2 = 0.99
    c.train.decay_share = 0.3
    c.train.sample_every = 0
    return c
