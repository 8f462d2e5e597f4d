"""What the objects of a procedural scene look like: outlines, patterns, colours and their names."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

# Every outline fits a circle of this radius in the unit coordinates of its sprite (x right,
# y down), in which a disc has radius 1. The sizes below give all outlines comparable areas.
OUTLINE_RADIUS = 1.2

SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "blob", "bar", "moon")

# The two names say the same pattern of a sprite ("striped disc") and of a ground ("on stripes").
PATTERNS = {
    "striped": "stripes",
    "checked": "checks",
    "dotted": "dots",
    "rough": "noise",
    "shaded": "haze",
}

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 205, 35),
    "cyan": (40, 196, 208),
    "purple": (134, 58, 186),
    "orange": (242, 130, 30),
    "pink": (240, 120, 180),
    "grey": (140, 140, 140),
}

# A star's tips and notches: radii of the two, and half the angle between tips.
_STAR_TIP, _STAR_NOTCH, _STAR_HALF_ANGLE = 1.2, 0.58, np.pi / 5


def depth_inside(
    shape: str,
    x: Float[np.ndarray, "*n"],
    y: Float[np.ndarray, "*n"],
    phases: Float[np.ndarray, " 3"],
) -> Float[np.ndarray, "*n"]:
    """How deep points lie inside an outline: > 0 inside, 0 on it, < 0 outside.

    This one function decides coverage, occlusion and visibility, so that they cannot disagree. Near
    the outline it is the distance to it, up to a factor close to 1; in unit coordinates.

    Args:
      shape: one of `SHAPES`.
      x: of the points, in unit coordinates.
      y: of the points, in unit coordinates.
      phases: three angles that make one blob differ from another.
    """
    if shape == "disc":
        return 1.0 - np.sqrt(x * x + y * y)
    if shape == "square":
        return 0.84 - np.maximum(np.abs(x), np.abs(y))
    if shape == "bar":
        return np.minimum(1.1 - np.abs(x), 0.479 - np.abs(y))
    if shape == "triangle":
        # Half-planes at the distance of the inscribed circle; one tip points up.
        sides = np.maximum(np.abs(x) * np.sqrt(0.75) - 0.5 * y, y)
        return 0.6 - sides
    if shape == "cross":
        across, along = np.abs(x), np.abs(y)
        return np.maximum(
            np.minimum(1.1 - across, 0.4 - along), np.minimum(0.4 - across, 1.1 - along)
        )
    if shape == "ring":
        radius = np.sqrt(x * x + y * y)
        return np.minimum(1.05 - radius, radius - 0.45)
    if shape == "moon":
        bite = np.sqrt((x - 0.6) ** 2 + y * y) - 0.75
        return np.minimum(1.1 - np.sqrt(x * x + y * y), bite)
    radius, angle = np.sqrt(x * x + y * y), np.arctan2(y, x)
    if shape == "blob":
        waves = sum(
            amplitude * np.cos(order * angle + phase)
            for order, amplitude, phase in zip((2, 3, 4), (0.12, 0.08, 0.05), phases, strict=True)
        )
        return 0.95 + waves - radius
    if shape == "star":
        # By symmetry only half a tip is needed: the edge from the tip to the notch beside it.
        fold = np.mod(angle + np.pi / 2 + _STAR_HALF_ANGLE, 2 * _STAR_HALF_ANGLE)
        fold = np.abs(fold - _STAR_HALF_ANGLE)
        edge_x = _STAR_TIP - _STAR_NOTCH * np.cos(_STAR_HALF_ANGLE)
        edge_y = _STAR_NOTCH * np.sin(_STAR_HALF_ANGLE)
        along = (_STAR_TIP - radius * np.cos(fold)) * edge_y - radius * np.sin(fold) * edge_x
        return along / np.hypot(edge_x, edge_y)
    raise ValueError(f"shape is one of {', '.join(SHAPES)}, got {shape!r}")


def sprite_texture(
    rng: np.random.Generator,
    shape: str,
    phases: Float[np.ndarray, " 3"],
    colour: str,
    pattern: str,
    size: int,
    cell: float,
    grain: float,
) -> UInt8[np.ndarray, "s s 4"]:
    """A sprite as RGB premultiplied by alpha, and alpha; `size` texels span ±`OUTLINE_RADIUS`.

    `cell` is the period of the pattern and `grain` that of the fine noise over it, in texels.
    """
    palette = _palette(np.array(COLOURS[colour], np.float32), dark=0.18, light=0.75)
    rgb = _paint(rng, pattern, size, size, cell, grain, 0.36, palette)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * np.float32(OUTLINE_RADIUS)
    depth = depth_inside(shape, axis[None, :], axis[:, None], phases.astype(np.float32))
    # Half a texel of ramp to either side of the outline.
    alpha = np.clip(depth * np.float32(size / (2 * OUTLINE_RADIUS)) + 0.5, 0, 1)[..., None]
    return np.concatenate([rgb * alpha + 0.5, alpha * 255 + 0.5], axis=-1).astype(np.uint8)


def ground_texture(
    rng: np.random.Generator,
    colour: str,
    pattern: str,
    height: int,
    width: int,
    cell: float,
    grain: float,
) -> UInt8[np.ndarray, "h w 3"]:
    """A background in a dull tone of `colour`, fainter than sprites; `cell`, `grain` in texels."""
    base = np.array(COLOURS[colour], np.float32)
    # Halfway to the grey of its own brightness: sprites stay the most colourful things in sight.
    dull = 0.5 * base + 0.5 * base.mean()
    palette = _palette(0.75 * dull, dark=0.4, light=0.35)
    return _paint(rng, pattern, height, width, cell, grain, 0.3, palette)


def _paint(
    rng: np.random.Generator,
    pattern: str,
    height: int,
    width: int,
    cell: float,
    grain: float,
    noise: float,
    palette: UInt8[np.ndarray, "256 1 3"],
) -> UInt8[np.ndarray, "h w 3"]:
    value = _pattern(rng, pattern, height, width, cell)
    # Fine noise gives every neighbourhood corners: along a stripe nothing else can be tracked.
    value = value * np.float32(1 - noise) + _noise(rng, height, width, grain) * np.float32(noise)
    return cv2.applyColorMap((value * 255).astype(np.uint8), palette)


def _pattern(
    rng: np.random.Generator, pattern: str, height: int, width: int, cell: float
) -> Float[np.ndarray, "h w"]:
    """The bare pattern in [0, 1], its period `cell` texels, turned by a random angle."""
    if pattern == "rough":
        return _noise(rng, height, width, 0.6 * cell)
    angle, shift_x, shift_y = rng.uniform(0, 2 * np.pi), *rng.uniform(0, 1, 2)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x = (np.arange(width, dtype=np.float32) - width / 2)[None, :]
    y = (np.arange(height, dtype=np.float32) - height / 2)[:, None]
    if pattern == "shaded":
        reach = np.float32(abs(cos) * width / 2 + abs(sin) * height / 2)
        return (x * cos + y * sin) / (2 * reach) + np.float32(0.5)
    turn = np.float32(2 * np.pi / cell)
    across = np.sin(x * (turn * cos) + (y * (turn * sin) + np.float32(2 * np.pi * shift_x)))
    if pattern == "striped":
        return _edges(across)
    along = np.sin(y * (turn * cos) - (x * (turn * sin) + np.float32(2 * np.pi * shift_y)))
    if pattern == "checked":
        return _edges(2 * across * along)
    if pattern == "dotted":
        return _edges(across + along - np.float32(0.6))
    raise ValueError(f"pattern is one of {', '.join(PATTERNS)}, got {pattern!r}")


def _edges(wave: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """A wave about 0 made nearly two-valued; the slope left over keeps its edges from aliasing."""
    return np.clip(wave * np.float32(1.25) + np.float32(0.5), 0, 1)


def _noise(
    rng: np.random.Generator, height: int, width: int, grain: float
) -> Float[np.ndarray, "h w"]:
    """Smooth noise in [0, 1] whose features are about `grain` texels wide."""
    coarse = rng.random((int(height / grain) + 2, int(width / grain) + 2), np.float32)
    noise = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    # Interpolation averages extremes away: stretch what is left.
    return np.clip(noise * np.float32(1.6) - np.float32(0.3), 0, 1)


def _palette(
    base: Float[np.ndarray, " 3"], dark: float, light: float
) -> UInt8[np.ndarray, "256 1 3"]:
    """From `dark` times the colour, over the colour itself, to `light` of the way to white."""
    steps = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    stops = np.stack([dark * base, base, base + light * (255 - base)])
    below = stops[0] + (stops[1] - stops[0]) * np.minimum(steps / 0.6, 1)
    above = (stops[2] - stops[1]) * np.maximum((steps - 0.6) / 0.4, 0)
    return (below + above).astype(np.uint8)[:, None]
