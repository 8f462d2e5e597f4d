"""Clips that move, and the options under which they are accepted."""

from nuwa_jax.data.prepare import ClipOptions
from nuwa_jax.data.scenes import SceneConfig, render_scene

OPTIONS = ClipOptions(height=48, width=64, frames=7, min_frames=5, max_tracks=48, min_motion=0.01)


def moving_scene(seed, frames=21):
    config = SceneConfig(
        height=96,
        width=128,
        frames=frames,
        displacement=(0.4, 0.6),
        diameter=(0.4, 0.6),
        still_probability=0.0,
        pan_probability=1.0,
        supersample=1,
    )
    return render_scene(seed, config).video
