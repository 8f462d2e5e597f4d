"""Cheap tests of a clip, made before it is tracked, and the hash that finds near-duplicates."""

from __future__ import annotations

import array
import itertools
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int32, Integer, UInt8

# Side in pixels of the square copies on which cuts, stillness and hashes are judged.
_THUMBNAIL = 64

# Grey levels by which some pixel of the thumbnail must change in a clip that moves.
_STILL = 4.0

# Text is looked for on a copy of this shorter side: grey levels of a stroke's edge, pixels of a
# line's height, its width by its height, how much of it has edges, and strokes in a piece of it as
# wide as it is high.
_TEXT_SIDE = 256
_STROKE = 60
_LINE_HEIGHT = (6, 48)
_MIN_ASPECT = 2.5
_MIN_FILL = 0.45
_MIN_STROKES = 0.45

# A hash of 128 bits is cut into this many parts: of two hashes that differ in 8 bits or fewer, at
# least two parts are equal.
_PARTS = 10
MAX_DISTANCE = _PARTS - 2

# Hashes that share two parts: up to so many, each is compared with each.
_CROWD = 32


def thumbnails(video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t s s 3"]:
    """Square copies of the frames, averaged down."""
    size = (_THUMBNAIL, _THUMBNAIL)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in video])


def colour_overlap(small: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, " t"]:
    """How much of each frame's colour histogram it shares with the frame before, 0 .. 1.

    8 x 8 x 8 bins. The first frame's is 1. Low values are cuts.
    """
    histograms = [
        cv2.calcHist([frame], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3).ravel() for frame in small
    ]
    shares = np.stack(histograms) / (small.shape[1] * small.shape[2])
    overlap = np.minimum(shares[:-1], shares[1:]).sum(axis=1)
    return np.concatenate([[1.0], overlap])


def is_still(small: UInt8[np.ndarray, "t h w 3"]) -> bool:
    """Whether nothing changes: every pixel of the thumbnails stays within 4 grey levels."""
    change = small.max(axis=0).astype(np.int16) - small.min(axis=0)
    return bool(change.mean(axis=-1).max() < _STILL)


def text_share(video: UInt8[np.ndarray, "t h w 3"]) -> float:
    """How much lines of burned-in text cover, as a share of the square on the shorter side.

    An overlay stays where it is: only edges that the first, middle and last frame have in common
    count. What remains is joined along rows, and a region counts as a line of text if it is wide,
    filled with edges, and crossed by as many strokes as letters of its height have. No reading is
    done: fine regular patterns that stand still are taken for text; slanted, faint or very large
    text is not found.
    """
    height, width = video.shape[1:3]
    scale = _TEXT_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    square = np.ones((3, 3), np.uint8)
    edges = []
    for index in (0, len(video) // 2, len(video) - 1):
        grey = cv2.cvtColor(video[index], cv2.COLOR_RGB2GRAY)
        grey = cv2.resize(grey, size, interpolation=method)
        edges.append(cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, square))
    strokes = (np.min(edges, axis=0) >= _STROKE).astype(np.uint8)
    joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, np.ones((1, 9), np.uint8))
    joined = cv2.morphologyEx(joined, cv2.MORPH_OPEN, np.ones((3, 5), np.uint8))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(joined)
    covered = 0
    for x, y, box_width, box_height, area in boxes[1:count].tolist():
        if not _LINE_HEIGHT[0] <= box_height <= _LINE_HEIGHT[1]:
            continue
        if box_width < _MIN_ASPECT * box_height or area < _MIN_FILL * box_width * box_height:
            continue
        inside = strokes[y : y + box_height, x : x + box_width]
        crossings = (np.diff(inside.astype(np.int8), axis=1) == 1).sum(axis=1).mean()
        if crossings * box_height / box_width >= _MIN_STROKES:
            covered += box_width * box_height
    return covered / _TEXT_SIDE**2


def perceptual_hash(small: UInt8[np.ndarray, "t h w 3"]) -> bytes:
    """128 bits that change little when a clip is encoded again or resized.

    64 say what the middle frame looks like, 64 how the last third differs from the first: each the
    signs of the 8 x 8 lowest coefficients of the discrete cosine transform of a grey copy, against
    their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions"). Clips that one still camera took of different events differ in the second half.
    """
    grey = small.astype(np.float32).mean(axis=-1)
    third = max(1, len(grey) // 3)
    change = grey[-third:].mean(axis=0) - grey[:third].mean(axis=0)
    bits = []
    for picture in (grey[len(grey) // 2], change):
        low = cv2.dct(cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA))[:8, :8].ravel()
        bits.append(low > np.median(low[1:]))
    return np.packbits(np.concatenate(bits)).tobytes()


def find_duplicates(
    hashes: UInt8[np.ndarray, "n 16"], max_distance: int
) -> dict[int, tuple[int, int]]:
    """Which clips repeat an earlier one.

    In the order given, a clip is kept unless its hash differs in at most `max_distance` bits from
    one that was kept before. So the answer depends on the order of the clips and on nothing else.
    Time and memory grow with the number of clips, and not with the square of that of copies.

    Returns:
      Index of a clip to drop -> (the index of the kept one it repeats, bits in which they differ).
      Of several it is the first; the copy of one that was itself dropped repeats what that one
      repeats.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance is from 0 to {MAX_DISTANCE} bits, got {max_distance}")
    if not len(hashes):
        return {}
    # Copies of one clip first: what follows compares different hashes alone.
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    original = first[inverse.reshape(-1)]
    distinct = np.sort(first)
    dropped = {
        int(distinct[later]): (int(distinct[earlier]), bits)
        for later, (earlier, bits) in _near_kept(hashes[distinct], max_distance).items()
    }
    for index in np.flatnonzero(original != np.arange(len(hashes))).tolist():
        kept = int(original[index])
        dropped[index] = dropped.get(kept, (kept, 0))
    return dropped


def _near_kept(hashes: UInt8[np.ndarray, "n 16"], max_distance: int) -> dict[int, tuple[int, int]]:
    """`find_duplicates` of hashes that all differ."""
    pairs, crowds = _candidates(hashes, max_distance)
    members = np.concatenate([np.zeros(0, np.int32), *crowds])
    crowd_of = np.repeat(np.arange(len(crowds), dtype=np.int32), [len(crowd) for crowd in crowds])
    order = np.argsort(members, kind="stable")
    crowd_of = crowd_of[order]
    # All others are kept, and nothing is ever compared with them.
    nodes = np.union1d(pairs.later, members)
    pair_ends = np.searchsorted(pairs.later, nodes, "right").tolist()
    pair_starts = np.searchsorted(pairs.later, nodes, "left").tolist()
    crowd_ends = np.searchsorted(members, nodes, "right", sorter=order).tolist()
    crowd_starts = np.searchsorted(members, nodes, "left", sorter=order).tolist()
    kept_of = [array.array("i") for _ in crowds]
    dropped: dict[int, tuple[int, int]] = {}
    for at, node in enumerate(nodes.tolist()):
        near: list[tuple[int, int]] = []
        for pair in range(pair_starts[at], pair_ends[at]):
            earlier = int(pairs.earlier[pair])
            if earlier not in dropped:
                near.append((earlier, int(pairs.bits[pair])))
                break
        own = [kept_of[crowd] for crowd in crowd_of[crowd_starts[at] : crowd_ends[at]]]
        filled = [np.frombuffer(kept, np.int32) for kept in own if kept]
        if filled:
            kept = np.concatenate(filled)
            bits = _distance(hashes[kept], hashes[node])
            within = bits <= max_distance
            if within.any():
                earlier = int(kept[within].min())
                near.append((earlier, int(bits[kept == earlier][0])))
        del filled  # an array that is looked at cannot grow
        if near:
            dropped[node] = min(near)
        else:
            for kept in own:
                kept.append(node)
    return dropped


class _Pairs(NamedTuple):
    """Pairs of near hashes, each once, sorted by the later and then by the earlier one."""

    earlier: Int32[np.ndarray, " p"]
    later: Int32[np.ndarray, " p"]
    bits: UInt8[np.ndarray, " p"]


def _candidates(
    hashes: UInt8[np.ndarray, "n 16"], max_distance: int
) -> tuple[_Pairs, list[Int32[np.ndarray, " m"]]]:
    """What must be compared so that no two near hashes are missed.

    Two near hashes share at least two of their parts. Those that share two parts with a few others
    are compared with these here. Where many share them, as many copies of one clip do, comparing
    all would take the square of their number: such crowds are given as they are.
    """
    bits = np.unpackbits(hashes, axis=1)
    parts = [
        np.packbits(part, axis=1, bitorder="little")
        for part in np.array_split(bits, _PARTS, axis=1)
    ]
    del bits
    keys = [np.pad(part, ((0, 0), (0, 2 - part.shape[1]))).view("<u2")[:, 0] for part in parts]
    none = np.zeros(0, np.int32)
    found = [(none, none, none.astype(np.uint8))]
    crowds = []
    for a, b in itertools.combinations(range(_PARTS), 2):
        key = keys[a].astype(np.uint32) << 16 | keys[b]
        order = np.argsort(key, kind="stable").astype(np.int32)
        same = key[order]
        starts = np.flatnonzero(np.concatenate([[True], same[1:] != same[:-1]]))
        sizes = np.diff(starts, append=len(order))
        large = sizes > _CROWD
        crowds += [order[s : s + n] for s, n in zip(starts[large], sizes[large], strict=True)]
        # Neighbours at distance 1, 2, ... in the sorted order, as long as any share their key.
        few = np.flatnonzero((sizes > 1) & ~large)
        begin, left = starts[few], sizes[few]
        equal = np.repeat(begin - np.concatenate([[0], np.cumsum(left)[:-1]]), left)
        equal += np.arange(len(equal))
        for step in range(1, _CROWD):
            equal = equal[equal + step < len(order)]
            equal = equal[same[equal + step] == same[equal]]
            if not len(equal):
                break
            i, j = order[equal], order[equal + step]
            distance = _distance(hashes[i], hashes[j])
            near = np.flatnonzero(distance <= max_distance)
            i, j, distance = i[near], j[near], distance[near]
            # A pair may share more than two parts: it is taken at the first two of them.
            again = np.zeros(len(i), bool)
            for part in set(range(b)) - {a}:
                again |= keys[part][i] == keys[part][j]
            found.append((i[~again], j[~again], distance[~again].astype(np.uint8)))
    earlier, later, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    by = np.lexsort((earlier, later))
    return _Pairs(earlier[by], later[by], distances[by]), crowds


def _distance(
    a: UInt8[np.ndarray, "*n 16"], b: UInt8[np.ndarray, "*n 16"]
) -> Integer[np.ndarray, "*n"]:
    """Bits in which hashes differ."""
    words = np.bitwise_count(a.view(np.uint64) ^ b.view(np.uint64))
    return words.sum(axis=-1, dtype=np.uint8)
