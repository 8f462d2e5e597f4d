"""Where a run's time goes, over all its restarts; *goodput* is the share that trained and was kept.

    goodput = seconds in steps that were kept / seconds in which a process of the run ran

A process is at any moment in exactly one phase. Steps that were computed after the checkpoint from
which a run goes on were in vain: their seconds are moved to `lost`. What a process did between its
last note (every logged line and checkpoint) and its end by a kill is not known: it is within
`down`, the time between the last note and the next start, which is told but not in the goodput.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from absl import logging

from nuwa_jax.watching.words import duration

# step: the device computes, or the host prepares its next step. data: the device has nothing to do
# because there is no batch. other: reading configs, parameters and checkpoints, closing files.
PHASES = ("step", "data", "checkpoint", "evaluation", "compile", "other")
LOST = "lost"
# Checkpoints whose share of the time is remembered; older ones are not gone back to.
REMEMBERED = 64

Place = tuple[int, int]  # a stage's place in the curriculum, and steps of it that are done


class Goodput:
    """A clock that is always in one phase; begins in `other`."""

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Goes on with what `path` holds, if it is there; what cannot be read is moved aside.

        Args:
          path: JSON file; None keeps nothing, as all processes but one do.
          clock: seconds of this process.
          wall: seconds since the epoch, comparable between processes.
        """
        self._path, self._clock, self._wall = None if path is None else Path(path), clock, wall
        self._phase, self._since = "other", clock()
        self._seconds = dict.fromkeys((*PHASES, LOST), 0.0)
        self._steps_at: list[tuple[Place, float]] = []  # seconds in steps when it was saved
        self.down = 0.0
        self.starts = 1
        if self._path is not None and self._path.exists():
            self._read(self._path)

    @property
    def seconds(self) -> dict[str, float]:
        """Of every phase and `lost`, over all restarts; their sum is the time of all processes."""
        self._switch(self._phase)
        return dict(self._seconds)

    @property
    def share(self) -> float:
        """The goodput, in [0, 1]."""
        seconds = self.seconds
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time within counts as `name`; phases within it are taken out of it."""
        before = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @contextlib.contextmanager
    def waiting(self, busy: Callable[[], bool]) -> Iterator[None]:
        """Waiting for a batch: `data`, unless the device was `busy` all the while."""
        before = self._phase
        self._switch(before)
        try:
            yield
        finally:
            self._phase = before if busy() else "data"
            self._switch(before)

    def resume(self, place: Place | None) -> None:
        """Counts as lost what was computed after `place`, a checkpoint, or at all without one.

        Called wherever a stage begins; where nothing was lost it changes nothing.
        """
        self._switch(self._phase)
        kept = [(at, steps) for at, steps in self._steps_at if place is not None and at <= place]
        base = kept[-1][1] if kept else 0.0
        lost = self._seconds["step"] - base
        self._seconds["step"] = base
        self._seconds[LOST] += lost
        self._steps_at = kept

    def saving(self, place: Place) -> None:
        """What has been computed so far is that of the checkpoint that is about to be written."""
        self._switch(self._phase)
        kept = [(at, steps) for at, steps in self._steps_at if at < place]
        self._steps_at = [*kept, (place, self._seconds["step"])][-REMEMBERED:]
        self.note()

    def note(self) -> None:
        """Writes the file anew, whole whatever happens meanwhile."""
        if self._path is None:
            return
        text = json.dumps(
            {
                "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
                "down": round(self.down, 3),
                "starts": self.starts,
                "noted": self._wall(),
                "checkpoints": [[*place, round(steps, 3)] for place, steps in self._steps_at],
            }
        )
        part = self._path.with_suffix(".part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a host that fails may leave the new name of an empty file
        os.replace(part, self._path)

    def __str__(self) -> str:
        """All of it in a line."""
        seconds = self.seconds
        parts = ", ".join(
            f"{name} {duration(value)}"
            for name, value in seconds.items()
            if value >= 0.5 or name == "step"
        )
        down = f"; {self.starts} starts, down {duration(self.down)}" if self.starts > 1 else ""
        return f"goodput {self.share:.0%} of {duration(sum(seconds.values()))}: {parts}{down}"

    def _switch(self, phase: str) -> None:
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def _read(self, path: Path) -> None:
        try:
            found: Mapping = json.loads(path.read_text())
            seconds = {name: float(found["seconds"][name]) for name in self._seconds}
            down = float(found["down"]) + max(0.0, self._wall() - found["noted"])
            starts = int(found["starts"]) + 1
            steps_at = [((i, n), float(s)) for i, n, s in found["checkpoints"]]
        except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
            # Not worth a run that does not start: nothing that is trained depends on it.
            aside = path.with_name(path.name + ".damaged")
            os.replace(path, aside)
            logging.warning(
                "%s should be what earlier processes of this run noted of their time, but it "
                "cannot be read (%r): it is %s now, and time is counted anew",
                path,
                error,
                aside.name,
            )
            return
        self._seconds, self.down, self.starts, self._steps_at = seconds, down, starts, steps_at
