"""What a run shows of itself now and then: held-out clips beside what the model makes of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import held_out_scene
from nuwa_jax.generation.generator import Generator
from nuwa_jax.generation.weights import Model
from nuwa_jax.models.video_ldm import VideoLDM, to_float, to_uint8
from nuwa_jax.motion.schedules import at_end
from nuwa_jax.motion.trajectory_samplers import sample_trajectories
from nuwa_jax.parallel.sharding import to_host
from nuwa_jax.training.curriculum import Params, Stage

NUM_SAMPLES = 4


class StageSamples:
    """Clips of two pictures, the truth above, below it what the model makes.

    For an autoencoder that is its reconstruction; otherwise a sample from the first frame, the
    caption and, in stages that see motion, a few of the clip's tracks as drags.
    """

    def __init__(self, config: Any) -> None:
        """Renders the clips; nothing is compiled before the first call."""
        self._config = config
        data = DataConfig.from_config(config.data)
        scenes = [held_out_scene(index, data) for index in range(NUM_SAMPLES)]
        self._video = np.stack([scene.video for scene in scenes])
        self._text = [scene.caption for scene in scenes]
        sampler = at_end(data.sampler)  # the same clips and drags throughout the run
        drags = [
            sample_trajectories(
                scene.tracks,
                np.random.default_rng(index),
                sampler,
                data.height,
                data.width,
                scene.track_object,
            ).pad(data.max_drags)
            for index, scene in enumerate(scenes)
        ]
        self._points = np.stack([drag.points for drag in drags])
        self._state = np.stack([drag.state for drag in drags])
        self._generator: Any = None
        model = VideoLDM.from_config(config.model)

        @jax.jit
        def reconstruct(params: Params, video: jax.Array) -> jax.Array:
            decoded = model.decode(params, model.encode(params, to_float(video)))
            return to_uint8(decoded)

        self._reconstruct = reconstruct

    def __call__(self, params: Params, stage: Stage) -> UInt8[np.ndarray, "b t h w 3"]:
        """Clips twice as high as the model's, at its size otherwise."""
        if stage.objective == "reconstruct":
            made = to_host(self._reconstruct(params, self._video))
        else:
            made = self._sample(params, with_drags=stage.condition != "none")
        return np.concatenate([self._video, made], axis=2)

    def _sample(self, params: Params, *, with_drags: bool) -> UInt8[np.ndarray, "b t h w 3"]:
        if self._generator is None:
            self._generator = Generator(Model(params, self._config, "training"))
        # One generator, so that its compiled sampler serves the whole run.
        self._generator.params = params
        return self._generator.generate(
            self._video[:, 0],
            self._points if with_drags else None,
            self._state if with_drags else None,
            self._text,
        )
