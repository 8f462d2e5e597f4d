import copy
import json
import math

import numpy as np
import pytest

from nuwa_jax.motion.drags import Drag, DragError, DragSet
from nuwa_jax.motion.raster import rasterize
from nuwa_jax.motion.tracks import Tracks, TrackState

FILE = {
    "version": 1,
    "width": 56,
    "height": 40,
    "frames": 9,
    "fps": 8,
    "drags": [
        {"id": "d1", "kind": "drag", "points": [[10, 10], [30, 10]]},
        {"id": "rock", "kind": "anchor", "points": [[50, 30]]},
    ],
}


def changed(**changes):
    """The file above with changes to its first drag, or to the top where the key is there."""
    obj = copy.deepcopy(FILE)
    for key, value in changes.items():
        (obj if key in FILE else obj["drags"][0])[key] = value
    return obj


def one_drag(points, **options):
    return DragSet(56, 40, 9, 8, (Drag("d", "drag", points, **options),))


def test_everything_survives_saving_and_loading(tmp_path):
    drag = Drag(
        "boat",
        "drag",
        ((10.25, 10), (20, 14.5), (30, 10)),
        times=(0, 0.75, 1),
        start=1,
        end=6,
        ease="inout",
        hidden=((3, 4),),
        depth=-1.5,
        region=((5, 5), (15, 5), (10, 18)),
    )
    camera = Drag("pan", "camera", ((5, 5), (1, 5)))
    drags = DragSet(56, 40, 9, 12.5, (drag, Drag("rock", "anchor", ((50, 30),)), camera))
    drags.save(tmp_path / "drags.json")
    assert DragSet.load(tmp_path / "drags.json") == drags
    assert DragSet.from_json(drags.to_json()) == drags
    assert [path.name for path in tmp_path.iterdir()] == ["drags.json"]


def test_null_stands_for_what_is_optional():
    optional = dict.fromkeys(("times", "start", "end", "ease", "hidden", "depth", "region"))
    assert DragSet.from_json(changed(**optional)) == DragSet.from_json(FILE)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([], "is a JSON object, got a list"),
        ({"drags": []}, "expected version 1 of the drags file, got none"),
        (changed(version=2), "expected version 1 of the drags file, got 2"),
        ({k: v for k, v in FILE.items() if k != "fps"}, "'fps' is missing"),
        (changed(drags=[]), "there are no drags"),
        (changed(drags={}), "'drags' is a list, got an object"),
        (changed(drags=[3]), "drag number 0 is a JSON object, got a number"),
        (changed(width=0), "'width' is a whole number of at least 1, got 0"),
        (changed(frames=1), "'frames' is a whole number of at least 2, got 1"),
        (changed(frames="9"), "'frames' is a whole number of at least 2, got '9'"),
        (changed(fps=-1), "'fps' is a positive number"),
        (changed(speed=3), "drag 'd1': unknown key 'speed'"),
        (changed(id=7), "drag number 0: 'id' is a text"),
        (changed(id="rock"), "drag 'rock' appears twice"),
        (changed(kind="push"), "drag 'd1': 'kind' is one of drag, anchor, camera, got 'push'"),
        (changed(kind=["drag"]), "drag 'd1': 'kind' is one of"),
        (changed(points=[[1, 2]]), "drag 'd1': a drag needs at least 2 points, got 1"),
        (changed(kind="anchor"), "drag 'd1': an anchor stays still at exactly 1 point, got 2"),
        (changed(points=[[1, 2], [math.nan, 3]]), "drag 'd1' point 1 is two finite numbers"),
        (changed(points=[[1, 2], [3, math.inf]]), "drag 'd1' point 1 is two finite numbers"),
        (changed(points=[[1, 2], [3, 10**400]]), "drag 'd1' point 1 is two finite numbers"),
        (changed(points=[[1, 2], [True, 3]]), "drag 'd1' point 1 is two finite numbers"),
        (changed(points=[[1, 2], [3]]), "drag 'd1' point 1 is two finite numbers"),
        (changed(points=[[56, 2], [3, 3]]), "drag 'd1' point 0 (56, 2) is outside the 56x40"),
        (changed(times=[0]), "'times' has one entry per point, got 1 for 2 points"),
        (changed(times=[0.5, 0.5]), "drag 'd1' point 1: 'times' must increase, got 0.5 after 0.5"),
        (changed(times=[0, 2]), "drag 'd1' point 1: 'times' are in 0..1, got 2"),
        (changed(times=[0, math.nan]), "drag 'd1': 'times' is a list of finite numbers"),
        (changed(start=5, end=5), "'start' must come before 'end', got start 5 and end 5"),
        (changed(end=9), "drag 'd1': 'end' is a frame in 0..8, got 9"),
        (changed(start=1.5), "drag 'd1': 'start' is a frame in 0..8, got 1.5"),
        (changed(ease="bounce"), "drag 'd1': 'ease' is one of linear, in, out, inout"),
        (changed(ease=[]), "drag 'd1': 'ease' is one of"),
        (changed(hidden=[[3, 2]]), "drag 'd1': 'hidden' interval 0 is [first, last]"),
        (changed(hidden=[2]), "drag 'd1': 'hidden' interval 0 is [first, last]"),
        (changed(depth="far"), "drag 'd1': 'depth' is a finite number"),
        (changed(region=[[1, 1], [2, 2]]), "drag 'd1': 'region' is a polygon of at least 3"),
        (changed(region=[[1, 1], [2, 2], [3, 3]]), "drag 'd1': 'region' encloses no area"),
        (changed(region=[[1, 1], [2, 2], [3, math.nan]]), "drag 'd1' point of 'region' 2 is two"),
    ],
)
def test_fault_is_named_with_its_drag_and_point(obj, message, tmp_path):
    path = tmp_path / "drags.json"
    path.write_text(json.dumps(obj))
    with pytest.raises(DragError) as raised:
        DragSet.load(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_one_error_lists_every_fault():
    obj = changed(points=[[math.nan, 0], [1, 1], [2, None]], ease="no", color="red")
    obj["drags"][1]["points"] = []
    with pytest.raises(DragError) as raised:
        DragSet.from_json(obj)
    for part in ("5 faults", "'d1' point 0", "'d1' point 2", "'ease'", "'color'", "'rock'"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": 1,', "not JSON at line 1 column 15"),
        (b"", "not JSON at line 1 column 1"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_file_that_is_no_json_is_refused(tmp_path, content, message):
    path = tmp_path / "drags.json"
    path.write_bytes(content)
    with pytest.raises(DragError, match=message):
        DragSet.load(path)


def test_missing_file_and_unwritable_place_are_named(tmp_path):
    with pytest.raises(DragError, match=r"none\.json: cannot read the drags file: No such file"):
        DragSet.load(tmp_path / "none.json")
    with pytest.raises(DragError, match="cannot write the drags file"):
        DragSet.from_json(FILE).save(tmp_path / "no" / "drags.json")


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(DragError, match="at least 2 points"):
        one_drag([(1, 1)]).save(tmp_path / "drags.json")
    assert not list(tmp_path.iterdir())


def test_later_points_may_lie_outside_and_are_reported():
    drags = one_drag([(50, 20), (70, 20)])
    assert drags.outside() == ["drag 'd' point 1 (70, 20) lies outside the 56x40 picture"]
    tracks = drags.to_tracks(9)
    np.testing.assert_allclose(tracks.points[0, -1], (70, 20))
    np.testing.assert_array_equal(tracks.state[0], [1, 1, 1, 3, 3, 3, 3, 3, 3])
    assert DragSet.from_json(FILE).outside() == []


@pytest.mark.parametrize("frames", [2, 9, 14])
def test_default_timing_has_constant_speed_however_it_was_clicked(frames):
    clicked = [(4, 4), (5, 4), (6, 4), (6, 4), (30, 20), (50, 10)]
    tracks = one_drag(clicked).to_tracks(frames)
    np.testing.assert_allclose(tracks.points[0, [0, -1]], [clicked[0], clicked[-1]], atol=1e-4)
    fine = one_drag(clicked).to_tracks(2000).points[0]
    speed = np.linalg.norm(np.diff(fine, axis=0), axis=-1)
    assert speed.max() / speed.min() < 1.05
    for point in clicked:
        assert np.linalg.norm(fine - point, axis=-1).min() < 0.05


@pytest.mark.parametrize("example", range(4))
def test_index_timing_equals_that_of_the_dragnuwa_demo(example, golden):
    points = golden[f"pchip{example}|points"]
    expected = golden[f"pchip{example}|out"]
    tracks = one_drag(points).to_tracks(len(expected), timing="index")
    np.testing.assert_allclose(tracks.points[0], expected, atol=1e-4)


@pytest.fixture
def golden(request):
    return np.load(request.path.parents[1] / "golden" / "dragnuwa_drag.npz")


def test_given_times_are_kept():
    drags = one_drag([(10, 10), (40, 10), (40, 30)], times=(0, 0.25, 1))
    for timing in ("arc", "index"):
        points = drags.to_tracks(9, timing=timing).points[0]
        np.testing.assert_allclose(points[[0, 2, 8]], [(10, 10), (40, 10), (40, 30)], atol=1e-4)


def test_motion_lasts_from_start_to_end():
    points = one_drag([(10, 10), (30, 10)], start=2, end=6).to_tracks(9).points[0]
    np.testing.assert_allclose(points[:, 0], [10, 10, 10, 15, 20, 25, 30, 30, 30], atol=1e-4)


@pytest.mark.parametrize(
    ("ease", "middle"), [("linear", 20), ("in", 15), ("out", 25), ("inout", 20)]
)
def test_easing_changes_when_not_where(ease, middle):
    x = one_drag([(10, 10), (30, 10)], ease=ease).to_tracks(9).points[0, :, 0]
    np.testing.assert_allclose(x[[0, 4, 8]], [10, middle, 30], atol=1e-4)
    first, last = x[1] - x[0], x[8] - x[7]
    slow = {"linear": (2.5, 2.5), "in": (0.3125, 4.6875), "out": (4.6875, 0.3125)}
    np.testing.assert_allclose((first, last), slow.get(ease, (0.859375, 0.859375)), atol=1e-3)


def test_other_frame_count_stretches_the_drag_in_time():
    drags = one_drag([(10, 10), (30, 10)], start=2, end=6, hidden=((4, 5),))
    tracks = drags.to_tracks(17)
    np.testing.assert_allclose(tracks.points[0, ::2], drags.to_tracks(9).points[0], atol=1e-4)
    assert np.flatnonzero(tracks.state[0] == TrackState.OCCLUDED).tolist() == [7, 8, 9, 10]
    assert drags.to_tracks(1).points.shape == (1, 1, 2)


def test_hidden_frames_are_occluded_and_not_drawn():
    tracks = one_drag([(10, 10), (30, 10)], hidden=((3, 4), (8, 8))).to_tracks(9)
    assert np.flatnonzero(tracks.state[0] == TrackState.OCCLUDED).tolist() == [3, 4, 8]
    flow = rasterize(tracks.points, tracks.state, 40, 56)
    assert [bool(frame.any()) for frame in flow] == [0, 1, 1, 0, 0, 0, 1, 1, 0]


def test_anchor_is_still_and_visible_where_padding_is_unspecified():
    tracks = DragSet.from_json(FILE).to_tracks(9).pad(3)
    assert (tracks.points[1] == (50, 30)).all()
    assert (tracks.state[1] == TrackState.VISIBLE).all()
    assert (tracks.state[2] == TrackState.UNSPECIFIED).all()


def test_large_object_moves_as_a_whole(tmp_path):
    region = [(5, 5), (25, 5), (25, 25), (5, 25)]
    drags = one_drag([(15, 15), (35, 25)], region=region, hidden=((2, 3),))
    drags.save(tmp_path / "drags.json")
    tracks = DragSet.load(tmp_path / "drags.json").to_tracks(9)
    assert tracks.num_tracks == 5
    offset = tracks.points - tracks.points[:1]
    np.testing.assert_allclose(offset, np.repeat(offset[:, :1], 9, axis=1), atol=1e-4)
    handles = tracks.points[1:, 0]
    np.testing.assert_allclose(
        sorted(map(tuple, handles)), [(10, 10), (10, 20), (20, 10), (20, 20)]
    )
    assert (tracks.state == tracks.state[0]).all()
    # The object's corners move in the flow map as its middle does; far from it nothing moves.
    flow = rasterize(tracks.points, tracks.state, 40, 56, sigma=4.0, kernel_size=25)[1]
    for x, y in handles.astype(int):
        np.testing.assert_allclose(flow[y, x], flow[15, 15], rtol=0.4)
    assert not flow[38, 50].any()


@pytest.mark.parametrize("limit", [0, 1, 4, 7, 30])
def test_region_tracks_lie_within_the_polygon_and_follow_all_drags(limit):
    corner = [(10, 10), (40, 10), (40, 16), (16, 16), (16, 35), (10, 35)]  # an L
    shape = Drag("l", "drag", ((12, 12), (14, 12)), region=corner)
    drags = DragSet(56, 40, 9, 8, (shape, Drag("rock", "anchor", ((50, 30),))))
    tracks = drags.to_tracks(9, region_points=limit)
    assert 2 + (limit // 2 if limit > 1 else 0) <= tracks.num_tracks <= 2 + limit
    np.testing.assert_array_equal(tracks.points[1, 0], (50, 30))
    x, y = tracks.points[2:, 0].T
    assert (((10 <= x) & (x <= 40) & (10 <= y) & (y <= 16)) | ((x <= 16) & (y <= 35))).all()


def test_resizing_moves_points_with_the_picture():
    small = one_drag([(-0.5, -0.5), (55.5, 39.5)], region=[(0, 0), (4, 0), (4, 4)])
    wide = small.resize(112, 20)
    assert (wide.width, wide.height) == (112, 20)
    assert wide.drags[0].points == ((-0.5, -0.5), (111.5, 19.5))
    assert wide.drags[0].region[0] == (0.5, -0.25)
    tracks = small.resize(140, 100).to_tracks(9)
    expected = small.to_tracks(9).resize((40, 56), (100, 140))
    np.testing.assert_allclose(tracks.points, expected.points, atol=1e-3)


def test_cropping_shifts_points_and_names_handles_that_are_cut_away():
    drags = DragSet.from_json(FILE)
    cropped = drags.crop(4, 6, 50, 30)
    assert (cropped.width, cropped.height) == (50, 30)
    assert cropped.drags[0].points == ((6, 4), (26, 4))
    with pytest.raises(DragError, match=r"drag 'rock' point 0 is cut away by the crop to 20x30"):
        drags.crop(4, 6, 20, 30)


def test_tracks_come_back_from_the_drags_made_of_them():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, (55, 39), (4, 7, 2)).astype(np.float32)
    points[1] = points[1, 0]
    state = np.ones((4, 7), np.uint8)
    state[0, 2:4] = TrackState.OCCLUDED
    state[2, 4:] = TrackState.UNSPECIFIED
    state[3] = TrackState.UNSPECIFIED
    drags = DragSet.from_tracks(Tracks(points, state), 56, 40, 8.0)
    assert [drag.kind for drag in drags.drags] == ["drag", "anchor", "drag"]
    tracks = drags.to_tracks(7)
    np.testing.assert_allclose(tracks.points[:2], points[:2], atol=1e-3)
    np.testing.assert_array_equal(tracks.state[:2], state[:2])
    np.testing.assert_allclose(tracks.points[2, :4], points[2, :4], atol=1e-3)
    np.testing.assert_allclose(tracks.points[2, 4:], points[2, [3, 3, 3]], atol=1e-3)
