"""Procedural scenes: textured sprites over a textured ground, with everything known exactly.

A scene needs no download and tells the truth about itself: where points are in every frame and
whether they are seen, the flow of every pixel, which object covers it, and what it shows in words.

Every surface is flat and moves by a similarity (shift, turn, scale) from frame to frame. Tracks,
states and flow are computed from these transforms and the outlines alone, never from pixels.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Int32, UInt8

from nuwa_jax.data import scene_textures
from nuwa_jax.data.scene_layout import (
    Layout,
    SceneConfig,
    Sprite,
    apply,
    compose,
    draw_layout,
    similarity,
)
from nuwa_jax.motion.tracks import Tracks, TrackState, inside

# Scenes with this seed or a greater one are kept for evaluation: training never draws them.
HELD_OUT_SEED = 1 << 31

# Captions keep to the length that small models read, by leaving out what matters least.
CAPTION_BYTES = 64


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
    layout = draw_layout(rng, config)
    objects = _cover(layout, config)
    tracks, track_object = _track(rng, layout, config)

    # Texels are drawn from a stream of their own, so that their number changes no layout.
    texels = np.random.Generator(np.random.PCG64([seed, 1]))
    video = _paint_background(texels, layout, config)
    for index in range(1, len(layout.sprites) + 1):
        _paint_sprite(texels, video, layout, index, config)
    return Scene(
        video=video,
        tracks=tracks,
        track_object=track_object,
        flow=_flow(objects, layout),
        objects=objects,
        caption=_caption(layout),
        fps=config.fps,
        seed=seed,
    )


def true_tracks(seed: int, config: SceneConfig, points: Float[np.ndarray, "k 2"]) -> Tracks:
    """Exact tracks of any points (x, y) of frame 0 of a scene, on the surface that is seen there.

    A point on an outline belongs to the object whose outline holds it, which is what a tracker
    that was given a corner there should follow, as hard as that may be.
    """
    layout = draw_layout(np.random.Generator(np.random.PCG64(seed)), config)
    points = np.asarray(points, np.float64)
    owner = np.zeros(len(points), np.int32)
    for index, sprite in enumerate(layout.sprites, 1):
        owner[sprite.contains(layout.inverses[index, 0], *points.T)] = index
    return _follow(layout, config, apply(layout.inverses[owner, 0], points), owner)


def _cover(layout: Layout, config: SceneConfig) -> UInt8[np.ndarray, "t h w"]:
    """The object at every pixel: painter's order, decided at the centres of pixels."""
    objects = np.zeros((config.frames, config.height, config.width), np.uint8)
    for index, sprite in enumerate(layout.sprites, 1):
        middle, radius = sprite.bounds()
        corner = np.floor(middle - radius).astype(int)
        span = np.arange(int(np.ceil(2 * radius)) + 2)
        x, y = corner[:, :1] + span, corner[:, 1:] + span  # [t s] each
        hit = sprite.contains(layout.inverses[index][:, None, None], x[:, None, :], y[:, :, None])
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
    rng: np.random.Generator, layout: Layout, config: SceneConfig
) -> tuple[Tracks, Int32[np.ndarray, " k"]]:
    on_sprites = [_points_on(rng, sprite, config.points_per_sprite) for sprite in layout.sprites]
    ids = range(1, len(on_sprites) + 1)
    local = [points[:1] for points in on_sprites] + [points[1:] for points in on_sprites]
    local.append(_background_points(rng, config))
    owner = np.repeat([*ids, *ids, 0], [len(points) for points in local]).astype(np.int32)
    return _follow(layout, config, np.concatenate(local), owner), owner


def _follow(
    layout: Layout,
    config: SceneConfig,
    local: Float[np.ndarray, "k 2"],
    owner: Int32[np.ndarray, " k"],
) -> Tracks:
    """Tracks of points given in the coordinates of the objects that own them."""
    points = apply(layout.transforms[owner], local[:, None])  # [k t 2]
    x, y = points[..., 0], points[..., 1]
    hidden = np.zeros(x.shape, bool)
    for index, sprite in enumerate(layout.sprites, 1):
        below = owner < index
        hidden[below] |= sprite.contains(layout.inverses[index], x[below], y[below])
    state = np.where(hidden, TrackState.OCCLUDED, TrackState.VISIBLE)
    # Float32 as stored, so that the state and the stored position agree at the very border.
    stored = points.astype(np.float32)
    state = np.where(inside(stored, config.height, config.width), state, TrackState.OUTSIDE)
    return Tracks(stored, state)


def _points_on(
    rng: np.random.Generator, sprite: Sprite, count: int
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


def _flow(objects: UInt8[np.ndarray, "t h w"], layout: Layout) -> Float[np.ndarray, "t h w 2"]:
    frames, height, width = objects.shape
    flow = np.zeros((frames, height, width, 2), np.float32)
    if frames == 1:
        return flow
    # From a pixel to its surface in frame i-1, and to the picture in frame i; less the pixel.
    step = compose(layout.transforms[:, 1:], layout.inverses[:, :-1])
    step[..., [0, 1], [0, 1]] -= 1
    step = step.astype(np.float32)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    for frame in range(1, frames):
        seen = objects[frame - 1].astype(np.intp)  # else each look-up below would convert it
        for axis in range(2):
            a, b, c = step[:, frame - 1, axis].T
            flow[frame, ..., axis] = a[seen] * x + b[seen] * y + c[seen]
    return flow


def _paint_background(
    rng: np.random.Generator, layout: Layout, config: SceneConfig
) -> UInt8[np.ndarray, "t h w 3"]:
    # All that the camera ever sees, and a pixel more for interpolation.
    right, bottom = config.width - 0.5, config.height - 0.5
    corners = np.array([[-0.5, -0.5], [right, -0.5], [-0.5, bottom], [right, bottom]])
    seen = apply(layout.inverses[0, :, None], corners)
    low, high = seen.min(axis=(0, 1)) - 1, seen.max(axis=(0, 1)) + 1
    density = config.supersample
    width, height = np.ceil((high - low) * density).astype(int)
    side = min(config.height, config.width)
    cell = rng.uniform(0.16, 0.3) * side * density
    grain = max(0.055 * side, 2.0) * density
    texture = scene_textures.ground_texture(
        rng, layout.ground_colour, layout.ground_pattern, height, width, cell, grain
    )

    video = np.empty((config.frames, config.height, config.width, 3), np.uint8)
    to_texels = compose(similarity(density, 0.0, (0 - low) * density - 0.5), layout.inverses[0])
    for frame in range(config.frames):
        video[frame] = _warp(
            texture,
            to_texels[frame],
            np.zeros(2),
            (config.height, config.width),
            density,
            cv2.BORDER_REPLICATE,
        )
    return video


def _paint_sprite(
    rng: np.random.Generator,
    video: UInt8[np.ndarray, "t h w 3"],
    layout: Layout,
    index: int,
    config: SceneConfig,
) -> None:
    """Paints object `index` over what is in `video`."""
    sprite = layout.sprites[index - 1]
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
    to_texels = compose(
        similarity(size / (2 * reach), 0.0, np.full(2, size / 2 - 0.5)), layout.inverses[index]
    )
    middle, radius = sprite.bounds()
    corner = np.floor(middle - radius).astype(int) - 1
    span = int(np.ceil(2 * radius)) + 4
    for frame in range(config.frames):
        window, _ = _clip(corner[frame], span, config)
        under = video[frame][window]
        if under.size == 0:
            continue
        origin = np.array([window[1].start, window[0].start])
        paint = _warp(
            texture, to_texels[frame], origin, under.shape[:2], density, cv2.BORDER_CONSTANT
        )
        uncovered = (255 - paint[..., 3:]).astype(np.uint16)
        shining_through = ((under * uncovered + 127) // 255).astype(np.uint8)
        # Saturating: roundings of the two may add up to 256.
        under[:] = cv2.add(np.ascontiguousarray(paint[..., :3]), shining_through)


def _warp(
    texture: UInt8[np.ndarray, "p q c"],
    to_texels: Float[np.ndarray, "2 3"],
    origin: Float[np.ndarray, " 2"],
    size: tuple[int, int],
    density: int,
    border: int,
) -> UInt8[np.ndarray, "h w c"]:
    """The window at `origin` (x, y), of `size` (h, w), sampled `density` times and averaged."""
    height, width = size
    # Sample j of a picture drawn n times larger is at pixel (j + 0.5) / n - 0.5.
    first = origin + 0.5 / density - 0.5
    matrix = to_texels / density
    matrix[:, 2] = to_texels[:, :2] @ first + to_texels[:, 2]
    fine = cv2.warpAffine(
        texture,
        matrix,
        (width * density, height * density),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=border,
    )
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def _caption(layout: Layout) -> str:
    """All there is to say, or as much of it as fits: every sprite, its colour and its shape."""
    long = ", ".join(f"{each.colour} {each.pattern} {each.shape}" for each in layout.sprites)
    short = ", ".join(f"{each.colour} {each.shape}" for each in layout.sprites)
    camera = "".join(f", {words}" for words in layout.camera_words)
    colour = layout.ground_colour
    ground = f"{colour} {scene_textures.PATTERNS[layout.ground_pattern]}"
    if not layout.sprites:
        return ground + camera
    captions = (
        f"{long} on {ground}{camera}",
        f"{long} on {colour}{camera}",
        f"{short} on {ground}{camera}",
        f"{short} on {colour}{camera}",
    )
    return next((each for each in captions if len(each) <= CAPTION_BYTES), captions[-1])
