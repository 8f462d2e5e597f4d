"""Where things are in a procedural scene: the camera, the sprites and their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from nuwa_jax.data import scene_textures
from nuwa_jax.motion.tracks import inside

_MAX_SPRITES = 255  # `Scene.objects` is uint8


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """What scenes may look like. Lengths are shares of the picture's shorter side.

    Attributes:
      height, width: of the picture in pixels.
      frames: of the clip.
      fps: frames per second that the clip claims; motion is set per clip, not per second.
      min_sprites, max_sprites: bounds on the number of sprites, each number as likely as the other.
      diameter: bounds on the size of a sprite in frame 0.
      displacement: bounds on how far a moving sprite gets from its start over the clip.
      curvature: largest sideways bulge of a path, as a share of its displacement.
      speed_change: largest change of speed along a path: 0 is steady, below 1 never reverses.
      still_probability: chance of a sprite to stay where it is; one of them always moves.
      exit_probability: chance of a moving sprite to go anywhere, also out of the picture; the
        others end with their centre inside.
      rotation_probability, rotation: chance of a moving sprite to turn; by at most so many degrees.
      scaling_probability, scaling: chance of a moving sprite to grow or shrink; by at most this
        factor.
      pan_probability, pan: chance of the camera to pan; bounds on the length of the pan.
      zoom_probability, zoom: chance of the camera to zoom; bounds on the factor, in or out.
      points_per_sprite: tracks on each sprite.
      background_points: tracks on the background; rounded up to fill a grid.
      supersample: pictures are drawn this many times larger and averaged down.
    """

    height: int = 64
    width: int = 64
    frames: int = 8
    fps: float = 8.0
    min_sprites: int = 1
    max_sprites: int = 3
    diameter: tuple[float, float] = (0.22, 0.45)
    displacement: tuple[float, float] = (0.15, 0.5)
    curvature: float = 0.35
    speed_change: float = 0.6
    still_probability: float = 0.2
    exit_probability: float = 0.15
    rotation_probability: float = 0.3
    rotation: float = 40.0
    scaling_probability: float = 0.3
    scaling: float = 1.3
    pan_probability: float = 0.3
    pan: tuple[float, float] = (0.04, 0.15)
    zoom_probability: float = 0.15
    zoom: tuple[float, float] = (1.04, 1.15)
    points_per_sprite: int = 6
    background_points: int = 16
    supersample: int = 2

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "points_per_sprite", "supersample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 0 <= self.min_sprites <= self.max_sprites <= _MAX_SPRITES:
            raise ValueError(
                f"scenes need 0 <= min_sprites <= max_sprites <= {_MAX_SPRITES}, "
                f"got {self.min_sprites} and {self.max_sprites}"
            )
        if self.background_points < 0 or self.curvature < 0 or self.fps <= 0:
            raise ValueError(
                "scenes need background_points >= 0, curvature >= 0 and fps > 0, got "
                f"{self.background_points}, {self.curvature} and {self.fps}"
            )
        for name in ("diameter", "displacement", "pan", "zoom"):
            low, high = getattr(self, name)
            least = 1.0 if name == "zoom" else 0.0
            if name == "diameter" and low <= 0:
                raise ValueError(f"diameter is positive, got {(low, high)}")
            if not least <= low <= high:
                raise ValueError(f"{name} is (low, high), {least} <= low <= high: {(low, high)}")
        if not 0 <= self.speed_change < 1:
            raise ValueError(f"speed_change is in [0, 1), got {self.speed_change}")
        if self.scaling < 1:
            raise ValueError(f"scaling is a factor of at least 1, got {self.scaling}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is in [0, 1], got {value}")


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A flat figure that moves by similarities.

    Attributes:
      shape: one of `scene_textures.SHAPES`.
      phases: what makes one blob differ from another.
      colour: one of `scene_textures.COLOURS`.
      pattern: one of `scene_textures.PATTERNS`.
      radius: pixels per unit coordinate in frame 0.
      transform: float64 [t 2 3], from its unit coordinates to pixels.
    """

    shape: str
    phases: Float[np.ndarray, " 3"]
    colour: str
    pattern: str
    radius: float
    transform: Float[np.ndarray, "t 2 3"]

    def contains(
        self, inverse: Float[np.ndarray, "*n 2 3"], x: np.ndarray, y: np.ndarray
    ) -> Bool[np.ndarray, "*n"]:
        """Whether pixels (x, y) lie on the sprite; `inverse` broadcasts against them."""
        u = inverse[..., 0, 0] * x + inverse[..., 0, 1] * y + inverse[..., 0, 2]
        v = inverse[..., 1, 0] * x + inverse[..., 1, 1] * y + inverse[..., 1, 2]
        return scene_textures.depth_inside(self.shape, u, v, self.phases) > 0

    def bounds(self) -> tuple[Float[np.ndarray, "t 2"], float]:
        """The middle of the sprite in every frame and a radius that contains it in all."""
        scale = np.hypot(self.transform[:, 0, 0], self.transform[:, 1, 0]).max()
        return self.transform[:, :, 2], scale * scene_textures.OUTLINE_RADIUS


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything about a scene but its texels.

    Attributes:
      sprites: in painter's order: each hides those before it.
      ground_colour: of the background, one of `scene_textures.COLOURS`.
      ground_pattern: of the background, one of `scene_textures.PATTERNS`.
      camera_words: what the camera does, such as "pan left"; empty if it is still.
      transforms: float64 [o t 2 3] from the own coordinates of object o to pixels of frame t.
        Object 0 is the background, whose coordinates are the pixels of frame 0.
      inverses: float64 [o t 2 3], back.
    """

    sprites: tuple[Sprite, ...]
    ground_colour: str
    ground_pattern: str
    camera_words: tuple[str, ...]
    transforms: Float[np.ndarray, "o t 2 3"]
    inverses: Float[np.ndarray, "o t 2 3"]


def draw_layout(rng: np.random.Generator, config: SceneConfig) -> Layout:
    """A layout drawn at random."""
    camera, camera_words = _camera(rng, config)
    sprites = _sprites(rng, config, camera)
    colour, pattern = _ground(rng, sprites)
    transforms = np.stack([camera] + [sprite.transform for sprite in sprites])
    return Layout(
        tuple(sprites), colour, pattern, tuple(camera_words), transforms, invert(transforms)
    )


def _camera(
    rng: np.random.Generator, config: SceneConfig
) -> tuple[Float[np.ndarray, "t 2 3"], list[str]]:
    """From the picture as frame 0 shows it to the picture as frame i shows it, and its name."""
    side = min(config.height, config.width)
    time = _progress(rng, config)
    pans, zooms = rng.random(2) < (config.pan_probability, config.zoom_probability)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(*config.pan) * side
    factor, zoom_in = rng.uniform(*config.zoom), rng.random() < 0.5
    words = []
    pan = np.zeros(2)
    if pans:
        # The camera goes one way, what it sees goes the other.
        pan = -length * np.array([np.cos(angle), np.sin(angle)])
        words.append("pan " + ("right", "down", "left", "up")[round(angle / (np.pi / 2)) % 4])
    zoom = np.ones_like(time)
    if zooms:
        zoom = (factor if zoom_in else 1 / factor) ** time
        words.append("zoom in" if zoom_in else "zoom out")
    middle = np.array([(config.width - 1) / 2, (config.height - 1) / 2])
    shift = middle - zoom[:, None] * middle + time[:, None] * pan
    return similarity(zoom, np.zeros_like(time), shift), words


def _sprites(
    rng: np.random.Generator, config: SceneConfig, camera: Float[np.ndarray, "t 2 3"]
) -> list[Sprite]:
    count = int(rng.integers(config.min_sprites, config.max_sprites + 1))
    side = min(config.height, config.width)
    colours = rng.permutation(list(scene_textures.COLOURS))
    radii = rng.uniform(*config.diameter, size=count) * side / 2
    still = rng.random(count) < config.still_probability
    if count:
        still[rng.integers(count)] = False
    sprites: list[Sprite] = []
    starts = np.empty((0, 2))
    for index in range(count):
        path = _path(rng, config, radii[: index + 1], starts, still[index])
        starts = np.concatenate([starts, path[:1]])
        scale, angle = _turn(rng, config, still[index])
        own = similarity(radii[index] * scale, angle, path)
        sprites.append(
            Sprite(
                shape=str(rng.choice(scene_textures.SHAPES)),
                phases=rng.uniform(0, 2 * np.pi, 3),
                colour=str(colours[index % len(colours)]),
                pattern=str(rng.choice(list(scene_textures.PATTERNS))),
                radius=float(radii[index]),
                transform=compose(camera, own),
            )
        )
    return sprites


def _path(
    rng: np.random.Generator,
    config: SceneConfig,
    radii: Float[np.ndarray, " n"],
    starts: Float[np.ndarray, "m 2"],
    still: bool,
) -> Float[np.ndarray, "t 2"]:
    """Positions of the middle of the last of `radii`, given where the sprites before it start."""
    tries = 24
    size = np.array([config.width, config.height])
    # Half of a sprite may stick out at the start, if the picture is large enough for a choice.
    margin = np.minimum(radii[-1] / 2, size / 2)
    start = rng.uniform(margin, size - margin, (tries, 2)) - 0.5
    angle = rng.uniform(0, 2 * np.pi, tries)
    length = rng.uniform(*config.displacement) * min(config.height, config.width)
    step = length * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    roams = rng.random() < config.exit_probability
    bulge = rng.uniform(-config.curvature, config.curvature)
    time = _progress(rng, config)[:, None]

    # The first try that ends inside and does not start on top of others, else the least crowded.
    gap = np.linalg.norm(start[:, None] - starts[None], axis=-1) - 0.8 * (radii[:-1] + radii[-1])
    crowding = np.maximum(-gap, 0).sum(axis=1)
    if not (roams or still):
        crowding = crowding + 1e6 * ~inside(start + step, config.height, config.width)
    best = int(crowding.argmin())
    if still:
        return np.repeat(start[best : best + 1], config.frames, axis=0)
    # A parabola from start to end: its bulge is largest half-way.
    sideways = bulge * np.array([-step[best, 1], step[best, 0]])
    return start[best] + time * step[best] + 4 * time * (1 - time) * sideways


def _turn(
    rng: np.random.Generator, config: SceneConfig, still: bool
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """The scale, 1 in frame 0, and the angle in radians of a sprite in every frame."""
    turns, scales = rng.random(2) < (config.rotation_probability, config.scaling_probability)
    first = rng.uniform(0, 2 * np.pi)
    turn = np.deg2rad(rng.uniform(-config.rotation, config.rotation)) * (turns and not still)
    scale = config.scaling ** (rng.uniform(-1, 1) * (scales and not still))
    time = _progress(rng, config)
    return scale**time, first + turn * time


def _progress(rng: np.random.Generator, config: SceneConfig) -> Float[np.ndarray, " t"]:
    """How much of a motion is done in each frame: from 0 to 1, always forward, with its own pace.

    The speed 1 + a (1 - 2 s) at time s in [0, 1], with |a| <= `speed_change`, integrated.
    """
    time = np.linspace(0, 1, config.frames)
    return time + rng.uniform(-config.speed_change, config.speed_change) * time * (1 - time)


def _ground(rng: np.random.Generator, sprites: Sequence[Sprite]) -> tuple[str, str]:
    """A colour that no sprite has, as far as there are enough, and a pattern."""
    taken = {sprite.colour for sprite in sprites}
    free = [colour for colour in scene_textures.COLOURS if colour not in taken]
    colour = str(rng.choice(free or list(scene_textures.COLOURS)))
    return colour, str(rng.choice(list(scene_textures.PATTERNS)))


# Transforms are float64 [.. 2 3]: a point p goes to M p + v, with M, v = [..., :2], [..., 2].


def similarity(
    scale: float | Float[np.ndarray, "*n"],
    angle: float | Float[np.ndarray, "*n"],
    shift: Float[np.ndarray, "*n 2"],
) -> Float[np.ndarray, "*n 2 3"]:
    """Turns by `angle` (radians, from x towards y), scales, then shifts (pixels)."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    rows = np.stack([cos, -sin, sin, cos], axis=-1).reshape(*np.shape(cos), 2, 2)
    return np.concatenate([rows, np.asarray(shift, np.float64)[..., None]], axis=-1)


def apply(
    transform: Float[np.ndarray, "*n 2 3"], points: Float[np.ndarray, "*n 2"]
) -> Float[np.ndarray, "*n 2"]:
    """The points, transformed."""
    return (transform[..., :2] @ points[..., None])[..., 0] + transform[..., 2]


def compose(
    outer: Float[np.ndarray, "*n 2 3"], inner: Float[np.ndarray, "*n 2 3"]
) -> Float[np.ndarray, "*n 2 3"]:
    """The transform that does `inner`, then `outer`."""
    product = outer[..., :2] @ inner
    product[..., 2] += outer[..., 2]
    return product


def invert(transform: Float[np.ndarray, "*n 2 3"]) -> Float[np.ndarray, "*n 2 3"]:
    """The transforms that undo these."""
    inverse = np.linalg.inv(transform[..., :2])
    return np.concatenate([inverse, -(inverse @ transform[..., 2:])], axis=-1)
