"""Shows what is in a folder of prepared clips, or in scenes, as one HTML page.

python -m nuwa_jax.data.inspect DIR [--out=inspect.html] [--clips=24] [--sample=500] [--seed=0]
python -m nuwa_jax.data.inspect DIR --config=configs/nuwa.py [--step=0]
python -m nuwa_jax.data.inspect --scenes=200 [--config=configs/tiny.py]

With a config, its samplers make the drags and its settings the scenes. The page holds clips with
their tracks, drags as training would synthesise them, flow and captions; the distributions over a
sample of the clips; reasons of rejects; and what cannot be read. The last line of output is a JSON
object with the counts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8

from nuwa_jax.data.inspect_page import Card, Rejects, animation, make_page, still
from nuwa_jax.data.inspect_statistics import Statistics
from nuwa_jax.data.records import Record, RecordError, RecordReader
from nuwa_jax.data.scenes import Scene, SceneConfig, render_scene
from nuwa_jax.data.video import VideoError, read_video
from nuwa_jax.data.webvid import REJECTS
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.motion.camera_motion import UNCLEAR, CameraConfig, group_tracks
from nuwa_jax.motion.drag_synthesis import Drags, DragSynthesis, synthesise_drags
from nuwa_jax.motion.drawing import colour_flow, draw_drags, draw_tracks
from nuwa_jax.motion.estimators import DISFlow
from nuwa_jax.motion.schedules import at_step, build_config
from nuwa_jax.motion.tracks import Tracks
from nuwa_jax.motion.trajectory_samplers import BACKGROUND

_EXAMPLES = 4  # of each reason for a reject
_NUMBERED = 24  # drags at most; the numbers of more would hide what they number
_SIDE = 192  # the shorter side of a picture is enlarged to at least about this many pixels


@dataclasses.dataclass(frozen=True)
class Clip:
    """What records and scenes have in common.

    Attributes:
      name: of the source.
      caption: what is seen.
      fps: frames per second.
      height, width: in pixels.
      tracks: in pixels.
      load: decodes the video; raises `VideoError`.
      groups: int [k], the object of each track, where it is known.
      flow: [t h' w' 2], at the size of the video or a reduced one, where there is any.
      facts: more to say of it.
    """

    name: str
    caption: str
    fps: float
    height: int
    width: int
    tracks: Tracks
    load: Callable[[], UInt8[np.ndarray, "t h w 3"]]
    groups: Int[np.ndarray, " k"] | None = None
    flow: Float[np.ndarray, "t h w 2"] | None = None
    facts: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is shown.

    Attributes:
      clips: how many clips are shown.
      sample: how many are read for the distributions, at least.
      seed: of the choice of clips and of their drags.
      step: training step at which schedules of the config are read.
      synthesis: how drags are made.
      scenes: what scenes look like.
      config_name: what to call the config.

    Raises:
      UserError: a number is negative, or nothing would be shown.
    """

    clips: int = 24
    sample: int = 500
    seed: int = 0
    step: int = 0
    synthesis: DragSynthesis = DragSynthesis()
    scenes: SceneConfig = SceneConfig()
    config_name: str = "the defaults"

    def __post_init__(self) -> None:
        for name, least in (("clips", 1), ("sample", 1), ("seed", 0), ("step", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is at least {least}, got {getattr(self, name)}")

    @property
    def looked_at(self) -> int:
        """How many clips are read: the sample, and at least those that are shown."""
        return max(self.sample, self.clips)


def inspect_folder(folder: str | os.PathLike[str], options: Options) -> tuple[str, dict[str, Any]]:
    """The page of a prepared folder, and its counts.

    Raises:
      UserError: it is no such folder, or a shard is missing or truncated.
    """
    folder = Path(folder)
    reader = RecordReader(folder)
    manifest = {k: v for k, v in reader.manifest.items() if k not in ("shards", "fingerprint")}
    manifest["shards"] = len(reader.manifest["shards"])
    rejects = _read_rejects(folder / REJECTS)
    if rejects is not None:
        manifest["rejects listed"] = sum(rejects.reasons.values()) + rejects.unreadable
    read_of = min(options.looked_at, len(reader))
    note = f"A sample of {read_of:,} of {len(reader):,} records"

    def read(index: int) -> Clip:
        return _clip_of_record(reader.read(index))

    return _inspect(str(folder), manifest, len(reader), read, rejects, note, options)


def inspect_scenes(count: int, options: Options) -> tuple[str, dict[str, Any]]:
    """The page of `count` procedural scenes, and its counts."""
    if count < 1:
        raise UserError(f"--scenes is at least 1, got {count}")
    totals = {"scenes": count, "settings": dataclasses.asdict(options.scenes)}

    def read(index: int) -> Clip:
        return _clip_of_scene(render_scene(options.seed + index, options.scenes))

    note = f"{count:,} procedural scenes, seeds from {options.seed} on"
    options = dataclasses.replace(options, sample=count)
    return _inspect("Procedural scenes", totals, count, read, None, note, options)


def load_config(path: str) -> tuple[DragSynthesis, SceneConfig]:
    """The samplers and scenes of a config: FILE.py, FILE.py:variant, or a run's config.json.

    Raises:
      UserError: it cannot be read, or its `data` section makes no sense.
    """
    name, _, argument = path.partition(":")
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--config={path}: there is no such file")
    if file.suffix == ".py":
        spec = importlib.util.spec_from_file_location("inspected_config", file)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise UserError(
                f"--config={path}: {error}: run this where the folder configs/ is"
            ) from error
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path} has no get_config: name a file of configs/")
        config = module.get_config(argument or None)
    else:
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"--config={path} is neither .py nor JSON: {error}") from error
        config = config.get("config", config) if isinstance(config, dict) else config
    if not hasattr(config, "items") or "data" not in config:
        raise UserError(f"--config={path} has no section data: name a training config")
    data: Mapping[str, Any] = config["data"]
    scenes = dict(data["scenes"]) if "scenes" in data else {}
    scenes |= {key: data[key] for key in ("height", "width", "frames", "fps") if key in data}
    return (
        DragSynthesis.from_config(data),
        build_config(SceneConfig, scenes, "data.scenes", schedules=False),
    )


def _inspect(
    title: str,
    totals: Mapping[str, object],
    count: int,
    read: Callable[[int], Clip],
    rejects: Rejects | None,
    note: str,
    options: Options,
) -> tuple[str, dict[str, Any]]:
    rng = np.random.default_rng(options.seed)
    sampled = rng.permutation(count)[: options.looked_at]
    shown = set(sampled[: options.clips].tolist())
    synthesis = at_step(options.synthesis, options.step)
    statistics = Statistics()
    cards: list[Card] = []
    damaged: list[tuple[str, str]] = []
    for index in np.sort(sampled).tolist():
        try:
            clip = read(index)
        except RecordError as error:
            damaged.append((f"record {index}", str(error)))
            continue
        drags = synthesise_drags(
            clip.tracks,
            np.random.default_rng([options.seed, index]),
            synthesis,
            clip.height,
            clip.width,
            clip.groups,
        )
        statistics.add(
            clip.tracks,
            drags,
            caption=clip.caption,
            fps=clip.fps,
            height=clip.height,
            width=clip.width,
            camera=synthesis.camera,
        )
        if index in shown:
            card = _card(clip, drags, synthesis.camera)
            if card.fault:
                damaged.append((clip.name, card.fault))
            cards.append(card)
    counts = {
        "clips": count,
        "sampled": len(sampled),
        "shown": len(cards),
        "damaged": len(damaged),
    }
    at = f" at step {options.step}" if synthesis is not options.synthesis else ""
    notes = [
        f"{note}; {len(cards)} are shown, and only their videos are decoded; {len(damaged)} are "
        f"damaged. Seed {options.seed}.",
        f"Drags are made by {options.config_name}{at} (sampler {synthesis.sampler.kind!r}), at the "
        "size of the clips.",
    ]
    page = make_page(title, totals, statistics, cards, damaged, rejects, notes)
    return page, counts


def _clip_of_record(record: Record) -> Clip:
    def load() -> UInt8[np.ndarray, "t h w 3"]:
        if not record.video:  # a record of latents: its tracks can be shown all the same
            return np.full((record.frames, record.height, record.width, 3), 128, np.uint8)
        video, _ = read_video(record.video)
        shape = (record.frames, record.height, record.width)
        if video.shape[:3] != shape:
            raise VideoError(f"its video has shape {video.shape[:3]}, the record says {shape}")
        return video

    return Clip(
        name=record.source_id,
        caption=record.caption,
        fps=record.fps,
        height=record.height,
        width=record.width,
        tracks=record.tracks,
        load=load,
        flow=record.flow,
        facts=f"from second {record.start:.2f}"
        + ("" if record.video else "; latents without video"),
    )


def _clip_of_scene(scene: Scene) -> Clip:
    return Clip(
        name=f"scene {scene.seed}",
        caption=scene.caption,
        fps=scene.fps,
        height=scene.video.shape[1],
        width=scene.video.shape[2],
        tracks=scene.tracks,
        load=lambda: scene.video,
        groups=scene.track_object,
        flow=scene.flow,
        facts=f"{scene.track_object.max(initial=0)} sprites",
    )


def _card(clip: Clip, drags: Drags, camera: CameraConfig) -> Card:
    tracks = clip.tracks
    groups = group_tracks(tracks, clip.height, clip.width, camera)
    facts = (
        f"{clip.width}x{clip.height}, {tracks.num_frames} frames at {clip.fps:.4g} fps, "
        f"{tracks.num_tracks} tracks; by their motion {(groups == BACKGROUND).sum()} of the "
        f"background, {(groups > BACKGROUND).sum()} of {max(groups.max(initial=0), 0)} objects, "
        f"{(groups == UNCLEAR).sum()} of neither; {clip.facts}"
    )
    try:
        video = clip.load()
    except VideoError as error:
        return Card(clip.name, clip.caption, facts, [], str(error))
    scale = max(1, round(_SIDE / min(clip.height, clip.width)))
    frames = [draw_tracks(frame, tracks, i, scale=scale) for i, frame in enumerate(video)]
    of_camera = int(drags.camera.sum())
    title = f"{drags.tracks.num_tracks} drags, on: {drags.on}"
    title += f", {of_camera} of the camera" if of_camera else ""
    few = drags.tracks.num_tracks <= _NUMBERED
    pictures = [
        ("tracks and their states", animation(frames, clip.fps)),
        (title, still(draw_drags(video[0], drags.tracks, scale=scale, numbers=few))),
    ]
    if len(video) > 1:
        pictures.append(_flow_picture(clip, video))
    return Card(clip.name, clip.caption, facts, pictures)


def _flow_picture(clip: Clip, video: UInt8[np.ndarray, "t h w 3"]) -> tuple[str, str]:
    """The flow into the frame before which most moves."""
    if clip.flow is None:
        step = np.linalg.norm(np.diff(clip.tracks.points, axis=1), axis=-1)
        seen = clip.tracks.visible[:, 1:] & clip.tracks.visible[:, :-1]
        frame = 1 + int(np.where(seen, step, 0).sum(axis=0).argmax())
        flow, origin = DISFlow().estimate(video[frame - 1 : frame + 1])[1], "estimated (DIS)"
    else:
        length = np.linalg.norm(np.asarray(clip.flow, np.float32), axis=-1)
        frame = 1 + int(length[1:].mean(axis=(1, 2)).argmax())
        flow, origin = np.asarray(clip.flow[frame], np.float32), "stored"
    # A pixel at least: or the noise of what is still would have the colours of motion.
    largest = max(1.0, float(np.percentile(np.linalg.norm(flow, axis=-1), 99)))
    title = f"flow into frame {frame}, {origin}; full colour: {largest:.1f} px"
    return title, still(colour_flow(flow, largest))


def _read_rejects(path: Path) -> Rejects | None:
    if not path.is_file():
        return None
    reasons: Counter[str] = Counter()
    examples, unreadable = [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                reject = json.loads(line)
                reason = str(reject["reason"])
            except (ValueError, KeyError, TypeError):
                unreadable += bool(line.strip())
                continue
            reasons[reason] += 1
            if reasons[reason] <= _EXAMPLES:
                examples.append((reason, str(reject.get("id", "")), str(reject.get("detail", ""))))
    return Rejects(reasons, sorted(examples), unreadable)


def _define_flags() -> None:
    flags.DEFINE_string("out", "inspect.html", "The page to write.")
    flags.DEFINE_integer("clips", 24, "Clips to show.")
    flags.DEFINE_integer("sample", 500, "Records to read for the distributions.")
    flags.DEFINE_integer("seed", 0, "Of the choice of clips and of their drags.")
    flags.DEFINE_integer("step", 0, "Training step at which the config's schedules are read.")
    flags.DEFINE_integer("scenes", None, "Show so many procedural scenes instead of a folder.")
    flags.DEFINE_string("config", None, "Config file whose samplers make the drags.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    values = flags.FLAGS
    if (len(argv) != 2) if values.scenes is None else (len(argv) != 1):
        raise UserError(
            f"expected one folder of prepared clips, or --scenes=N without one, got {argv[1:]}"
        )
    options = Options(clips=values.clips, sample=values.sample, seed=values.seed, step=values.step)
    if values.config:
        synthesis, scenes = load_config(values.config)
        options = dataclasses.replace(
            options, synthesis=synthesis, scenes=scenes, config_name=values.config
        )
    if values.scenes is None:
        page, counts = inspect_folder(argv[1], options)
    else:
        page, counts = inspect_scenes(values.scenes, options)
    out = Path(values.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    print(out)
    print(json.dumps(counts))


if __name__ == "__main__":
    _define_flags()
    run_main(main)
