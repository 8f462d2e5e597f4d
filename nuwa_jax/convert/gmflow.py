"""Published weights of GMFlow (`scale2`) to the file that `nuwa_jax.estimation` reads.

The names are those of the authors' code, in its own files (checkpoint["model"], from parallel
training with "module." before them) as in those of packages that ship the bare weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from nuwa_jax.convert.released import Report, check_named, check_shapes
from nuwa_jax.convert.rules import Row, leaves, read_leaf
from nuwa_jax.convert.torch_file import open_tensors
from nuwa_jax.errors import UserError
from nuwa_jax.models.gmflow import FORMAT, GMFlow, GMFlowConfig
from nuwa_jax.tensor_files import Spec, write_safetensors

PARALLEL = "module."  # what PyTorch's parallel training puts before every name


def convert_gmflow(path: str | Path, out: str | Path) -> Report:
    """Writes GMFlow's parameters in float32, with its sizes in the file's metadata.

    Args:
      path: of the published weights; .safetensors needs nothing, other endings need PyTorch.
      out: the .safetensors file to write.

    Raises:
      UserError: the file cannot be read, or an array of it is left over, missing or misshapen.
    """
    out = Path(out)
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"GMFlow becomes one file: --out ends in .safetensors, got {out}")
    source = open_tensors(path)
    shapes = {name.removeprefix(PARALLEL): spec.shape for name, spec in source.specs.items()}
    stored = {name.removeprefix(PARALLEL): name for name in source.specs}
    if len(stored) < len(source.specs):
        raise UserError(f"{path} has names both with and without {PARALLEL}: it is two models")
    config = infer_gmflow(shapes)
    table = leaves(gmflow_rows(config))
    wanted = parameter_shapes(config)
    made = {name: table[name] for name in wanted}
    used = {name for leaf in made.values() for name in leaf.theirs}
    check_named(
        "GMFlow's scale2 variant, the one that is supported",
        {
            "arrays are missing": sorted(used - shapes.keys()),
            "are left over": [name for name in shapes if name not in used],
        },
    )
    check_shapes(made, shapes, wanted)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in made.items():
            yield name, read_leaf(lambda n: source.read(stored[n]).astype(np.float32), leaf)

    specs = {name: Spec(shape, np.dtype(np.float32)) for name, shape in wanted.items()}
    metadata = {"format": FORMAT, "config": json.dumps(dataclasses.asdict(config))}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, specs, arrays(), metadata)
    return Report(
        source=str(path),
        family="GMFlow",
        mapped=len(used),
        folded=0,
        kept_apart=0,
        ignored={},
        parameters={"gmflow": sum(int(np.prod(shape)) for shape in wanted.values())},
        dtype="float32",
        bytes=out.stat().st_size,
    )


def infer_gmflow(shapes: Mapping[str, tuple[int, ...]]) -> GMFlowConfig:
    """The sizes that these shapes tell; the published ones where an array is missing."""
    default = GMFlowConfig()

    def outputs(name: str, otherwise: int) -> int:
        return shapes.get(name, (otherwise,))[0]

    stem = tuple(
        outputs(f"backbone.layer{i}.0.conv1.weight", channels)
        for i, channels in enumerate(default.stem, 1)
    )
    width = outputs("backbone.conv2.weight", default.width)
    block = "transformer.layers.{}.cross_attn_ffn.mlp.0.weight"
    layers = sum(block.format(i) in shapes for i in range(len(shapes)))
    hidden = outputs(block.format(0), 2 * width * default.mlp_ratio)
    return GMFlowConfig(
        stem=stem,
        width=width,
        layers=layers or default.layers,
        mlp_ratio=max(1, hidden // (2 * width)),
        upsampler_width=outputs("upsampler.0.weight", default.upsampler_width),
    )


def parameter_shapes(config: GMFlowConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by path."""
    picture = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(GMFlow(config).init, jax.random.key(0), picture, picture)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def gmflow_rows(config: GMFlowConfig) -> list[Row]:
    """Which module of ours is which of theirs; "patches" are convolutions without bias."""
    names = [
        ("backbone/conv_in", "patches", "backbone.conv1"),
        ("backbone/conv_out", "conv", "backbone.conv2"),
        ("backbone/scales", "patches", "backbone.trident_conv"),
        ("propagation/to_q", "linear", "feature_flow_attn.q_proj"),
        ("propagation/to_k", "linear", "feature_flow_attn.k_proj"),
        ("upsampler/conv", "conv", "upsampler.0"),
        ("upsampler/weights", "pointwise", "upsampler.2"),
    ]
    for level in range(len(config.stem)):
        for i in range(2):
            ours, theirs = f"backbone/res_{level}_{i}", f"backbone.layer{level + 1}.{i}"
            names += [
                (f"{ours}/conv1", "patches", f"{theirs}.conv1"),
                (f"{ours}/conv2", "patches", f"{theirs}.conv2"),
                (f"{ours}/shortcut", "conv", f"{theirs}.downsample.0"),
            ]
    for i in range(config.layers):
        for kind, block in (("self", "self_attn"), ("cross", "cross_attn_ffn")):
            ours, theirs = f"transformer/{kind}_{i}", f"transformer.layers.{i}.{block}"
            names += [
                *((f"{ours}/to_{x}", "matrix", f"{theirs}.{x}_proj") for x in "qkv"),
                (f"{ours}/to_out", "matrix", f"{theirs}.merge"),
                (f"{ours}/norm1", "norm", f"{theirs}.norm1"),
                (f"{ours}/mlp_1", "matrix", f"{theirs}.mlp.0"),
                (f"{ours}/mlp_2", "matrix", f"{theirs}.mlp.2"),
                (f"{ours}/norm2", "norm", f"{theirs}.norm2"),
            ]
    return [Row(ours, layout, theirs, None) for ours, layout, theirs in names]
