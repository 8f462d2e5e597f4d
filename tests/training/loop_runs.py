"""Short runs of the training loop with a stand-in for the model, and their batches watched."""

from micro_config import get_config

from nuwa_jax.data.pipeline import make_batches


def short_config(*curriculum):
    config = get_config()
    config.curriculum = curriculum or ("text_to_video", "drag")
    config.train.log_every = 1
    return config


class Watched:
    """Batches of which every draw goes through `draw(batches, number of the draw)`."""

    def __init__(self, batches, draw):
        self._batches, self._draw, self._count = batches, draw, 0

    def __getattr__(self, name):
        return getattr(self._batches, name)

    def __next__(self):
        self._count += 1
        return self._draw(self._batches, self._count)


def watch(monkeypatch, draw):
    monkeypatch.setattr(
        "nuwa_jax.training.loop.make_batches",
        lambda *args, **kwargs: Watched(make_batches(*args, **kwargs), draw),
    )
