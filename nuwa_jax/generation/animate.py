"""A picture file and a drags file to a video file, with an overlay of the drags beside it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from nuwa_jax.data.video import PointTransform, VideoError, read_video, resize_video, write_video
from nuwa_jax.diffusion.guidance import GuidanceScales
from nuwa_jax.errors import UserError
from nuwa_jax.generation.generator import Generator
from nuwa_jax.generation.overlay import overlay_video, side_by_side
from nuwa_jax.motion.dragnuwa import DEFECTS, reference_tracks
from nuwa_jax.motion.drags import DragSet
from nuwa_jax.motion.tracks import Tracks

OVERLAY_SIDE = 256  # the shorter side of an overlay is enlarged to about this many pixels


@dataclasses.dataclass(frozen=True)
class DragNuwaTracks:
    """A file of tracks of the DragNUWA 1.5 demo, and which of its defects to reproduce.

    `defects` are options of `nuwa_jax.motion.dragnuwa.reference_tracks`. Its canvas is stretched
    over the part of the picture that the model sees.
    """

    path: str | Path
    defects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Written:
    """The files that `animate` made, and what should be known of the drags."""

    video: Path
    overlay: Path
    remarks: tuple[str, ...]


def animate(
    generator: Generator,
    *,
    image: str | Path | None,
    drags: str | Path | DragNuwaTracks,
    out: str | Path,
    video: str | Path | None = None,
    strength: float = 1.0,
    text: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: GuidanceScales | None = None,
) -> Written:
    """Samples the video in which the dragged points of a picture, or of a clip, follow the drags.

    The picture is cropped to the model's shape about its middle and resized; drags go with it.

    Args:
      generator: the model.
      image: the first frame. May be left out if `video` is given.
      drags: a drags file (`nuwa_jax.motion.drags`) with as many frames as the model makes, or
        tracks of the DragNUWA 1.5 demo.
      out: the .mp4 to write; the overlay gets `_overlay` added to its name.
      video: a clip whose motion is kept as far as `strength` leaves it; its first frame is the
        picture unless `image` is given.
      strength: with `video`, how much is remade, in (0, 1].
      text: a caption.
      seed: of the noise.
      steps: sampling steps; None for the model's own.
      guidance: None for the model's own.

    Raises:
      UserError: a file cannot be read or written or does not fit the model.
    """
    out = Path(out)
    if out.suffix.lower() != ".mp4":
        raise UserError(f"--out must end in .mp4, got {out}")
    if not out.parent.is_dir():
        raise UserError(f"the folder of --out does not exist: make {out.parent} first")
    if image is None and video is None:
        raise UserError("give a picture (--image) or a clip (--video) to animate")
    if not 0 < strength <= 1:
        raise UserError(f"--strength is greater than 0 and at most 1, got {strength}")
    if steps is not None and steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}")
    drawn = drags if isinstance(drags, DragNuwaTracks) else _load_drags(drags, generator)
    clip = None if video is None else _read_clip(video, generator)
    picture = clip[0] if image is None else read_image(image)
    fitted, transform = resize_video(picture[None], generator.height, generator.width)
    remarks: tuple[str, ...] = ()
    if isinstance(drawn, DragSet):
        fitted_drags = fit_drags(drawn, picture.shape[:2], transform, generator)
        tracks, remarks = fitted_drags.to_tracks(generator.frames), tuple(fitted_drags.outside())
    else:
        tracks = _demo_tracks(drawn, generator)
    for remark in remarks:
        logging.warning("%s; what it drags leaves the picture there", remark)
    padded = _pad_to_bucket(tracks, generator.config.data.max_drags)
    if clip is not None:
        clip = resize_video(clip, generator.height, generator.width)[0][None]

    result = generator.generate(
        fitted,
        padded.points[None],
        padded.state[None],
        [text],
        seed=seed,
        steps=steps,
        guidance=guidance,
        video=clip,
        strength=strength,
    )[0]
    overlay = out.with_name(f"{out.stem}_overlay.mp4")
    write_video(out, result, generator.fps)
    scale = max(1, round(OVERLAY_SIDE / min(generator.height, generator.width)))
    still = np.broadcast_to(fitted[0], result.shape)
    overlays = [overlay_video(frames, tracks, scale=scale) for frames in (still, result)]
    write_video(overlay, side_by_side(overlays), generator.fps)
    return Written(out, overlay, remarks)


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture file as RGB.

    Raises:
      UserError: it is missing or is no picture.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"picture {path} does not exist: check the path") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as a picture: give a whole PNG or JPEG ({error})"
        ) from error


def fit_drags(
    drags: DragSet,
    picture_size: tuple[int, int],
    transform: PointTransform,
    generator: Generator,
) -> DragSet:
    """Drags of a picture (of height, width) on the part of it that the model sees."""
    height, width = picture_size
    crop_width, crop_height = (
        round(side / scale)
        for side, scale in zip((generator.width, generator.height), transform.scale, strict=True)
    )
    left, top = (
        round(0.5 - (offset + 0.5) / scale)
        for offset, scale in zip(transform.offset, transform.scale, strict=True)
    )
    drags = drags.resize(width, height).crop(left, top, crop_width, crop_height)
    return drags.resize(generator.width, generator.height)


def _load_drags(path: str | Path, generator: Generator) -> DragSet:
    drags = DragSet.load(path)
    if drags.frames != generator.frames:
        raise UserError(
            f"{path} is for {drags.frames} frames but the model makes {generator.frames}: "
            f'set "frames" to {generator.frames} and check start, end and hidden'
        )
    return drags


def _demo_tracks(drags: DragNuwaTracks, generator: Generator) -> Tracks:
    unknown = set(drags.defects) - set(DEFECTS)
    if unknown:
        raise UserError(f"the demo's defects are {', '.join(DEFECTS)}, not {sorted(unknown)}")
    try:
        text = Path(drags.path).read_text(encoding="utf-8")
        size = (generator.frames, generator.height, generator.width)
        points, state = reference_tracks(text, *size, **dict.fromkeys(drags.defects, True))
    except OSError as error:
        raise UserError(f"{drags.path} cannot be read: {error.strerror}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{drags.path} is no file of the demo's tracks, a JSON list of lists of points "
            f"[[[x, y], ...], ...]: {error}"
        ) from error
    if not len(points):
        raise UserError(f"{drags.path} holds no track that starts in the picture: draw one")
    return Tracks(points, state)


def _pad_to_bucket(tracks: Tracks, bucket: int) -> Tracks:
    """As many drags as a multiple of the bucket: any number up to it compiles once."""
    return tracks.pad(-(-tracks.num_tracks // bucket) * bucket)


def _read_clip(path: str | Path, generator: Generator) -> UInt8[np.ndarray, "t h w 3"]:
    clip, _ = read_video(path, max_frames=generator.frames, fps=generator.fps)
    if len(clip) < generator.frames:
        raise VideoError(
            f"{path} has {len(clip)} frames at {generator.fps:g} per second, the model needs "
            f"{generator.frames}: give a longer clip"
        )
    return clip
