"""What tests ask of runs and processes."""

import json
from pathlib import Path

from nuwa_jax.data.pipeline import Batches


def losses(workdir):
    """(stage, step, loss) of every logged step; also while the run writes, or before it begins."""
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # being written
        found.append((row["stage"], row["step"], row["loss"]))
    return found


def die_after(monkeypatch, draws):
    """Ends the run when it has drawn so many batches; nothing more is saved, as after a kill."""
    draw, left = Batches.__next__, iter(range(draws))

    def dying(batches):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return draw(batches)

    monkeypatch.setattr(Batches, "__next__", dying)


def alive(pid):
    """Whether a process (Linux) has not ended yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, but nobody has asked for its exit code
