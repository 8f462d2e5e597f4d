"""Compares this package with arrays that the original DragNUWA 1.5 code made.

python -m nuwa_jax.golden DIR [--only=unet,vae,...] [--json=FILE]

One line per comparison; the last line is a JSON object. The exit code is 0 if every comparison is
within its bound and nothing is missing, 1 if not, 2 if DIR is no such folder.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from nuwa_jax.errors import UserError, run_main
from nuwa_jax.golden.compare import MISSING, SKIPPED, Item
from nuwa_jax.golden.model import Golden
from nuwa_jax.golden.run import run_checks

ONLY = flags.DEFINE_list("only", [], "Checks to run, named as the folder's files; all by default.")
JSON = flags.DEFINE_string("json", None, "File for the summary and every item.")


def main(argv: Sequence[str]) -> None:
    """Prints the report and exits with its code."""
    if len(argv) != 2:
        raise UserError("give one folder of goldens: python -m nuwa_jax.golden DIR")
    sys.exit(report(argv[1], ONLY.value, JSON.value))


def report(folder: str | Path, only: Sequence[str] = (), out: str | Path | None = None) -> int:
    """Prints every item and the summary, writes them to `out`; returns the exit code."""
    start, items = time.monotonic(), []
    for item in run_checks(Golden(folder), only):
        items.append(item)
        print(line(item), flush=True)
    summary = {"folder": str(folder)} | summarize(items)
    summary["seconds"] = round(time.monotonic() - start, 1)
    if out:
        entries = [item._asdict() | {"error": _jsonable(item.error)} for item in items]
        text = json.dumps(summary | {"items": entries}, indent=1, allow_nan=False)
        try:
            Path(out).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out}: cannot write the report: {error.strerror}") from error
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


def line(item: Item) -> str:
    """The item as one line of the report."""
    note = f"  ({item.note})" if item.note else ""
    if item.error is None:
        return f"{item.kind:8} {item.name}{note}"
    verdict = "ok" if item.passed else "FAILED"
    return f"{verdict:8} {item.name}  {item.error:.2e}  bound {item.bound:.0e}, {item.kind}{note}"


def summarize(items: Sequence[Item]) -> dict[str, object]:
    """Counts, and the names of all that is not as it should be."""
    compared = [item for item in items if item.error is not None]
    shares = {item.name: item.error / item.bound for item in compared if item.bound}
    nearest = max(shares, key=shares.get, default=None)
    return {
        "ok": bool(compared) and not any(item.failed for item in items),
        "compared": len(compared),
        "passed": sum(item.passed for item in compared),
        "failed": [item.name for item in items if item.failed and item.kind != MISSING],
        "missing": [item.name for item in items if item.kind == MISSING],
        "skipped": [item.name for item in items if item.kind == SKIPPED],
        "nearest_to_bound": nearest,
        "its_share_of_bound": _jsonable(shares.get(nearest)),
    }


def _jsonable(error: float | None) -> float | str | None:
    return error if error is None or math.isfinite(error) else str(error)


if __name__ == "__main__":
    run_main(main)
