"""Does the video follow the drags? Held-out scenes, sampled and scored beside floor and ceiling.

    python -m nuwa_jax.evaluation.protocol --out=DIR [--checkpoint=DIR --stage=flow ...]

Each scene is made four ways and each video is scored by the same tracker on the same points:

  drag      sampled from the first frame with the true motion of every sprite's middle as drags
  no_drag   sampled with the drags withheld, all else (noise too) equal
  floor     the true clip: what the tracker alone gets wrong
  ceiling   the first frame repeated: what a video that ignores the drags gets

DIR gets metrics.json, metrics.md, contact_sheet.png and videos/.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from absl import flags
from jaxtyping import Float, UInt8
from PIL import Image

from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import held_out_scene
from nuwa_jax.data.scenes import Scene
from nuwa_jax.data.video import write_video
from nuwa_jax.diffusion.guidance import GuidanceScales
from nuwa_jax.errors import UserError, run_main
from nuwa_jax.evaluation import metrics as measure
from nuwa_jax.evaluation.report import metrics_table
from nuwa_jax.evaluation.template_tracker import TemplateTracker
from nuwa_jax.generation import overlay
from nuwa_jax.generation.generator import Generator
from nuwa_jax.motion import drawing
from nuwa_jax.motion.estimators import PointTracker
from nuwa_jax.motion.persistent_tracker import PersistentTracker
from nuwa_jax.motion.tracks import Tracks, TrackState, net_displacement

VIDEOS = ("drag", "no_drag", "floor", "ceiling")

# Two that share no code, so that a result can be checked against a tracker's own quirks. On sharp
# scenes the second has the lower floor (a median of 0.05 px, the template's is 0.27; means 0.4 and
# 0.7), on soft and noisy ones, as small models make them, the template (means 0.7 to 0.8 against
# 0.9 to 1.4).
TRACKERS = {"template": TemplateTracker, "lk-viterbi": PersistentTracker}

# Scenes of different seeds never overlap, as long as an evaluation has fewer scenes than this.
_SCENES_PER_SEED = 1_000_000
_BACKGROUND_POINTS = 12
_STILL = 0.01  # pixels: a background that moves less than this is still
_SHOWN = 8  # scenes in the contact sheet and in videos/
_CONDITIONS = ("text", "image", "drag")


class VideoGenerator(Protocol):
    """What the protocol asks of a generator (`nuwa_jax.generation.generator.Generator`)."""

    config: Any
    guidance: GuidanceScales

    def generate(
        self,
        image: UInt8[np.ndarray, "b h w 3"],
        points: Float[np.ndarray, "b k t 2"] | None,
        state: UInt8[np.ndarray, "b k t"] | None,
        text: Sequence[str] | None,
        *,
        seed: int,
        steps: int | None,
        guidance: GuidanceScales | None,
    ) -> UInt8[np.ndarray, "b t h w 3"]: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """A held-out scene, the drags that are given and the points that are scored.

    Attributes:
      index: of the scene among the held-out ones.
      scene: the truth.
      drags: what the generator gets: the middle of every sprite that is visible in frame 0, and
        an anchor on the background where one is asked for.
      dragged: the drags that are scored, which are all but the anchor.
      object: other points of the dragged sprites: does the whole object move?
      background: points near which no sprite ever comes; none where the camera moves, as nobody
        told the generator how.
    """

    index: int
    scene: Scene
    drags: Tracks
    dragged: Tracks
    object: Tracks
    background: Tracks


@dataclasses.dataclass(frozen=True)
class Sample:
    """The videos of one task, [t h w 3] each, by their names in `VIDEOS`."""

    task: Task
    videos: dict[str, UInt8[np.ndarray, "t h w 3"]]
    scores: dict[str, dict[str, float]]  # metric -> video -> pixels or share


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns; `shown` are the first samples, for people to look at."""

    metrics: dict[str, Any]
    shown: list[Sample]


def evaluate(
    generator: VideoGenerator,
    *,
    num_scenes: int = 64,
    seed: int = 0,
    steps: int | None = None,
    guidance: GuidanceScales | None = None,
    batch_size: int = 8,
    background_anchor: bool = False,
    tracker: PointTracker | None = None,
) -> Evaluation:
    """Samples and scores `num_scenes` held-out scenes.

    Args:
      generator: of the videos; scenes have the size, length and looks of its `config.data`.
      num_scenes: how many.
      seed: which scenes, and the noise from which their videos are sampled.
      steps: of the sampler; None for what the config says.
      guidance: None for what the config says.
      batch_size: videos sampled at a time.
      background_anchor: also give one still drag on the background, where the camera is still.
      tracker: None for `TemplateTracker`. It must have a position for every point in every frame,
        however bad the video: one that drops what it is unsure of, or stops at the first doubt,
        rewards videos in which things dissolve.

    Raises:
      UserError: a number is below 1, or the config has no moving sprites to drag.
    """
    for name, value in (("num_scenes", num_scenes), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is at least 1, got {value}")
    if seed < 0 or num_scenes > _SCENES_PER_SEED:
        raise UserError(f"seed is at least 0 and num_scenes at most {_SCENES_PER_SEED}")
    config = generator.config
    data = DataConfig.from_config(config.data)
    if data.scenes.max_sprites < 1 or data.frames < 2:
        raise UserError("evaluation needs data.scenes.max_sprites >= 1 and data.frames >= 2")
    tracker = tracker or TemplateTracker()
    steps = steps or int(config.sampling.steps)
    guidance = guidance or generator.guidance

    begin = time.monotonic()
    sampling_seconds = 0.0
    samples: list[Sample] = []
    tasks = make_tasks(data, seed, num_scenes, background_anchor)
    while batch := [task for _, task in zip(range(batch_size), tasks, strict=False)]:
        start = time.monotonic()
        with_drags, without = _generate(
            generator,
            batch,
            batch_size,
            data.max_drags,
            # Other noise for every batch, the same with and without drags.
            seed=seed * _SCENES_PER_SEED + len(samples),
            steps=steps,
            guidance=guidance,
        )
        sampling_seconds += time.monotonic() - start
        for task, drag, no_drag in zip(batch, with_drags, without, strict=True):
            sample = _score(task, drag, no_drag, tracker)
            if len(samples) >= _SHOWN:  # a large evaluation does not keep its videos
                sample = dataclasses.replace(sample, videos={})
            samples.append(sample)
        errors = np.nanmean([[s.scores["trajectory_error"][v] for v in VIDEOS] for s in samples], 0)
        print(
            f"evaluated {len(samples)}/{num_scenes} scenes, trajectory error so far: "
            + ", ".join(f"{v} {e:.2f}" for v, e in zip(VIDEOS, errors, strict=True))
            + f" px ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    result = {
        **summarise([sample.scores for sample in samples], (data.height, data.width)),
        "height": data.height,
        "width": data.width,
        "frames": data.frames,
        "tracker": tracker.name,
        "num_scenes": num_scenes,
        "seed": seed,
        "steps": steps,
        "guidance": dataclasses.asdict(guidance),
        "background_anchor": background_anchor,
        "sampling_seconds": round(sampling_seconds, 1),
        "seconds": round(time.monotonic() - begin, 1),
        "scenes": [
            {
                "index": sample.task.index,
                "caption": sample.task.scene.caption,
                "drags": sample.task.dragged.num_tracks,
                **{name: _finite(values) for name, values in sample.scores.items()},
            }
            for sample in samples
        ],
    }
    return Evaluation(result, samples[:_SHOWN])


def make_tasks(
    data: DataConfig, seed: int, num_scenes: int, background_anchor: bool
) -> Iterator[Task]:
    """The first `num_scenes` scenes of this seed in which the middle of a sprite can be grasped."""
    found, index = 0, seed * _SCENES_PER_SEED
    while found < num_scenes:
        task = make_task(index, held_out_scene(index, data), background_anchor)
        index += 1
        if task is not None:
            found += 1
            yield task


def make_task(index: int, scene: Scene, background_anchor: bool = False) -> Task | None:
    """What is dragged and scored in a scene; None if no sprite's middle is visible at first."""
    tracks, owner = scene.tracks, scene.track_object
    graspable = tracks.visible[:, 0]
    middle = np.zeros(len(owner), bool)
    middle[: int(owner.max(initial=0))] = True  # a scene's tracks begin with them
    dragged = middle & graspable
    if not dragged.any():
        return None
    of_object = np.isin(owner, owner[dragged]) & ~middle & graspable

    background = tracks.select(owner == 0)
    still = background.num_tracks > 0 and net_displacement(background).max() < _STILL
    points = np.zeros((0, 2), np.float32)
    if still:
        points = measure.undisturbed_points(scene.video[0], scene.objects, _BACKGROUND_POINTS)
    drags = tracks.select(dragged)
    if background_anchor and len(points):
        drags = Tracks.concatenate([drags, _hold(points[:1], tracks.num_frames)])
        points = points[1:]
    return Task(
        index=index,
        scene=scene,
        drags=drags,
        dragged=tracks.select(dragged),
        object=tracks.select(of_object),
        background=_hold(points, tracks.num_frames),
    )


def summarise(
    scores: Sequence[dict[str, dict[str, float]]], size: tuple[int, int]
) -> dict[str, Any]:
    """Means over clips, their intervals and their ratios.

    Args:
      scores: per clip, metric -> video -> value.
      size: (height, width), for lengths as a fraction of the diagonal.

    Returns:
      metric -> {video, video_interval}; `trajectory_error_fraction_of_diagonal` likewise; `ratios`:
      "drag/no_drag" and "drag/ceiling" of the trajectory error -> {value, interval}.
    """
    result: dict[str, Any] = {}
    for metric in scores[0]:
        values = {v: np.array([each[metric][v] for each in scores]) for v in VIDEOS}
        result[metric] = _with_intervals(values)
        result[metric]["num_clips"] = int(np.isfinite(values["floor"]).sum())
        if metric == "trajectory_error":
            diagonal = math.hypot(*size)
            shares = {video: value / diagonal for video, value in values.items()}
            result["trajectory_error_fraction_of_diagonal"] = _with_intervals(shares)
            ratios = {}
            for other in ("no_drag", "ceiling"):
                ratio = measure.bootstrap_ratio(values["drag"], values[other])
                ratios[f"drag/{other}"] = {
                    "value": _number(ratio.value),
                    "interval": [_number(ratio.low), _number(ratio.high)],
                }
            result["ratios"] = ratios
    return result


def contact_sheet(samples: Sequence[Sample]) -> UInt8[np.ndarray, "H W 3"]:
    """Rows: scenes. Columns: the first frame with its drags; truth, with and without drags."""
    frames, height, width = samples[0].task.scene.video.shape[:3]
    scale = math.ceil(160 / min(height, width))
    picked = sorted({max(1, round(share * (frames - 1))) for share in (1 / 3, 2 / 3, 1)})
    last = frames - 1
    parts = (("floor", "true"), ("drag", "drag"), ("no_drag", "no drag"))
    titles = [
        "drags",
        *(f"{title} {i}" for _, title in parts for i in picked),
        f"drag {last}, path",
    ]
    rows, labels = [], []
    for sample in samples:
        videos, drags = sample.videos, sample.task.drags
        row = [drawing.draw_drags(sample.task.scene.video[0], drags, scale=scale)]
        row += [drawing.enlarge(videos[name][i], scale) for name, _ in parts for i in picked]
        row.append(drawing.draw_drags(videos["drag"][-1], drags, frame=last, scale=scale))
        rows.append(row)
        errors = sample.scores["trajectory_error"]
        labels.append(
            f"{sample.task.index}: {sample.task.scene.caption}   |   error in px: "
            + ", ".join(f"{name.replace('_', ' ')} {errors[name]:.1f}" for name in VIDEOS)
        )
    return overlay.contact_sheet(rows, columns=titles, labels=labels)


def write(evaluation: Evaluation, out: pathlib.Path) -> None:
    """Writes metrics.json, metrics.md, contact_sheet.png and videos/ into the folder `out`.

    Each video shows, from left to right: the truth with the drags, with drags, without.
    """
    (out / "videos").mkdir(parents=True, exist_ok=True)
    for sample in evaluation.shown:
        scene, drags = sample.task.scene, sample.task.drags
        scale = math.ceil(160 / min(scene.video.shape[1:3]))
        panels = [overlay.overlay_video(scene.video, drags, scale=scale)]
        for name in ("drag", "no_drag"):
            panels.append(np.stack([drawing.enlarge(f, scale) for f in sample.videos[name]]))
        path = out / "videos" / f"scene_{sample.task.index}.mp4"
        write_video(path, overlay.side_by_side(panels), scene.fps)
    Image.fromarray(contact_sheet(evaluation.shown)).save(out / "contact_sheet.png")
    (out / "metrics.md").write_text(metrics_table(evaluation.metrics), encoding="utf-8")
    # Last and at once: whoever finds metrics.json finds a whole evaluation.
    unfinished = out / "metrics.json.tmp"
    unfinished.write_text(json.dumps(evaluation.metrics, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, out / "metrics.json")


def _generate(
    generator: VideoGenerator,
    tasks: Sequence[Task],
    batch_size: int,
    max_drags: int,
    *,
    seed: int,
    steps: int,
    guidance: GuidanceScales,
) -> list[UInt8[np.ndarray, "b t h w 3"]]:
    """The videos with drags and those without, of the same noise."""
    # The last batch is filled up with its own tasks: another size would compile again.
    filled = [tasks[i % len(tasks)] for i in range(batch_size)]
    image = np.stack([task.scene.video[0] for task in filled])
    drags = [task.drags.pad(max(max_drags, task.drags.num_tracks)) for task in filled]
    points = np.stack([each.points for each in drags])
    state = np.stack([each.state for each in drags])
    text = [task.scene.caption for task in filled]
    videos = []
    for given in ((points, state), (None, None)):
        video = np.asarray(
            generator.generate(image, *given, text, seed=seed, steps=steps, guidance=guidance)
        )
        expected = (batch_size, *filled[0].scene.video.shape)
        if video.shape != expected or video.dtype != np.uint8:
            raise ValueError(
                f"the generator made {video.dtype} {video.shape}, expected uint8 {expected}"
            )
        videos.append(video[: len(tasks)])
    return videos


def _score(
    task: Task,
    drag: UInt8[np.ndarray, "t h w 3"],
    no_drag: UInt8[np.ndarray, "t h w 3"],
    tracker: PointTracker,
) -> Sample:
    scene = task.scene
    picture = scene.video[0]
    videos = {
        "drag": drag,
        "no_drag": no_drag,
        "floor": scene.video,
        "ceiling": np.repeat(picture[None], len(scene.video), axis=0),
    }
    groups = (task.dragged, task.object, task.background)
    ends = np.cumsum([group.num_tracks for group in groups])[:-1]
    starts = np.concatenate([group.points[:, 0] for group in groups])
    scores: dict[str, dict[str, float]] = {}
    for name, video in videos.items():
        # Every video is tracked from the given picture: the points lie exactly there, whatever
        # the autoencoder made of it.
        tracked = tracker.track(np.concatenate([picture[None], video[1:]]), starts).points
        dragged, of_object, background = np.split(tracked, ends)
        drift = measure.appearance_drift(video, picture, task.dragged)
        for metric, value in {
            "trajectory_error": measure.trajectory_error(dragged, task.dragged),
            "end_point_error": measure.end_point_error(dragged, task.dragged),
            "object_error": measure.trajectory_error(of_object, task.object),
            "appearance_difference": drift.difference,
            "appearance_decorrelation": drift.decorrelation,
            "background_motion": measure.background_motion(background, task.background),
        }.items():
            scores.setdefault(metric, {})[name] = value
    return Sample(task, videos, scores)


def _hold(points: Float[np.ndarray, "k 2"], frames: int) -> Tracks:
    """Points that stay where they are, visible."""
    held = np.repeat(points[:, None], frames, axis=1)
    return Tracks(held, np.full(held.shape[:2], TrackState.VISIBLE))


def _with_intervals(values: dict[str, Float[np.ndarray, " n"]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, each in values.items():
        estimate = measure.bootstrap_interval(each)
        result[name] = _number(estimate.value)
        result[f"{name}_interval"] = [_number(estimate.low), _number(estimate.high)]
    return result


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(float(value), 5) if math.isfinite(value) else None


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The options of the command line; not at import, as others use this module as a library."""
    for name, default, meaning in (
        ("out", None, "Folder for the results."),
        ("checkpoint", None, "The --workdir of train.py; the shipped model if none."),
        ("stage", None, "The model after this training stage; the last by default."),
    ):
        flags.DEFINE_string(name, default, meaning, flag_values=values)
    for name, default, meaning in (
        ("num_scenes", 64, "How many held-out scenes."),
        ("seed", 0, "Which held-out scenes and which noise."),
        ("steps", None, "Sampling steps; the config's by default."),
        ("batch_size", 8, "Videos sampled at a time."),
    ):
        flags.DEFINE_integer(name, default, meaning, flag_values=values)
    for name in _CONDITIONS:
        meaning = f"Guidance by the {name}; the config's if none."
        flags.DEFINE_float(f"{name}_scale", None, meaning, flag_values=values)
    meaning = "Which tracker scores the videos."
    flags.DEFINE_enum("tracker", "template", list(TRACKERS), meaning, flag_values=values)
    meaning = "Also hold a point of a still background."
    flags.DEFINE_bool("background_anchor", False, meaning, flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Evaluates a checkpoint and writes what it finds to --out."""
    options = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every option is --name=value")
    if not options.out:
        raise UserError("--out names the folder for the results: add --out=DIR")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps is at least 1, got {options.steps}")
    generator = Generator.load(options.checkpoint, options.stage)
    scales = {name: getattr(options, f"{name}_scale") for name in _CONDITIONS}
    given = {name: scale for name, scale in scales.items() if scale is not None}
    evaluation = evaluate(
        generator,
        num_scenes=options.num_scenes,
        seed=options.seed,
        steps=options.steps,
        guidance=dataclasses.replace(generator.guidance, **given),
        batch_size=options.batch_size,
        background_anchor=options.background_anchor,
        tracker=TRACKERS[options.tracker](),
    )
    evaluation.metrics["checkpoint"] = options.checkpoint or "shipped"
    evaluation.metrics["stage"] = options.stage
    out = pathlib.Path(options.out)
    write(evaluation, out)
    print((out / "metrics.md").read_text(encoding="utf-8"))
    print(f"contact sheet: {out / 'contact_sheet.png'}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
