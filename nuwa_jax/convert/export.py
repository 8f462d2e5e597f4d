"""From our parameters back to the names of Stability's files or to a diffusers folder of SVD."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from nuwa_jax.convert.lora import DOWN, UP
from nuwa_jax.convert.released import HF_FILES, table
from nuwa_jax.convert.rules import Family, Leaf, write_leaf
from nuwa_jax.errors import UserError
from nuwa_jax.generation.weights import CONFIG, WEIGHTS, load_model
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.tensor_files import (
    MemorySource,
    SafetensorsFile,
    Spec,
    TensorSource,
    write_safetensors,
)

SGM_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and what the other side has no place for."""

    files: tuple[Path, ...]
    written: int
    left_out: dict[str, int]

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(f"{path}: {path.stat().st_size:,} bytes" for path in self.files),
            f"{self.written} arrays written",
            *(f"  left out {count}: {why}" for why, count in self.left_out.items()),
        ]


def export(
    checkpoint: str | Path, out: str | Path, family: Family, dtype: str | None = None
) -> Exported:
    """Writes a model of SVD's architecture for the programs of others.

    Low-rank updates that are kept apart go into the names of DragNUWA 1.5 (`X.linear`,
    `X.lora_down`, `X.lora_up`) and, for diffusers, which has no such names, into their matrices.
    What only we have (drag layers, and for diffusers the flow encoder) is left out and counted.

    Args:
      checkpoint: a folder that `convert` or the export of a training run wrote, or a workdir.
      out: folder; "sgm": model.safetensors in it, "hf": unet, vae, image_encoder and what else a
        `StableVideoDiffusionPipeline` is loaded from.
      family: whose names.
      dtype: of the arrays; as they are by default.

    Raises:
      UserError: the model is not of SVD's architecture.
    """
    source, config = _open(checkpoint)
    model = VideoLDM.from_config(config.model)
    if model.image_encoder is None or model.text is not None or model.autoencoder.patch_size > 1:
        raise UserError(
            f"{checkpoint} (preset {config.preset}) is not of SVD's architecture, which has an "
            "image encoder, no text and no patches: only such models have names elsewhere"
        )
    places = {path: leaf for path, leaf in table(model, family).items() if path in source.specs}
    left_out: dict[str, int] = {}
    for path in source.specs:
        if path not in places and not (path.startswith("lora/") and family == "sgm"):
            why = _why_left_out(path)
            left_out[why] = left_out.get(why, 0) + 1
    writer = _Writer(source, places, family, dtype)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if family == "sgm":
        files = (writer.write(out / SGM_FILE, places),)
    else:
        files = tuple(
            writer.write(
                out / folder / f"{stem}.safetensors",
                {p: v for p, v in places.items() if v.theirs[0].startswith(f"{folder}/")},
                strip=f"{folder}/",
            )
            for folder, stem in HF_FILES.items()
        )
        context = model.image_encoder.projection
        for name, content in _hf_configs(model, config, source, context).items():
            path = out / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n")
    return Exported(files, writer.count, left_out)


class _Writer:
    def __init__(
        self, source: TensorSource, places: Mapping[str, Leaf], family: Family, dtype: str | None
    ) -> None:
        self.source, self.family, self.count = source, family, 0
        self.dtype = None if dtype is None else np.dtype(jnp.dtype(dtype))
        self.updated = {
            path.removeprefix("lora/").removesuffix("/down")
            for path in source.specs
            if path.startswith("lora/") and path.endswith("/down")
        }
        # The bias of a layer with an update has another name, too: X.linear.bias.
        self.modules = {
            places[f"{path}/kernel"].theirs[0][: -len(".weight")] for path in self.updated
        }

    def write(self, path: Path, places: Mapping[str, Leaf], strip: str = "") -> Path:
        specs = dict(self._specs(places, strip))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, specs, self._arrays(places, strip), {"format": "pt"})
        self.count += len(specs)
        return path

    def _specs(self, places: Mapping[str, Leaf], strip: str) -> Iterator[tuple[str, Spec]]:
        for path, leaf in places.items():
            stored = self.source.specs[path]
            zeros = np.broadcast_to(np.int8(0), stored.shape)
            for name, value in write_leaf(zeros, leaf).items():
                yield self._name(name).removeprefix(strip), Spec(value.shape, self._type(stored))
            yield from ((n, Spec(v.shape, v.dtype)) for n, v in self._update(path, leaf))

    def _arrays(self, places: Mapping[str, Leaf], strip: str) -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in places.items():
            value = self.source.read(path)
            target = self._type(self.source.specs[path])
            module = path.removesuffix("/kernel")
            if self.family == "hf" and path.endswith("/kernel") and module in self.updated:
                down, up = (
                    self.source.read(f"lora/{module}/{half}").astype(np.float32)
                    for half in ("down", "up")
                )
                value = value.astype(np.float32) + down @ up
            for name, array in write_leaf(value.astype(target), leaf).items():
                yield self._name(name).removeprefix(strip), array
            yield from self._update(path, leaf)

    def _update(self, path: str, leaf: Leaf) -> Iterator[tuple[str, np.ndarray]]:
        module = path.removesuffix("/kernel")
        if self.family == "hf" or module == path or module not in self.updated:
            return
        theirs = leaf.theirs[0].removesuffix(".weight")
        for half, suffix in (("down", DOWN), ("up", UP)):
            array = self.source.read(f"lora/{module}/{half}").T
            yield theirs + suffix, array.astype(self._type(Spec(array.shape, array.dtype)))

    def _name(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if self.family == "sgm" and module in self.modules:
            return f"{module}.linear.{leaf}"
        return name

    def _type(self, stored: Spec) -> np.dtype:
        return self.dtype or stored.dtype


def _open(checkpoint: str | Path) -> tuple[TensorSource, ml_collections.ConfigDict]:
    folder = Path(checkpoint)
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
        config = ml_collections.ConfigDict(json.loads((folder / CONFIG).read_text()))
        return SafetensorsFile(folder / WEIGHTS), config
    loaded = load_model(folder)
    arrays = {k: np.asarray(v) for k, v in flatten_dict(loaded.params, sep="/").items()}
    return MemorySource(arrays), loaded.config


def _why_left_out(path: str) -> str:
    if path.startswith("latents/"):
        return "scale of the latents; the other side has it in its configs"
    if path.startswith("lora/"):
        return "low-rank updates, added to their matrices"
    if "drag" in path:
        return "drag layers, which no other program has"
    return "flow encoder and its norms, which diffusers does not have"


def _hf_configs(
    model: VideoLDM, config: ml_collections.ConfigDict, source: TensorSource, context: int
) -> dict[str, dict[str, Any]]:
    """The json files of a diffusers pipeline of SVD (class names and keys are theirs)."""
    unet, vae, clip = model.unet, model.autoencoder, model.image_encoder
    levels = len(unet.channel_mult)
    channels = [unet.channels(level) for level in range(levels)]
    attends = [unet.has_attention(level) for level in range(levels)]
    down = ["CrossAttnDownBlock" if a else "DownBlock" for a in attends]
    up = ["CrossAttnUpBlock" if a else "UpBlock" for a in reversed(attends)]
    diffusion = config.diffusion
    library = {"unet": "UNetSpatioTemporalConditionModel", "vae": "AutoencoderKLTemporalDecoder"}
    return {
        "model_index.json": {
            "_class_name": "StableVideoDiffusionPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            **{part: ["diffusers", name] for part, name in library.items()},
        },
        "unet/config.json": {
            "_class_name": library["unet"],
            "in_channels": source.specs["unet/conv_in/kernel"].shape[2],
            "out_channels": unet.out_channels,
            "down_block_types": [f"{name}SpatioTemporal" for name in down],
            "up_block_types": [f"{name}SpatioTemporal" for name in up],
            "block_out_channels": channels,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 256 * len(model.vector),
            "layers_per_block": unet.num_res_blocks,
            "cross_attention_dim": context,
            "transformer_layers_per_block": 1,
            "num_attention_heads": [max(1, c // unet.head_channels) for c in channels],
            "num_frames": config.data.frames,
            "sample_size": config.data.width // vae.reduction,
        },
        "vae/config.json": {
            "_class_name": library["vae"],
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
            "block_out_channels": [m * vae.base_channels for m in vae.channel_mult],
            "layers_per_block": vae.num_res_blocks,
            "latent_channels": vae.latent_channels,
            "sample_size": 768,
            "scaling_factor": vae.scale,
            "force_upcast": True,
        },
        "image_encoder/config.json": {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "hidden_act": "gelu",
            "hidden_size": clip.width,
            "intermediate_size": clip.mlp_ratio * clip.width,
            "num_hidden_layers": clip.layers,
            "num_attention_heads": clip.heads,
            "image_size": clip.image_size,
            "patch_size": clip.patch,
            "projection_dim": clip.projection,
            "layer_norm_eps": 1e-5,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "sigma_max": diffusion.sigma_max,
            "sigma_min": diffusion.sigma_min,
            "timestep_type": "continuous",
            "timestep_spacing": "leading",
            "interpolation_type": "linear",
            "use_karras_sigmas": True,
        },
        "feature_extractor/preprocessor_config.json": {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": clip.image_size, "width": clip.image_size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": {"shortest_edge": clip.image_size},
        },
    }
