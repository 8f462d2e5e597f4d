"""One of CLIP's two towers alone, out of an OpenCLIP file or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from nuwa_jax.convert.architecture import infer_clip_vision
from nuwa_jax.convert.clip_text import clip_text_rows, infer_clip_text, text_prefix
from nuwa_jax.convert.released import Report, check_named, check_shapes, open_part
from nuwa_jax.convert.rules import Family, Row, clip_rows, leaves, read_leaf
from nuwa_jax.convert.torch_file import open_tensors
from nuwa_jax.generation.weights import CONFIG, WEIGHTS
from nuwa_jax.models.clip import ClipVision, ClipVisionConfig
from nuwa_jax.models.clip_text import ClipText
from nuwa_jax.tensor_files import Spec, write_safetensors


def convert_tower(
    path: str | Path,
    out: str | Path,
    tower: str,
    *,
    dtype: str = "float32",
    heads: int | None = None,
    **untold: str,
) -> Report:
    """Writes one tower's parameters, for `train.init_from`, and the config section that fits them.

    Args:
      path: a file of OpenCLIP (ViT-H/14 or another), or a file or folder of transformers.
      out: folder for model.safetensors and config.json.
      tower: "image_encoder" or "text".
      dtype: of the weights written.
      heads: of attention; by default as many as published towers have.
      untold: what no shape tells of a text tower (`infer_clip_text`).

    Raises:
      UserError: the tower is not in the file, or not all of it.
    """
    source = open_part(Path(path), "model") if Path(path).is_dir() else open_tensors(path)
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    hf = any(name.startswith(("text_model.", "vision_model.", "embeddings.")) for name in shapes)
    family: Family = "hf" if hf else "sgm"
    if tower == "text":
        prefix = text_prefix(shapes, family)
        text = infer_clip_text(shapes, family, prefix=prefix, heads=heads, **untold)
        rows = clip_text_rows(text, **{family: prefix})
        section = {"kind": "clip", **dataclasses.asdict(text)}
        module, example = ClipText(text), jnp.zeros((1, text.max_length), jnp.int32)
    else:
        section = infer_clip_vision(shapes, family, heads)
        vision = ClipVisionConfig(**section)
        rows = clip_rows(vision, prefix="visual")
        module = ClipVision(vision)
        example = jnp.zeros((1, vision.image_size, vision.image_size, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    wanted = {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}
    return _write(path, out, tower, source, family, rows, wanted, section, dtype)


def _write(
    path: str | Path,
    out: str | Path,
    tower: str,
    source: Any,
    family: Family,
    rows: list[Row],
    wanted: dict[str, tuple[int, ...]],
    section: dict[str, Any],
    dtype: str,
) -> Report:
    table = leaves(rows, family)
    made = {name: table[name] for name in wanted}
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    used = {name for leaf in made.values() for name in leaf.theirs}
    missing = [name for name in used if name not in shapes]
    # The file may hold the other tower; nothing of this one may be left.
    own = {name.partition(".")[0] for name in used}
    left_over = [
        name
        for name in shapes
        if name.partition(".")[0] in own and name not in used and not name.endswith("position_ids")
    ]
    check_named(
        f"CLIP's {tower}", {"arrays are missing": sorted(missing), "are left over": left_over}
    )
    check_shapes(made, shapes, wanted)
    target = np.dtype(jnp.dtype(dtype))
    specs = {f"{tower}/{name}": Spec(shape, target) for name, shape in wanted.items()}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in made.items():
            yield f"{tower}/{name}", read_leaf(source.read, leaf).astype(target)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / WEIGHTS, specs, arrays())
    config = ml_collections.ConfigDict({"model": {tower: section}})
    (out / CONFIG).write_text(config.to_json(indent=1) + "\n")
    others = len(shapes) - len(used)
    return Report(
        source=str(path),
        family=family,
        mapped=len(used),
        folded=0,
        kept_apart=0,
        ignored={"the other tower, and constants": others} if others else {},
        parameters={tower: sum(int(np.prod(shape)) for shape in wanted.values())},
        dtype=dtype,
        bytes=(out / WEIGHTS).stat().st_size,
    )
