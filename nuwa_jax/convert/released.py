"""From a released checkpoint to a folder that `sample.py` and `train.py` read."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from einops import EinopsError
from flax.traverse_util import flatten_dict

from nuwa_jax.convert.architecture import infer_model
from nuwa_jax.convert.lora import FoldedSource
from nuwa_jax.convert.rules import (
    Family,
    Leaf,
    autoencoder_rows,
    clip_rows,
    flow_rows,
    leaves,
    read_leaf,
    unet_rows,
)
from nuwa_jax.convert.torch_file import open_tensors
from nuwa_jax.errors import UserError
from nuwa_jax.generation.weights import CONFIG, FLOAT32_PARTS, WEIGHTS
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.presets import load_preset
from nuwa_jax.tensor_files import (
    JoinedSource,
    SafetensorsFile,
    Spec,
    TensorSource,
    write_safetensors,
)

# Arrays of the files that no sample depends on, and why.
UNUSED = (
    (r"^first_stage_model\.encoder\.", "a second copy of the encoder that is never run"),
    (
        r"^conditioner\.embedders\.3\.encoder\.(decoder|post_quant_conv|loss)\b",
        "the decoder of the conditioner's autoencoder, of which the encoder alone is run",
    ),
    (
        r"^conditioner\.embedders\.0\.open_clip\.model\."
        r"(positional_embedding|text_projection|logit_scale|token_embedding|ln_final|transformer)\b",
        "CLIP's text side; the model reads no text",
    ),
    (r"\.position_ids$", "0, 1, 2, ...: the index of each position"),
    (
        r"^guassian_filter\.",
        "the kernel that draws drags: its width and deviation go to config.raster",
    ),
)
# Folders of a diffusers pipeline -> what their main file may be called.
HF_FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "image_encoder": "model",
}
HF_FOLDERS = {"unet": "unet", "autoencoder": "vae", "image_encoder": "image_encoder"}
MAX_NAMED = 8  # names in an error


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every array of a checkpoint."""

    source: str
    family: str
    mapped: int
    folded: int
    kept_apart: int
    ignored: dict[str, int]
    parameters: dict[str, int]
    dtype: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """As JSON objects."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        total = sum(self.parameters.values())
        parts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        names = {"hf": "a diffusers folder", "sgm": "SGM"}.get(self.family, self.family)
        return [
            f"{self.source}: names of {names}",
            f"mapped {self.mapped}, LoRA folded {self.folded}, LoRA kept apart {self.kept_apart}, "
            f"ignored {sum(self.ignored.values())}, left over 0, missing 0",
            *(f"  ignored {count}: {reason}" for reason, count in self.ignored.items()),
            f"{total:,} parameters ({parts}) in {self.bytes:,} bytes of {self.dtype}",
        ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes parameters, decided from names and shapes alone.

    `leaves` says for each parameter which arrays it is made of, `shapes` its shape in our layout,
    `lora` the module of theirs for each low-rank update that is kept apart.
    """

    model: VideoLDM
    section: dict[str, Any]
    leaves: dict[str, Leaf]
    shapes: dict[str, tuple[int, ...]]
    lora: dict[str, str]
    folded: int
    ignored: dict[str, int]


def table(model: VideoLDM, family: Family) -> dict[str, Leaf]:
    """Path of each parameter of `model` -> arrays of a checkpoint of `family`.

    In a diffusers folder their names begin with the part's folder.
    """
    parts = {
        "unet": unet_rows(model.unet),
        "autoencoder": autoencoder_rows(model.autoencoder),
        "image_encoder": clip_rows(model.image_encoder),
    }
    if model.flow_encoder is not None:
        parts["flow_encoder"] = flow_rows(
            model.flow_encoder, model.unet, model.autoencoder.reduction
        )
    found = {}
    for part, rows in parts.items():
        folder = f"{HF_FOLDERS.get(part, part)}/" if family == "hf" else ""
        for path, leaf in leaves(rows, family).items():
            theirs = tuple(folder + name for name in leaf.theirs)
            found[f"{part}/{path}"] = leaf._replace(theirs=theirs)
    return found


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: VideoLDM) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by path, at no cost in memory."""
    side = model.autoencoder.reduction * 2 ** (len(model.unet.channel_mult) - 1)
    size = dict(height=side, width=side, frames=1)
    params = jax.eval_shape(lambda key: model.init(key, **size), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def make_plan(
    source: FoldedSource,
    family: Family,
    *,
    head_channels: int | None = None,
    clip_heads: int | None = None,
) -> Plan:
    """Finds the place of every array.

    Raises:
      UserError: arrays are left over or missing, or have another shape than their parameter; the
        message names them.
    """
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    section = infer_model(shapes, family, head_channels=head_channels, clip_heads=clip_heads)
    preset = load_preset("dragnuwa_svd").model
    _replace_sections(preset, section)
    model = VideoLDM.from_config(preset)
    wanted = parameter_shapes(model)
    rows = table(model, family)

    made = {path: rows[path] for path in wanted if path in rows}
    unnamed = [p for p in wanted if p not in rows and not p.startswith("latents/")]
    missing = [n for leaf in made.values() for n in leaf.theirs if n not in shapes] + unnamed
    used = {name for leaf in made.values() for name in leaf.theirs}
    ignored: Counter[str] = Counter()
    left_over = []
    for name in shapes:
        if name in used:
            continue
        reason = next((why for pattern, why in UNUSED if re.search(pattern, name)), None)
        if reason is None:
            left_over.append(name)
        else:
            ignored[reason] += len(source.stored_names(name))
    check_named(
        "a model of SVD's kind",
        {
            "arrays are missing": missing,
            "are left over": left_over,
            **source.faults(),
        },
    )
    check_shapes(made, shapes, wanted)
    lora = {}
    if not source.fold:
        for path, leaf in made.items():
            module = leaf.theirs[0].removesuffix(".weight")
            if module in source.modules and path.endswith("/kernel"):
                lora[path.removesuffix("/kernel")] = module
    folded = len(source.modules) if source.fold else 0
    return Plan(model, section, made, wanted, lora, folded, dict(ignored))


def check_named(kind: str, faults: Mapping[str, Sequence[str]]) -> None:
    """Raises a `UserError` that names what is wrong, if anything is."""
    told = [
        f"{len(names)} {what}: {', '.join(names[:MAX_NAMED])}"
        + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
        for what, names in faults.items()
        if names
    ]
    if told:
        raise UserError(f"the checkpoint does not fit {kind}: {'; '.join(told)}")


def check_shapes(
    made: Mapping[str, Leaf],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises a `UserError` for an array (`shapes`) that does not become what `wanted` says."""
    for path, leaf in made.items():
        zeros = {n: np.broadcast_to(np.int8(0), shapes[n]) for n in leaf.theirs}
        try:
            shape = read_leaf(zeros.__getitem__, leaf).shape
        except (ValueError, EinopsError) as error:  # another number of axes
            raise UserError(f"{leaf.theirs[0]} has the shape {shapes[leaf.theirs[0]]}") from error
        if shape != wanted[path]:
            raise UserError(
                f"{leaf.theirs[0]} is {shape} in our layout, but {path} of a model with the sizes "
                f"that other arrays tell is {wanted[path]}"
            )


def open_released(path: str | Path) -> tuple[TensorSource, Family, dict[str, int]]:
    """The arrays of a checkpoint, the family of their names, and sizes that its config.json tells.

    Args:
      path: a file in the names of SVD or DragNUWA 1.5, or a diffusers folder of SVD.

    Raises:
      UserError: it is neither.
    """
    path = Path(path)
    if not path.is_dir():
        source = open_tensors(path)
        if not any(name.startswith("model.diffusion_model.") for name in source.specs):
            shown = ", ".join(list(source.specs)[:3])
            raise UserError(
                f"{path} has no model.diffusion_model.* (it has {shown}, ...): give a checkpoint "
                "of SVD or DragNUWA 1.5, or a diffusers folder"
            )
        return source, "sgm", {}
    files = [(f"{part}/", open_part(path / part, stem)) for part, stem in HF_FILES.items()]
    return JoinedSource(files), "hf", _hf_hints(path)


def convert(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    fold_lora: bool = True,
    lora_scale: float = 1.0,
    size: tuple[int, int] = (320, 576),
    frames: int = 14,
    head_channels: int | None = None,
    clip_heads: int | None = None,
) -> Report:
    """Writes a released checkpoint as our weights and config, reading one array at a time.

    Args:
      path: see `open_released`.
      out: folder for model.safetensors and config.json.
      dtype: of the weights written; what is folded is summed in float32 before it is rounded.
      fold_lora: add low-rank updates to their matrices; else keep them apart, to be trained on.
      lora_scale: of the updates.
      size: height and width in pixels that the model is to be used at.
      frames: of the videos it is to make; SVD-XT was trained on 25.
      head_channels: see `infer_model`.
      clip_heads: see `infer_model`.

    Raises:
      UserError: the checkpoint cannot be read, or an array is left over or missing.
    """
    opened, family, hints = open_released(path)
    source = FoldedSource(opened, scale=lora_scale, fold=fold_lora)
    heads = {"head_channels": head_channels, "clip_heads": clip_heads}
    plan = make_plan(source, family, **{k: v or hints.get(k) for k, v in heads.items()})
    config = _config(plan, source, dtype, size, frames)
    specs = _specs(plan, source, np.dtype(jax.numpy.dtype(dtype)))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / WEIGHTS, specs, _arrays(plan, source, specs))
    (out / CONFIG).write_text(config.to_json(indent=1) + "\n")
    parameters: Counter[str] = Counter()
    for name, spec in specs.items():
        if not name.startswith("latents/"):
            parameters[name.split("/")[0]] += int(np.prod(spec.shape))
    return Report(
        source=str(path),
        family=family,
        mapped=len({name for leaf in plan.leaves.values() for name in leaf.theirs}),
        folded=plan.folded,
        kept_apart=len(plan.lora),
        ignored=plan.ignored,
        parameters=dict(parameters),
        dtype=dtype,
        bytes=(out / WEIGHTS).stat().st_size,
    )


def _specs(plan: Plan, source: FoldedSource, dtype: np.dtype) -> dict[str, Spec]:
    specs = {}
    for path, shape in plan.shapes.items():
        keep = path.startswith(FLOAT32_PARTS)
        specs[path] = Spec(shape, np.dtype(np.float32) if keep else dtype)
    for path, module in plan.lora.items():
        rank, inputs = source.source.specs[f"{module}.lora_down.weight"].shape
        outputs = source.source.specs[f"{module}.lora_up.weight"].shape[0]
        specs[f"lora/{path}/down"] = Spec((inputs, rank), dtype)
        specs[f"lora/{path}/up"] = Spec((rank, outputs), dtype)
    return specs


def _arrays(
    plan: Plan, source: FoldedSource, specs: Mapping[str, Spec]
) -> Iterator[tuple[str, np.ndarray]]:
    constants = {"latents/mean": 0.0, "latents/scale": plan.model.autoencoder.scale}
    for name, spec in specs.items():
        if name in constants:
            value = np.full(spec.shape, constants[name])
        elif name.startswith("lora/"):
            module, half = name.removeprefix("lora/").rsplit("/", 1)
            update = source.down if half == "down" else source.up
            value = update(plan.lora[module]).T
        else:
            value = read_leaf(source.read, plan.leaves[name])
        yield name, value.astype(spec.dtype)


def _config(
    plan: Plan, source: FoldedSource, dtype: str, size: tuple[int, int], frames: int
) -> ml_collections.ConfigDict:
    config = load_preset("dragnuwa_svd")
    _replace_sections(config.model, plan.section)
    config.data.height, config.data.width = size
    config.data.frames = frames
    config.model.dtype = "float32" if dtype == "float32" else "bfloat16"  # to compute in
    ranks = {source.source.specs[f"{m}.lora_down.weight"].shape[0] for m in plan.lora.values()}
    if ranks:
        config.model.lora_rank = max(ranks)
    plan.model.latent_shape(*size, frames)  # or the size does not divide
    kernel = source.specs.get("guassian_filter.weight")
    if kernel is not None:
        width = kernel.shape[-1]
        row = source.read("guassian_filter.weight")[0, 0, width // 2].astype(np.float64)
        # exp(-1 / (2 sigma^2)) beside the centre, which is 1.
        sigma = (-0.5 / np.log(row[width // 2 + 1] / row[width // 2])) ** 0.5
        config.raster.update(sigma=round(float(sigma), 3), kernel_size=width)
    return config


def _replace_sections(model: ml_collections.ConfigDict, section: Mapping[str, Any]) -> None:
    """Puts the sizes of `section` into a config's model section."""
    if "flow_encoder" not in section:
        del model.flow_encoder
    for key, value in section.items():
        if isinstance(value, Mapping):
            model[key] = ml_collections.ConfigDict({**model.get(key, {}), **value})
        else:
            model[key] = value


def open_part(folder: Path, stem: str) -> TensorSource:
    """A part of a diffusers folder: one file, in either precision, or several with an index."""
    for variant in ("", ".fp16"):
        if (folder / f"{stem}{variant}.safetensors").is_file():
            return SafetensorsFile(folder / f"{stem}{variant}.safetensors")
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return JoinedSource(("", SafetensorsFile(folder / name)) for name in names)
    if (folder / f"{stem}.bin").is_file() or (folder / "pytorch_model.bin").is_file():
        name = f"{stem}.bin" if (folder / f"{stem}.bin").is_file() else "pytorch_model.bin"
        return open_tensors(folder / name)
    raise UserError(
        f"{folder} holds no {stem}.safetensors: give a folder as diffusers and transformers write "
        "it; of SVD, one with unet, vae and image_encoder"
    )


def _hf_hints(folder: Path) -> dict[str, int]:
    """What config.json says of sizes that shapes do not tell."""
    hints = {}
    unet, clip = folder / "unet" / "config.json", folder / "image_encoder" / "config.json"
    try:
        if unet.is_file():
            config = json.loads(unet.read_text())
            heads = config["num_attention_heads"]
            first = heads[0] if isinstance(heads, list) else heads
            hints["head_channels"] = config["block_out_channels"][0] // first
        if clip.is_file():
            hints["clip_heads"] = json.loads(clip.read_text())["num_attention_heads"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{folder}: a config.json lacks or garbles {error}") from error
    return hints
