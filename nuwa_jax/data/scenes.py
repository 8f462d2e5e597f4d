"""Procedural scenes: textured sprites over a textured ground, with everything known exactly.

A scene needs no download and tells the truth about itself: where points are in every frame and
whether they are seen, the flow of every pixel, which object covers it, and what it shows in words.

Every surface is flat and moves by a similarity (shift, turn, scale) from frame to frame. Tracks,
states and flow are computed from these transforms and the outlines alone, never from pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

from nuwa_jax.data import scene_textures
from nuwa_jax.motion.tracks import Tracks, TrackState, inside

# Scenes with this seed or a greater one are kept for evaluation: training never draws them.
HELD_OUT_SEED = 1 << 31

# Captions keep to the length that small models read, by leaving out what matters least.
CAPTION_BYTES = 64

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
class Scene:
    """A clip and the truth about it.

    Attributes:
      video: uint8 [t h w 3].
      tracks: exact positions and states. First the middle of every sprite, in the order of their
        ids, then further points of the sprites, then points of the background.
      track_object: int32 [k], the object that each track belongs to: 0 is the background, sprites
        count from 1, and those with greater ids hide those with smaller ones.
      flow: float32 [t h w 2]: `flow[0]` is 0, `flow[i]` is the displacement from frame i-1 to i of
        the surface that is seen at this pixel in frame i-1.
      objects: uint8 [t h w], the object seen at the centre of each pixel.
      caption: what is seen, in plain words.
      fps: frames per second.
      seed: of which all of this is a function, given the config.
    """

    video: UInt8[np.ndarray, "t h w 3"]
    tracks: Tracks
    track_object: Int32[np.ndarray, " k"]
    flow: Float[np.ndarray, "t h w 2"]
    objects: UInt8[np.ndarray, "t h w"]
    caption: str
    fps: float
    seed: int


def render_scene(seed: int, config: SceneConfig) -> Scene:
    """The scene of this seed: a pure function of its arguments.

    Raises:
      ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"a scene's seed is at least 0, got {seed}")
    rng = np.random.Generator(np.random.PCG64(seed))
    camera, camera_words = _draw_camera(rng, config)
    sprites = _draw_sprites(rng, config, camera)
    ground_colour, ground_pattern = _draw_ground(rng, sprites)

    # One transform [t 2 3] per object: from its own coordinates to pixels.
    transforms = np.stack([camera] + [sprite.transform for sprite in sprites])
    inverses = _invert(transforms)
    objects = _cover(sprites, transforms, inverses, config)
    tracks, track_object = _track(rng, sprites, transforms, inverses, config)

    # Texture randomness has a stream of its own, so that size changes detail but not layout.
    textures = np.random.Generator(np.random.PCG64([seed, 1]))
    video = _draw_background(
        textures, ground_colour, ground_pattern, transforms[0], inverses[0], config
    )
    for sprite, inverse in zip(sprites, inverses[1:], strict=True):
        _draw_sprite(textures, video, sprite, inverse, config)
    return Scene(
        video=video,
        tracks=tracks,
        track_object=track_object,
        flow=_flow(objects, transforms, inverses),
        objects=objects,
        caption=_caption(sprites, ground_colour, ground_pattern, camera_words),
        fps=config.fps,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class _Sprite:
    shape: str
    phases: Float[np.ndarray, " 3"]
    colour: str
    pattern: str
    radius: float  # pixels per unit coordinate in frame 0
    transform: Float[np.ndarray, "t 2 3"]  # unit coordinates -> pixels

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


def _draw_camera(
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
    return _similarity(zoom, np.zeros_like(time), shift), words


def _draw_sprites(
    rng: np.random.Generator, config: SceneConfig, camera: Float[np.ndarray, "t 2 3"]
) -> list[_Sprite]:
    count = int(rng.integers(config.min_sprites, config.max_sprites + 1))
    side = min(config.height, config.width)
    colours = rng.permutation(list(scene_textures.COLOURS))
    radii = rng.uniform(*config.diameter, size=count) * side / 2
    still = rng.random(count) < config.still_probability
    if count:
        still[rng.integers(count)] = False
    sprites: list[_Sprite] = []
    starts = np.empty((0, 2))
    for index in range(count):
        path = _draw_path(rng, config, radii[: index + 1], starts, still[index])
        starts = np.concatenate([starts, path[:1]])
        scale, angle = _draw_turn(rng, config, still[index])
        own = _similarity(radii[index] * scale, angle, path)
        sprites.append(
            _Sprite(
                shape=str(rng.choice(scene_textures.SHAPES)),
                phases=rng.uniform(0, 2 * np.pi, 3),
                colour=str(colours[index % len(colours)]),
                pattern=str(rng.choice(list(scene_textures.PATTERNS))),
                radius=float(radii[index]),
                transform=_compose(camera, own),
            )
        )
    return sprites


def _draw_path(
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


def _draw_turn(
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


def _draw_ground(rng: np.random.Generator, sprites: Sequence[_Sprite]) -> tuple[str, str]:
    """A colour that no sprite has, as far as there are enough, and a pattern."""
    taken = {sprite.colour for sprite in sprites}
    free = [colour for colour in scene_textures.COLOURS if colour not in taken]
    colour = str(rng.choice(free or list(scene_textures.COLOURS)))
    return colour, str(rng.choice(list(scene_textures.PATTERNS)))


def _cover(
    sprites: Sequence[_Sprite],
    transforms: Float[np.ndarray, "o t 2 3"],
    inverses: Float[np.ndarray, "o t 2 3"],
    config: SceneConfig,
) -> UInt8[np.ndarray, "t h w"]:
    """The object at every pixel: painter's order, decided at the centres of pixels."""
    objects = np.zeros((config.frames, config.height, config.width), np.uint8)
    for index, sprite in enumerate(sprites, 1):
        middle, radius = sprite.bounds()
        corner = np.floor(middle - radius).astype(int)
        span = np.arange(int(np.ceil(2 * radius)) + 2)
        x, y = corner[:, :1] + span, corner[:, 1:] + span  # [t s] each
        hit = sprite.contains(inverses[index][:, None, None], x[:, None, :], y[:, :, None])
        for frame in range(config.frames):
            window, part = _clip(corner[frame], len(span), config)
            objects[frame][window][hit[frame][part]] = index
    return objects


def _clip(
    corner: np.ndarray, size: int, config: SceneConfig
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a square inside the picture: in the picture's pixels and in the square's."""
    x, y = (int(value) for value in corner)
    left, top = max(x, 0), max(y, 0)
    right = max(min(x + size, config.width), left)
    bottom = max(min(y + size, config.height), top)
    window = (slice(top, bottom), slice(left, right))
    return window, (slice(top - y, bottom - y), slice(left - x, right - x))


def _track(
    rng: np.random.Generator,
    sprites: Sequence[_Sprite],
    transforms: Float[np.ndarray, "o t 2 3"],
    inverses: Float[np.ndarray, "o t 2 3"],
    config: SceneConfig,
) -> tuple[Tracks, Int32[np.ndarray, " k"]]:
    on_sprites = [_points_on(rng, sprite, config.points_per_sprite) for sprite in sprites]
    ids = range(1, len(sprites) + 1)
    local = [points[:1] for points in on_sprites] + [points[1:] for points in on_sprites]
    local.append(_background_points(rng, config))
    owner = np.repeat([*ids, *ids, 0], [len(points) for points in local]).astype(np.int32)
    points = _apply(transforms[owner], np.concatenate(local)[:, None])  # [k t 2]

    x, y = points[..., 0], points[..., 1]
    hidden = np.zeros(x.shape, bool)
    for index, sprite in enumerate(sprites, 1):
        below = owner < index
        hidden[below] |= sprite.contains(inverses[index], x[below], y[below])
    state = np.where(hidden, TrackState.OCCLUDED, TrackState.VISIBLE)
    # Float32 as stored, so that the state and the stored position agree at the very border.
    stored = points.astype(np.float32)
    state = np.where(inside(stored, config.height, config.width), state, TrackState.OUTSIDE)
    return Tracks(stored, state), owner


def _points_on(
    rng: np.random.Generator, sprite: _Sprite, count: int
) -> Float[np.ndarray, "count 2"]:
    """Points of a sprite in unit coordinates, the one deepest inside first."""
    axis = np.linspace(-1, 1, 21)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    drawn = rng.uniform(-1, 1, (32 * count, 2))
    candidates = np.concatenate([grid, drawn])
    depth = scene_textures.depth_inside(sprite.shape, *candidates.T, sprite.phases)
    # Where many points are equally deep, as in a bar, the one nearest to the middle.
    centre = int((depth[: len(grid)] - 1e-3 * np.linalg.norm(grid, axis=-1)).argmax())
    # Two pixels inside, so that a point's neighbourhood moves with it; else as deep as can be.
    rank = np.argsort(-np.minimum(depth[len(grid) :], 2.0 / sprite.radius), kind="stable")
    return np.concatenate([grid[centre][None], drawn[rank[: count - 1]]])


def _background_points(rng: np.random.Generator, config: SceneConfig) -> Float[np.ndarray, "n 2"]:
    """A jittered grid over frame 0."""
    if not config.background_points:
        return np.zeros((0, 2))
    columns = max(1, round(np.sqrt(config.background_points * config.width / config.height)))
    rows = -(-config.background_points // columns)
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    cells = np.stack([x.ravel(), y.ravel()], axis=-1) + rng.uniform(0.1, 0.9, (x.size, 2))
    return cells * np.array([config.width / columns, config.height / rows]) - 0.5


def _flow(
    objects: UInt8[np.ndarray, "t h w"],
    transforms: Float[np.ndarray, "o t 2 3"],
    inverses: Float[np.ndarray, "o t 2 3"],
) -> Float[np.ndarray, "t h w 2"]:
    frames, height, width = objects.shape
    flow = np.zeros((frames, height, width, 2), np.float32)
    if frames == 1:
        return flow
    # From a pixel to its surface in frame i-1, and to the picture in frame i; less the pixel.
    step = _compose(transforms[:, 1:], inverses[:, :-1])
    step[..., [0, 1], [0, 1]] -= 1
    step = step.astype(np.float32)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    for frame in range(1, frames):
        seen = objects[frame - 1]
        for axis in range(2):
            a, b, c = step[:, frame - 1, axis].T
            flow[frame, ..., axis] = a[seen] * x + b[seen] * y + c[seen]
    return flow


def _draw_background(
    rng: np.random.Generator,
    colour: str,
    pattern: str,
    transform: Float[np.ndarray, "t 2 3"],
    inverse: Float[np.ndarray, "t 2 3"],
    config: SceneConfig,
) -> UInt8[np.ndarray, "t h w 3"]:
    # All that the camera ever sees, and a pixel more for interpolation.
    right, bottom = config.width - 0.5, config.height - 0.5
    corners = np.array([[-0.5, -0.5], [right, -0.5], [-0.5, bottom], [right, bottom]])
    seen = _apply(inverse[:, None], corners)
    low, high = seen.min(axis=(0, 1)) - 1, seen.max(axis=(0, 1)) + 1
    density = config.supersample
    width, height = np.ceil((high - low) * density).astype(int)
    side = min(config.height, config.width)
    cell = rng.uniform(0.16, 0.3) * side * density
    grain = max(0.055 * side, 2.0) * density
    texture = scene_textures.ground_texture(rng, colour, pattern, height, width, cell, grain)

    video = np.empty((config.frames, config.height, config.width, 3), np.uint8)
    to_texels = _similarity(density, 0.0, (0 - low) * density - 0.5)
    for frame in range(config.frames):
        matrix = _compose(to_texels, inverse[frame])
        video[frame] = _warp(
            texture, matrix, (0, 0), config.height, config.width, density, cv2.BORDER_REPLICATE
        )
    return video


def _draw_sprite(
    rng: np.random.Generator,
    video: UInt8[np.ndarray, "t h w 3"],
    sprite: _Sprite,
    inverse: Float[np.ndarray, "t 2 3"],
    config: SceneConfig,
) -> None:
    """Paints a sprite over what is in `video`."""
    density = config.supersample
    reach = scene_textures.OUTLINE_RADIUS
    size = int(np.ceil(2 * reach * sprite.radius * density))
    texture = scene_textures.sprite_texture(
        rng,
        sprite.shape,
        sprite.phases,
        sprite.colour,
        sprite.pattern,
        size,
        # A period of 2/3 to 1 radius, yet never so few pixels that the pattern is lost.
        cell=max(rng.uniform(0.65, 1.0) * sprite.radius, 5.0) * density,
        grain=max(0.25 * sprite.radius, 2.0) * density,
    )
    to_texels = _similarity(size / (2 * reach), 0.0, np.full(2, size / 2 - 0.5))
    middle, radius = sprite.bounds()
    corner = np.floor(middle - radius).astype(int) - 1
    span = int(np.ceil(2 * radius)) + 4
    for frame in range(config.frames):
        window, _ = _clip(corner[frame], span, config)
        rows, columns = window
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height == 0 or width == 0:
            continue
        matrix = _compose(to_texels, inverse[frame])
        origin = (columns.start, rows.start)
        paint = _warp(texture, matrix, origin, height, width, density, cv2.BORDER_CONSTANT)
        under = video[frame][window]
        uncovered = (255 - paint[..., 3:]).astype(np.uint16)
        under[:] = cv2.add(
            np.ascontiguousarray(paint[..., :3]),
            ((under * uncovered + 127) // 255).astype(np.uint8),
        )


def _warp(
    texture: UInt8[np.ndarray, "p q c"],
    to_texels: Float[np.ndarray, "2 3"],
    origin: tuple[int, int],
    height: int,
    width: int,
    density: int,
    border: int,
) -> UInt8[np.ndarray, "h w c"]:
    """The window of the picture at `origin` (x, y), sampled `density` times and averaged."""
    # Sample j of a picture drawn n times larger is at pixel (j + 0.5) / n - 0.5.
    first = np.array(origin) + 0.5 / density - 0.5
    matrix = _compose(to_texels, _similarity(1 / density, 0.0, first))
    fine = cv2.warpAffine(
        texture,
        matrix,
        (width * density, height * density),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=border,
    )
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def _caption(
    sprites: Sequence[_Sprite], colour: str, pattern: str, camera_words: Sequence[str]
) -> str:
    """All there is to say, or as much of it as fits: every sprite, its colour and its shape."""
    long = ", ".join(f"{each.colour} {each.pattern} {each.shape}" for each in sprites)
    short = ", ".join(f"{each.colour} {each.shape}" for each in sprites)
    camera = "".join(f", {words}" for words in camera_words)
    ground = f"{colour} {scene_textures.PATTERNS[pattern]}"
    if not sprites:
        return ground + camera
    captions = (
        f"{long} on {ground}{camera}",
        f"{long} on {colour}{camera}",
        f"{short} on {ground}{camera}",
        f"{short} on {colour}{camera}",
    )
    return next((each for each in captions if len(each) <= CAPTION_BYTES), captions[-1])


# Transforms are float64 [.. 2 3]: a point p goes to M p + v, with M, v = [..., :2], [..., 2].


def _similarity(
    scale: float | np.ndarray, angle: float | np.ndarray, shift: np.ndarray
) -> Float[np.ndarray, "*n 2 3"]:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    rows = np.stack([cos, -sin, sin, cos], axis=-1).reshape(*np.shape(cos), 2, 2)
    return np.concatenate([rows, np.asarray(shift, np.float64)[..., None]], axis=-1)


def _apply(
    transform: Float[np.ndarray, "*n 2 3"], points: Float[np.ndarray, "*n 2"]
) -> Float[np.ndarray, "*n 2"]:
    return (transform[..., :2] @ points[..., None])[..., 0] + transform[..., 2]


def _compose(
    outer: Float[np.ndarray, "*n 2 3"], inner: Float[np.ndarray, "*n 2 3"]
) -> Float[np.ndarray, "*n 2 3"]:
    """The transform that does `inner`, then `outer`."""
    product = outer[..., :2] @ inner
    product[..., 2] += outer[..., 2]
    return product


def _invert(transform: Float[np.ndarray, "*n 2 3"]) -> Float[np.ndarray, "*n 2 3"]:
    inverse = np.linalg.inv(transform[..., :2])
    return np.concatenate([inverse, -(inverse @ transform[..., 2:])], axis=-1)
