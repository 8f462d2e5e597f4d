"""A whole run in seconds: 16x16 pixels, 3 frames, thin layers. Also a file for --config."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Every stage, 6 steps each; `small`: every kind of layer in the fewest blocks there can be."""
    c = common.base()
    c.data.height, c.data.width, c.data.frames = 16, 24, 3
    c.data.max_drags, c.data.text_length, c.data.threads = 2, 8, 1
    c.data.sampler = ConfigDict(dict(max_count=2))
    c.model.autoencoder = ConfigDict(
        dict(
            base_channels=8,
            channel_mult=(1,),
            num_res_blocks=1,
            latent_channels=4,
            patch_size=4,
            scale=1.0,
            quant_conv=False,
        )
    )
    c.model.unet = ConfigDict(
        dict(
            model_channels=8,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_factors=(1,),
            head_channels=8,
            ff_multiplier=1,
        )
    )
    c.model.flow_encoder = ConfigDict(
        dict(injection="film", where="decoder", channel_scale=0.25, patch_size=4)
    )
    c.model.drag = ConfigDict(dict(forms=("tokens",), levels=(0,), token_channels=8, heads=2))
    c.model.text = ConfigDict(dict(channels=8, layers=1, heads=2, max_length=8))
    for name in c.curriculum:
        stage = c.stages[name]
        stage.steps, stage.batch_size, stage.warmup_steps, stage.learning_rate = 6, 2, 2, 1e-3
    c.train.log_every, c.train.checkpoint_every, c.train.sample_every = 2, 3, 0
    c.train.calibration_batches = 2
    if arg == "small":
        c.model.unet.update(channel_mult=(1,), num_res_blocks=0)
    return c
