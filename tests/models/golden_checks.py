"""Asserting what `nuwa_jax.golden` compares; with `pytest -s` every error is printed."""

from nuwa_jax.golden.__main__ import line
from nuwa_jax.golden.compare import compiled, relative

__all__ = ["check", "check_items", "compiled"]


def check_items(items):
    """Asserts that there is something to compare and that all of it is within its bound."""
    items = list(items)
    for item in items:
        print(line(item))
    assert items
    failed = [line(item) for item in items if item.failed]
    assert not failed, "\n".join(failed)


def check(ours, theirs, bound, name="output"):
    """Asserts that the relative L2 error is within the bound."""
    check_items([relative(name, ours, theirs, bound)])
