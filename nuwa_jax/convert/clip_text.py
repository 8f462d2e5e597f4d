"""CLIP's text tower in released checkpoints: names of its arrays, sizes off their shapes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping

from nuwa_jax.convert.rules import CLIP_BLOCK, Family, Row, leaves
from nuwa_jax.errors import UserError
from nuwa_jax.models.clip_text import ClipTextConfig

HEAD_CHANNELS = 64  # of every published text tower
# What begins the names in files that hold nothing but the tower, in either family.
PREFIX: dict[Family, str] = {"sgm": "", "hf": "text_model."}


def clip_text_rows(
    config: ClipTextConfig, *, sgm: str = PREFIX["sgm"], hf: str = PREFIX["hf"]
) -> list[Row]:
    """CLIP's text tower.

    Args:
      config: its sizes.
      sgm: what its names begin with in files of OpenCLIP and of Stability's code; in Stable
        Diffusion 2's "cond_stage_model.model.".
      hf: the same in Hugging Face's files; "" in what transformers 5 writes of a tower without
        projection. (The projection is beside "text_model.", not below it.)
    """
    rows = [
        Row("tokens/embedding", "embedding", "token_embedding", "embeddings.token_embedding"),
        Row(
            "positions",
            "table",
            "positional_embedding",
            "embeddings.position_embedding",
            "embedding",
        ),
        Row("norm_out", "norm", "ln_final", "final_layer_norm"),
    ]
    rows = [row._replace(sgm=sgm + row.sgm, hf=hf + row.hf) for row in rows]
    for i in range(config.layers):
        rows += _block_rows(i, sgm, hf)
    if config.projection:
        theirs = (prefix + "text_projection" for prefix in (sgm, hf.removesuffix("text_model.")))
        rows.append(Row("projection", "bare matrix", *theirs, "matrix"))
    return rows


def infer_clip_text(
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    *,
    prefix: str | None = None,
    heads: int | None = None,
    activation: str = "gelu",
    layer: str = "last",
    padding: str = "zero",
) -> ClipTextConfig:
    """The config of the text tower whose arrays have these shapes.

    Args:
      shapes: of all arrays of a checkpoint; those of other networks do not matter.
      family: which names these are.
      prefix: what the tower's names begin with; by default it is found (`text_prefix`).
      heads: of attention; by default one per 64 channels.
      activation: leaves no trace in shapes, as do the next two (`ClipTextConfig`).
      layer: see `activation`.
      padding: see `activation`.

    Raises:
      UserError: there is no whole text tower, or there are several.
    """
    prefix = text_prefix(shapes, family) if prefix is None else prefix
    prefixes = PREFIX | {family: prefix}
    table = leaves(clip_text_rows(ClipTextConfig(layers=1), **prefixes), family)

    def shape(path: str) -> tuple[int, ...]:
        (name,) = table[path].theirs
        if name not in shapes:
            # SVD's files keep the embeddings of a text tower whose blocks were thrown away.
            raise UserError(
                f"the checkpoint has no {name}: CLIP's text encoder is not in it, or only a part; "
                "give a checkpoint that has it all"
            )
        return shapes[name]

    vocabulary, width = shape("tokens/embedding")
    hidden = shape("block_0/mlp_1/kernel")[0]
    norms = (
        leaves(_block_rows(i, **prefixes), family)[f"block_{i}/norm1/scale"].theirs[0]
        for i in itertools.count()
    )
    layers = sum(1 for _ in itertools.takewhile(shapes.__contains__, norms))
    projection = 0
    if table["projection/kernel"].theirs[0] in shapes:
        projection = shape("projection/kernel")[0 if family == "hf" else 1]
    return ClipTextConfig(
        width=width,
        layers=layers,
        heads=heads or max(1, width // HEAD_CHANNELS),
        max_length=shape("positions")[0],
        vocabulary=vocabulary,
        projection=projection,
        mlp_ratio=hidden // width,
        activation=activation,
        layer=layer,
        padding=padding,
    )


def text_prefix(names: Iterable[str], family: Family) -> str:
    """What the names of the only text tower among `names` begin with.

    Raises:
      UserError: there is none, or there are several.
    """
    tail = {"sgm": r"(?<!embeddings\.)", "hf": r"embeddings\."}[family]
    pattern = re.compile(rf"(|.*[./]){tail}token_embedding\.weight")
    found = sorted(match[1] for name in names if (match := pattern.fullmatch(name)))
    if len(found) != 1:
        raise UserError(
            f"expected one text encoder of CLIP, found {found or 'none'}: "
            + ("say which by its prefix" if found else "give a checkpoint that has one")
        )
    return found[0]


def _block_rows(i: int, sgm: str, hf: str) -> list[Row]:
    return [
        row._replace(
            ours=f"block_{i}/{row.ours}",
            sgm=f"{sgm}transformer.resblocks.{i}.{row.sgm}",
            hf=f"{hf}encoder.layers.{i}.{row.hf}",
        )
        for row in CLIP_BLOCK
    ]
