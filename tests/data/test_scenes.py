"""Scenes: what a scene says of itself is what its pictures show."""

import concurrent.futures
import dataclasses
import functools

import cv2
import numpy as np
import pytest
from scipy import ndimage

from nuwa_jax.data import scene_textures
from nuwa_jax.data.scenes import HELD_OUT_SEED, SceneConfig, render_scene
from nuwa_jax.motion.tracks import TrackState, inside

# Height, width, frames.
SIZES = ((64, 64, 8), (48, 80, 5), (33, 57, 3), (96, 40, 1))

# Much of everything, so that few seeds show it all.
BUSY = SceneConfig(
    min_sprites=3,
    max_sprites=5,
    exit_probability=0.5,
    rotation_probability=1.0,
    scaling_probability=1.0,
    pan_probability=0.7,
    zoom_probability=0.7,
)


@functools.cache
def scene_of(seed, config=BUSY):
    return render_scene(seed, config)


def sized(config, size):
    return dataclasses.replace(config, height=size[0], width=size[1], frames=size[2])


def interior(mask, margin):
    """Pixels whose neighbourhood belongs to the same object, the picture's border excluded."""
    return ndimage.binary_erosion(mask, iterations=margin, structure=np.ones((3, 3)))


def sample(picture, x, y):
    """Bilinear values of a picture [h w c] at points of any shape; 0 beyond its border."""
    channels = np.moveaxis(picture.astype(float), -1, 0)
    sampled = [ndimage.map_coordinates(channel, (y, x), order=1) for channel in channels]
    return np.stack(sampled, axis=-1)


def lies_within(mask, x, y):
    """Whether all four pixels around each point are in the mask."""
    return sample(mask[..., None], x, y)[..., 0] > 1 - 1e-6


def arrays(scene):
    return (
        scene.video,
        scene.tracks.points,
        scene.tracks.state,
        scene.track_object,
        scene.flow,
        scene.objects,
    )


@pytest.mark.parametrize("size", [*SIZES, (320, 576, 14)])
def test_every_part_has_the_shape_and_type_it_promises(size):
    height, width, frames = size
    config = sized(SceneConfig(min_sprites=2, max_sprites=2, background_points=9), size)
    scene = render_scene(5, config)
    count = scene.tracks.num_tracks
    assert scene.video.shape == (frames, height, width, 3) and scene.video.dtype == np.uint8
    assert scene.flow.shape == (frames, height, width, 2) and scene.flow.dtype == np.float32
    assert scene.objects.shape == (frames, height, width) and scene.objects.dtype == np.uint8
    assert scene.tracks.points.shape == (count, frames, 2)
    assert scene.track_object.shape == (count,) and scene.track_object.dtype == np.int32
    assert scene.track_object[:2].tolist() == [1, 2]
    assert (scene.track_object == 0).sum() >= 9
    assert ((scene.track_object == 1).sum(), (scene.track_object == 2).sum()) == (6, 6)
    assert not scene.flow[0].any()
    assert (scene.fps, scene.seed) == (config.fps, 5)


@pytest.mark.parametrize("size", SIZES[:3])
def test_pictures_move_as_the_flow_says(size):
    errors, still_errors, compared = [], [], set()
    for seed in range(12):
        scene = scene_of(seed, sized(BUSY, size))
        frames, height, width = scene.objects.shape
        y, x = np.mgrid[:height, :width].astype(np.float32)
        for i in range(1, frames):
            to_x, to_y = x + scene.flow[i, ..., 0], y + scene.flow[i, ..., 1]
            moved = sample(scene.video[i], to_x, to_y)
            difference = np.abs(moved - scene.video[i - 1]).mean(axis=-1)
            unmoved = np.abs(scene.video[i].astype(float) - scene.video[i - 1]).mean(axis=-1)
            for index in np.unique(scene.objects[i - 1]):
                seen = interior(scene.objects[i - 1] == index, 2)
                seen &= lies_within(interior(scene.objects[i] == index, 2), to_x, to_y)
                seen &= np.hypot(*np.moveaxis(scene.flow[i], -1, 0)) > 0.5
                errors.append(difference[seen])
                still_errors.append(unmoved[seen])
                if seen.any():
                    compared.add(bool(index))
    assert compared == {False, True}  # the background as well as sprites
    error, still = np.concatenate(errors), np.concatenate(still_errors)
    assert error.mean() < 4.5 and np.quantile(error, 0.99) < 20
    assert error.mean() < 0.25 * still.mean()


def test_sprites_are_painted_where_they_are_said_to_be():
    config = SceneConfig(max_sprites=1, pan_probability=0, zoom_probability=0, frames=2)
    config = dataclasses.replace(config, diameter=(0.25, 0.35), displacement=(0.45, 0.5))
    offsets = []
    for seed in range(30):
        scene = scene_of(seed, config)
        said = scene.objects[0] == 1
        around = ndimage.binary_dilation(said, iterations=3)
        border = np.ones_like(said)
        border[1:-1, 1:-1] = False
        if (around & (border | (scene.objects[1] == 1))).any():
            continue  # cut off, or the ground behind it is not seen in the other frame
        change = np.abs(scene.video[0].astype(float) - scene.video[1]).max(axis=-1)
        painted = (change > 16) & around
        offsets.append(np.subtract(*(np.argwhere(m).mean(axis=0) for m in (painted, said))))
    assert len(offsets) >= 10
    np.testing.assert_allclose(np.mean(offsets, axis=0), 0, atol=0.12)


@pytest.mark.parametrize("size", SIZES[:3])
def test_flow_carries_visible_points_along_their_tracks(size):
    steps = 0
    for seed in range(12):
        scene = scene_of(seed, sized(BUSY, size))
        for i in range(1, scene.tracks.num_frames):
            for index in np.unique(scene.track_object):
                here, there = (
                    scene.tracks.points[scene.track_object == index, frame] for frame in (i - 1, i)
                )
                # Flow is linear within an object: interpolating between its pixels is exact.
                known = lies_within(scene.objects[i - 1] == index, *here.T)
                flow = sample(scene.flow[i], *here[known].T)
                np.testing.assert_allclose(here[known] + flow, there[known], atol=1e-3)
                steps += int(known.sum())
    assert steps > 500


@pytest.mark.parametrize("size", SIZES[:3])
def test_states_agree_with_the_object_that_is_seen(size):
    counts = dict.fromkeys(TrackState, 0)
    for seed in range(16):
        scene = scene_of(seed, sized(BUSY, size))
        frames, height, width = scene.objects.shape
        for i in range(frames):
            points, state = scene.tracks.points[:, i], scene.tracks.state[:, i]
            is_inside = inside(points, height, width)
            np.testing.assert_array_equal(state == TrackState.OUTSIDE, ~is_inside)
            column, row = np.clip(np.rint(points), 0, [width - 1, height - 1]).astype(int).T
            seen = scene.objects[i, row, column]
            # Away from outlines, the pixel under the point speaks for the point.
            same = np.ones(len(points), bool)
            for step in np.ndindex(3, 3):
                r, c = np.clip(row + step[0] - 1, 0, height - 1), column + step[1] - 1
                same &= scene.objects[i, r, np.clip(c, 0, width - 1)] == seen
            clear = is_inside & same
            visible = seen == scene.track_object
            np.testing.assert_array_equal(state[clear] == TrackState.VISIBLE, visible[clear])
            # Only a sprite further up hides anything.
            assert (seen[clear & ~visible] > scene.track_object[clear & ~visible]).all()
            for value in state:
                counts[TrackState(value)] += 1
    assert counts[TrackState.UNSPECIFIED] == 0
    expected = {TrackState.VISIBLE, TrackState.OCCLUDED, TrackState.OUTSIDE}
    assert {value for value, count in counts.items() if count >= 10} == expected


def test_the_first_tracks_are_the_middles_of_the_sprites():
    config = SceneConfig(min_sprites=1, max_sprites=1, still_probability=0, pan_probability=0)
    for seed in range(20):
        scene = scene_of(seed, config)
        of_sprite = scene.track_object == 1
        spread = scene.tracks.points[of_sprite, 0] - scene.tracks.points[0, 0]
        assert np.linalg.norm(spread, axis=-1).max() <= 0.45 * 64
        row, column = np.nonzero(scene.objects[0] == 1)
        if min(row.min(), column.min()) > 0 and max(row.max(), column.max()) < 63:
            offset = scene.tracks.points[0, 0] - (column.mean(), row.mean())
            # A ring has no surface in its middle; nothing is further from its own than that.
            assert np.linalg.norm(offset) <= 0.8 * 0.45 * 64 / 2


@pytest.mark.parametrize("size", SIZES)
def test_same_seed_gives_the_same_scene_also_from_threads(size):
    config = sized(SceneConfig(), size)
    np.random.seed(1)
    first = [render_scene(seed, config) for seed in range(6)]
    np.random.seed(2)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda seed: render_scene(seed, config), reversed(range(6))))
    for one, other in zip(first, reversed(again), strict=True):
        assert one.caption == other.caption
        for a, b in zip(arrays(one), arrays(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_different_seeds_give_different_scenes():
    seeds = [*range(20), *range(HELD_OUT_SEED, HELD_OUT_SEED + 20), 1 << 40]
    config = SceneConfig(frames=2)
    videos = {render_scene(seed, config).video.tobytes() for seed in seeds}
    assert len(videos) == len(seeds)


def test_size_changes_the_detail_of_a_scene_and_not_its_layout():
    small = render_scene(3, SceneConfig(min_sprites=2))
    large = render_scene(3, SceneConfig(min_sprites=2, height=128, width=128))
    assert small.caption == large.caption
    resized = small.tracks.resize((64, 64), (128, 128))
    np.testing.assert_allclose(resized.points[:2], large.tracks.points[:2], atol=0.01)


def test_sprites_move_as_far_as_asked_and_mostly_stay_in_the_picture():
    config = SceneConfig(displacement=(0.3, 0.4), still_probability=0, pan_probability=0)
    config = dataclasses.replace(config, zoom_probability=0, rotation_probability=0)
    seen = []
    for seed in range(60):
        scene = scene_of(seed, config)
        # Centres of rings and moons lie off the middle, and move with the scale of their sprite.
        sprites = scene.track_object.max()
        middle = scene.tracks.points[:sprites]
        moved = np.linalg.norm(middle[:, -1] - middle[:, 0], axis=-1) / 64
        assert (moved > 0.3 - 0.07).all() and (moved < 0.4 + 0.07).all()
        assert (np.linalg.norm(np.diff(middle, axis=1), axis=-1) > 0).all()
        seen += scene.tracks.visible[:sprites, [0, -1]].tolist()
    start, end = np.mean(seen, axis=0)
    assert start > 0.9 and end > 0.7


def test_still_sprites_and_a_still_camera_are_exactly_still():
    config = SceneConfig(
        min_sprites=2, still_probability=1.0, pan_probability=0.0, zoom_probability=0.0
    )
    for seed in range(8):
        scene = scene_of(seed, config)
        step = np.abs(np.diff(scene.tracks.points, axis=1)).max(axis=(1, 2))
        moving = np.unique(scene.track_object[step > 1e-4])
        assert len(moving) == 1 and moving[0] > 0  # one sprite moves all the same
        assert np.abs(scene.flow[1:][scene.objects[:-1] != moving[0]]).max() < 1e-4
        untouched = (scene.objects == 0).all(axis=0)
        untouched = interior(untouched, 2)
        assert untouched.any()
        assert (scene.video[:, untouched] == scene.video[:1, untouched]).all()


def test_a_pan_moves_what_is_seen_the_other_way():
    config = SceneConfig(max_sprites=1, pan_probability=1.0, zoom_probability=0.0, pan=(0.1, 0.15))
    names = set()
    for seed in range(16):
        scene = scene_of(seed, config)
        background = scene.tracks.points[scene.track_object == 0]
        x, y = (background[:, -1] - background[:, 0]).mean(axis=0)
        sideways = "left" if x > 0 else "right"
        name = sideways if abs(x) > abs(y) else ("up" if y > 0 else "down")
        assert scene.caption.endswith(f"pan {name}")
        names.add(name)
    assert names == {"left", "right", "up", "down"}


def test_a_zoom_in_moves_what_is_seen_outwards():
    config = SceneConfig(max_sprites=1, pan_probability=0.0, zoom_probability=1.0)
    names = set()
    for seed in range(8):
        scene = scene_of(seed, config)
        background = scene.tracks.points[scene.track_object == 0] - 31.5
        radius = np.linalg.norm(background, axis=-1)
        name = "in" if (radius[:, -1] > radius[:, 0]).all() else "out"
        assert scene.caption.endswith(f"zoom {name}")
        names.add(name)
    assert names == {"in", "out"}


def test_captions_name_every_sprite_and_mostly_fit():
    lengths = []
    for seed in range(100):
        scene = scene_of(seed, SceneConfig(frames=1))
        subjects, ground = scene.caption.split(" on ")
        phrases = subjects.split(", ")
        assert len(phrases) == scene.track_object.max()
        for phrase in phrases:
            colour, *pattern, shape = phrase.split(" ")
            assert colour in scene_textures.COLOURS and shape in scene_textures.SHAPES
            assert not pattern or pattern[0] in scene_textures.PATTERNS
        assert ground.split(",")[0].split(" ")[0] in scene_textures.COLOURS
        if len(phrases) == 1:  # all there is to say fits
            assert len(phrases[0].split(" ")) == 3
        lengths.append(len(scene.caption.encode()))
    assert np.mean(np.array(lengths) <= 64) > 0.95


def test_a_sprite_has_the_colour_that_its_caption_names():
    config = SceneConfig(frames=1, max_sprites=1)
    for seed in range(40):
        scene = scene_of(seed, config)
        pixels = scene.video[0][interior(scene.objects[0] == 1, 1)].astype(float)
        named = np.array(scene_textures.COLOURS[scene.caption.split(" ")[0]], float)
        if len(pixels) < 20 or np.ptp(named) == 0:
            continue
        # Patterns vary the brightness of a colour and leave its direction from grey.
        hue, wanted = (value - value.mean() for value in (pixels.mean(axis=0), named))
        assert hue @ wanted > 0.97 * np.linalg.norm(hue) * np.linalg.norm(wanted)


def test_textures_can_be_followed():
    # The smaller eigenvalue of the gradients about a pixel: 0 where contrast has one direction,
    # as on a bare stripe, along which Lucas-Kanade could slide.
    for seed in range(12):
        scene = scene_of(seed, SceneConfig(min_sprites=2, frames=1))
        grey = cv2.cvtColor(scene.video[0], cv2.COLOR_RGB2GRAY).astype(np.float32)
        strength = cv2.cornerMinEigenVal(grey, blockSize=7, ksize=3)
        for index in range(scene.track_object.max() + 1):
            part = interior(scene.objects[0] == index, 1)
            if part.sum() >= 30:
                assert np.median(strength[part]) > 10


def test_no_sprites_leaves_the_background():
    scene = render_scene(0, SceneConfig(min_sprites=0, max_sprites=0, background_points=4))
    assert not scene.objects.any() and not scene.track_object.any()
    assert scene.video.std() > 5


@pytest.mark.parametrize(
    "change",
    [
        {"frames": 0},
        {"min_sprites": 3, "max_sprites": 2},
        {"max_sprites": 300},
        {"diameter": (0.0, 0.4)},
        {"displacement": (0.5, 0.1)},
        {"zoom": (0.9, 1.1)},
        {"speed_change": 1.0},
        {"scaling": 0.5},
        {"pan_probability": 1.5},
        {"fps": 0.0},
    ],
)
def test_impossible_configs_are_refused_by_name(change):
    name = list(change)[-1]
    with pytest.raises(ValueError, match=name):
        SceneConfig(**change)


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="-1"):
        render_scene(-1, SceneConfig())
