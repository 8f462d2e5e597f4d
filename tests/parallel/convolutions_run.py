"""Prints how far gradients of convolutions on a mesh are from those on one device, as JSON."""

import itertools
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))
jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from nuwa_jax.models import products  # noqa: E402
from nuwa_jax.models.layers import TemporalConv, conv2d  # noqa: E402
from nuwa_jax.models.partition import by_frames, by_pixels  # noqa: E402
from nuwa_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh  # noqa: E402

LAYERS = {
    "temporal": TemporalConv(8),
    "stride 1": conv2d(8, name=None, dtype=jnp.float32),
    "stride 2": conv2d(8, stride=2, name=None, dtype=jnp.float32),
}


def of_frames(layer, params, x):
    """A layer of pictures, for a video [b t h w c]."""
    out = layer.apply(params, x.reshape(-1, *x.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])


def gradients(layer, before, after, params, x):
    """To the parameters and to the input."""

    def loss(params, x):
        x = before(jnp.tanh(x))
        temporal = isinstance(layer, TemporalConv)
        out = layer.apply(params, x) if temporal else of_frames(layer, params, x)
        return jnp.mean(jnp.sin(after(out)) ** 2)

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


if __name__ == "__main__":
    mesh = make_mesh(MeshConfig(data=1, frame=2, tensor=2))
    found = {}
    for platform, size in itertools.product(("cpu", "tpu"), ((4, 4, 6), (3, 2, 3))):
        products.platform = lambda platform=platform: platform
        x = np.random.default_rng(0).normal(size=(2, *size, 8)).astype(np.float32)
        for name, layer in LAYERS.items():
            params = layer.init(jax.random.key(0), x if name == "temporal" else x[:, 0])
            for before, after in ((by_frames, by_pixels), (by_pixels, by_frames)):
                alone = gradients(layer, before, after, params, x)
                with use_mesh(mesh):
                    divided = gradients(layer, before, after, params, x)
                key = " ".join((platform, name, str(size), before.__name__, after.__name__))
                found[key] = max(
                    float(np.linalg.norm(a - b) / np.linalg.norm(a))
                    for a, b in zip(alone, divided, strict=True)
                )
    print(json.dumps(found))
