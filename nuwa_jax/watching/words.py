"""Numbers as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """12 -> 0:12, 3725 -> 1:02:05."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def flops(value: float) -> str:
    """Floating-point operations, or those per second, with a prefix: 1.97e14 -> 197 T."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
