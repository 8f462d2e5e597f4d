"""What a batch is made of, as config entries: `config.data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nuwa_jax.data.scenes import SceneConfig
from nuwa_jax.errors import UserError
from nuwa_jax.motion.camera_motion import CameraConfig
from nuwa_jax.motion.drag_synthesis import PARTS, DragsOn, DragSynthesis
from nuwa_jax.motion.perturbation import PerturbConfig
from nuwa_jax.motion.schedules import build_config
from nuwa_jax.motion.trajectory_samplers import SamplerConfig

KINDS = ("scenes", "records")
FORMATS = ("video", "latents")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One of the sources that elements are mixed from.

    Attributes:
      kind: "scenes" (rendered as they are asked for) or "records" (a prepared folder).
      path: of the folder that `python -m nuwa_jax.data.webvid` made; "" for scenes.
      weight: share of the elements that are of this source, relative to the other weights.
    """

    kind: str = "records"
    path: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"data.sources: kind is one of {KINDS}, got {self.kind!r}")
        if (self.kind == "records") != bool(self.path):
            raise UserError(
                f"data.sources: records need a path and scenes have none, got kind={self.kind!r} "
                f"with path={self.path!r}"
            )
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"data.sources: a weight is 0 or more, got {self.weight}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a batch is made of.

    Attributes:
      height, width: of the video in pixels.
      frames: of every clip.
      fps: frames per second of scenes. Clips keep the rate that they were prepared with.
      max_drags: k, the number of drags to which a clip is padded.
      text_length: l, the number of tokens to which a caption is padded or cut.
      tokenizer: files of CLIP's vocabulary, where the model's text encoder is CLIP's: a folder with
        vocab.json and merges.txt, or OpenCLIP's .txt.gz; "" makes tokens of bytes.
      scenes_weight, clips_weight: shares of elements that are scenes and real clips.
      clips: folder that `python -m nuwa_jax.data.webvid` made; "" for none.
      sources: any number of further sources, mixed with the two above by their weights; each is a
        mapping with the keys of `SourceConfig`.
      format: "video", or "latents": records hold latents (and, if they do, text embeddings) made
        beforehand, which the model is trained on without running its encoders.
      flip_probability: chance that an element is mirrored left to right (on the device). A caption
        that tells left from right is never mirrored.
      flow_divisor: dense flow is sent to the device at 1 / this of the size and enlarged there.
      threads: that make batches, in each worker; 0 makes them when they are asked for.
      workers: processes that make batches; 0: threads of this one do.
      prefetch: batches made ahead, at least.
      prefetch_to_device: batches, of these, that are on the device before they are asked for.
      max_replaced_share: share of elements whose record may be unreadable before the run stops.
      allow_changed_clips: go on with a run although its prepared folders have changed; the records
        then come in another order, and some may come twice or late.
      scenes: what scenes look like. Size, frames and fps are always those above.
      sampler: which tracks become drags.
      perturb: how imprecise drags are.
      drags_on: how often drags lie on objects, on the background, and on both.
      camera: how background and objects are told apart in clips.
    """

    height: int = 64
    width: int = 64
    frames: int = 8
    fps: float = 8.0
    max_drags: int = 8
    text_length: int = 64
    tokenizer: str = ""
    scenes_weight: float = 1.0
    clips: str = ""
    clips_weight: float = 0.0
    sources: tuple[SourceConfig, ...] = ()
    format: str = "video"
    flip_probability: float = 0.0
    flow_divisor: int = 1
    threads: int = 2
    workers: int = 0
    prefetch: int = 4
    prefetch_to_device: int = 2
    max_replaced_share: float = 0.01
    allow_changed_clips: bool = False
    scenes: SceneConfig = SceneConfig()
    sampler: SamplerConfig = SamplerConfig()
    perturb: PerturbConfig = PerturbConfig()
    drags_on: DragsOn = DragsOn()
    camera: CameraConfig = CameraConfig()

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "max_drags", "text_length", "flow_divisor"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is at least 1, got {getattr(self, name)}")
        if not self.fps > 0:
            raise UserError(f"data.fps is above 0, got {self.fps}")
        not_negative = ("scenes_weight", "clips_weight", "threads", "workers", "prefetch")
        for name in (*not_negative, "prefetch_to_device"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} is at least 0, got {getattr(self, name)}")
        for name in ("flip_probability", "max_replaced_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name} is in [0, 1], got {getattr(self, name)}")
        if self.height % self.flow_divisor or self.width % self.flow_divisor:
            raise UserError(
                f"data.flow_divisor {self.flow_divisor} does not divide {self.height}x{self.width}"
            )
        if self.clips_weight > 0 and not self.clips:
            raise UserError(
                "data.clips_weight is set but data.clips is not: name a folder made by "
                "python -m nuwa_jax.data.webvid"
            )
        if not self.mixed_sources():
            raise UserError(
                "data.scenes_weight and data.clips_weight are both 0 and so is that of every one "
                "of data.sources: nothing to train on; set one"
            )
        if self.format not in FORMATS:
            raise UserError(f"data.format is one of {FORMATS}, got {self.format!r}")
        if self.format == "latents":
            self._check_latents()
        if self.sampler.most_drags > self.max_drags:
            raise UserError(
                f"data.sampler.max_count {self.sampler.most_drags} is more than data.max_drags "
                f"{self.max_drags}: drags would not fit"
            )
        size = {name: getattr(self, name) for name in ("height", "width", "frames", "fps")}
        object.__setattr__(self, "scenes", dataclasses.replace(self.scenes, **size))

    def mixed_sources(self) -> tuple[SourceConfig, ...]:
        """Every source that has a weight: `clips`, scenes, then `sources`."""
        every = (
            *((SourceConfig("records", self.clips, self.clips_weight),) if self.clips else ()),
            SourceConfig("scenes", "", self.scenes_weight),
            *self.sources,
        )
        return tuple(source for source in every if source.weight > 0)

    @property
    def synthesis(self) -> DragSynthesis:
        """How drags are made of tracks."""
        return DragSynthesis(**{name: getattr(self, name) for name in PARTS})

    def _check_latents(self) -> None:
        if any(source.kind == "scenes" for source in self.mixed_sources()):
            raise UserError(
                'scenes have no latents: with data.format="latents", set data.scenes_weight=0 '
                "and take records alone"
            )
        if self.flip_probability:
            raise UserError(
                "latents cannot be mirrored (those of a mirrored picture are others): set "
                'data.flip_probability=0, or data.format="video"'
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DataConfig:
        """From the `data` part of a config; what it does not name keeps its default.

        Raises:
          UserError: an entry is unknown or its value makes no sense.
        """
        values = dict(config)
        if "scenes" in values:
            values["scenes"] = build_config(
                SceneConfig, values["scenes"], "data.scenes", schedules=False
            )
        synthesis = DragSynthesis.from_config(values)
        values |= {name: getattr(synthesis, name) for name in PARTS}
        if "sources" in values:
            values["sources"] = _sources(values["sources"])
        return build_config(cls, values, "data", schedules=False)


def _sources(entries: Any) -> tuple[SourceConfig, ...]:
    expected = "data.sources is a list of mappings with the keys kind, path and weight"
    if isinstance(entries, (str, Mapping)) or not hasattr(entries, "__iter__"):
        raise UserError(f"{expected}, got {entries!r}")
    sources = []
    for number, entry in enumerate(entries):
        if not hasattr(entry, "items"):
            raise UserError(f"{expected}, got {entry!r} in it")
        sources.append(
            build_config(
                SourceConfig, dict(entry.items()), f"data.sources[{number}]", schedules=False
            )
        )
    return tuple(sources)
