import tracemalloc

import cv2
import numpy as np
import pytest

from nuwa_jax.data.filters import (
    MAX_DISTANCE,
    colour_overlap,
    find_duplicates,
    is_still,
    perceptual_hash,
    text_share,
    thumbnails,
)
from nuwa_jax.data.scenes import SceneConfig, render_scene
from nuwa_jax.data.video import encode_video, read_video, resize_video

# Above it, prepare rejects a clip: the default of ClipOptions.
MAX_TEXT = 0.03


@pytest.fixture(scope="module")
def scenes():
    config = SceneConfig(height=144, width=192, frames=9, supersample=1)
    return [render_scene(seed, config).video for seed in range(6)]


def distance(a, b):
    return int(np.unpackbits(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


def with_text(video, text, place, scale, thickness):
    video = video.copy()
    for frame in video:
        for colour, width in (((0, 0, 0), thickness + 2), ((255, 255, 255), thickness)):
            cv2.putText(frame, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, width)
    return video


@pytest.mark.parametrize("width", [192, 301])
def test_burned_in_text_covers_more_than_what_pictures_hold(scenes, width):
    for video in scenes:
        video, _ = resize_video(video, 144, width)
        assert text_share(video) < MAX_TEXT
        assert text_share(with_text(video, "and then he said", (6, 130), 0.5, 1)) > MAX_TEXT
        assert text_share(with_text(video, "BREAKING NEWS", (6, 80), 0.6, 1)) > MAX_TEXT


def test_text_that_moves_with_a_thing_is_no_overlay(scenes):
    video = scenes[0].copy()
    for index, frame in enumerate(video):
        place = (6 + 4 * index, 130 - 6 * index)
        cv2.putText(frame, "and then he said", place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3, 1)
    assert text_share(video) < MAX_TEXT


def test_still_and_moving_clips(scenes):
    rng = np.random.default_rng(0)
    frozen = np.repeat(scenes[0][:1], 9, axis=0).astype(int)
    frozen = (frozen + rng.integers(-3, 4, frozen.shape)).clip(0, 255).astype(np.uint8)
    assert is_still(thumbnails(frozen))
    assert not any(is_still(thumbnails(video)) for video in scenes)


def test_colours_change_at_a_cut(scenes):
    joined = np.concatenate([scenes[0][:4], 255 - scenes[1][:4]])
    overlap = colour_overlap(thumbnails(joined))
    assert overlap[0] == 1 and overlap.argmin() == 4
    assert overlap[4] < 0.6 < np.delete(overlap, 4).min()


def test_hash_survives_encoding_and_tells_clips_apart(scenes):
    hashes = [perceptual_hash(thumbnails(video)) for video in scenes]
    for video, own in zip(scenes, hashes, strict=True):
        small, _ = resize_video(video, 108, 144)
        again, _ = read_video(encode_video(small, 8, crf=30))
        assert distance(perceptual_hash(thumbnails(again)), own) <= MAX_DISTANCE
    apart = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 2 * MAX_DISTANCE
    # One camera, another event: the first halves agree, the second do not.
    reverse = perceptual_hash(thumbnails(scenes[0][::-1]))
    assert distance(reverse[:8], hashes[0][:8]) == 0
    assert distance(reverse[8:], hashes[0][8:]) > 32


def flipped(hash, bits, rng):
    """The hash with so many of its bits changed."""
    changed = np.unpackbits(hash)
    changed[rng.choice(128, bits, replace=False)] ^= 1
    return np.packbits(changed)


def compared_with_all(hashes, most):
    """What `find_duplicates` is by its definition."""
    kept, dropped = [], {}
    for index, own in enumerate(hashes):
        bits = np.bitwise_count(hashes[kept] ^ own).sum(axis=1) if kept else np.zeros(0)
        near = np.flatnonzero(bits <= most)
        if len(near):
            dropped[index] = (kept[near[0]], int(bits[near[0]]))
        else:
            kept.append(index)
    return dropped


def test_duplicates_are_those_that_comparing_all_pairs_finds():
    rng = np.random.default_rng(1)
    hashes = list(rng.integers(0, 256, (300, 16), np.uint8))
    for _ in range(300):  # near copies, also of copies, and exact ones
        hashes.append(flipped(hashes[rng.integers(len(hashes))], rng.integers(0, 14), rng))
    hashes = np.stack(hashes)
    for most in (0, 3, MAX_DISTANCE):
        assert find_duplicates(hashes, most) == compared_with_all(hashes, most)
    assert find_duplicates(hashes[:0], 3) == {}
    assert find_duplicates(hashes[:1], 3) == {}
    with pytest.raises(ValueError, match="max_distance"):
        find_duplicates(hashes, MAX_DISTANCE + 1)


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_among_many_copies_of_a_few_clips(seed):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 256, (5, 16), np.uint8)
    # Some are near to all others of their crowd, some to a few of them, some to none.
    sizes, spreads = (300, 200, 34, 33, 2), (3, 9, 5, 6, 1)
    hashes = [
        flipped(centre, rng.integers(0, spread + 1), rng)
        for centre, size, spread in zip(centres, sizes, spreads, strict=True)
        for _ in range(size)
    ]
    hashes = rng.permutation(np.concatenate([hashes, rng.integers(0, 256, (60, 16), np.uint8)]))
    for most in (0, 2, 6, MAX_DISTANCE):
        assert find_duplicates(hashes, most) == compared_with_all(hashes, most)


def test_memory_for_duplicates_does_not_grow_with_the_square_of_the_copies():
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 256, 16, np.uint8)
    hashes = np.stack([flipped(centre, 3, rng) for _ in range(1000)])
    tracemalloc.start()
    try:
        dropped = find_duplicates(hashes, 6)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dropped) == 999 and {kept for kept, _ in dropped.values()} == {0}
    assert peak < 10 << 20  # the half million pairs alone would take several times that
