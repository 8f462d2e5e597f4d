"""Where a run's numbers and pictures go: metrics.jsonl, TensorBoard, and the progress line."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class MetricsFile:
    """`metrics.jsonl`: one JSON object per logged step, whole after any interruption."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def cut(self, stages: Iterable[str], stage: str, step: int) -> None:
        """Drops what a resumed run will write again.

        Args:
          stages: the stages before the resumed one; their lines stay.
          stage: the resumed one; its lines up to `step` stay.
          step: steps of `stage` that are done.
        """
        if not self._path.exists():
            return
        earlier = set(stages)
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line at which the run was killed; it is written again
            if row["stage"] in earlier or (row["stage"] == stage and row["step"] <= step):
                kept.append(line + "\n")
        part = self._path.with_suffix(".part")
        part.write_text("".join(kept))
        os.replace(part, self._path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object; a number that is not finite becomes null."""
        clean = {
            k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps(clean) + "\n")


class TensorBoard:
    """TensorBoard events of one stage, without TensorFlow; videos are animated GIFs."""

    def __init__(self, directory: str | Path, first_step: int) -> None:
        """Whatever an earlier process logged at or beyond `first_step` is hidden."""
        self._writer = EventFileWriter(str(directory), flush_secs=10)
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes one point of each curve."""
        self._add([Summary.Value(tag=t, simple_value=float(v)) for t, v in values.items()], step)

    def video(self, tag: str, video: UInt8[np.ndarray, "b t h w 3"], fps: float, step: int) -> None:
        """Writes clips side by side, playing in a loop."""
        frames = np.concatenate(list(video), axis=2)
        image = Summary.Image(
            height=frames.shape[1],
            width=frames.shape[2],
            colorspace=3,
            encoded_image_string=gif_bytes(frames, fps),
        )
        self._add([Summary.Value(tag=tag, image=image)], step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()

    def _add(self, values: list[Summary.Value], step: int) -> None:
        summary = Summary(value=values)
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def gif_bytes(video: UInt8[np.ndarray, "t h w 3"], fps: float) -> bytes:
    """An endlessly looping GIF."""
    first, *rest = [Image.fromarray(frame) for frame in video]
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return out.getvalue()
