import json
import os
from pathlib import Path

import pytest

from nuwa_jax.data.sources import Input, Place, find_video, list_inputs, shard_of, without_repeats
from nuwa_jax.data.storage import Folder
from nuwa_jax.errors import UserError


def rows(layout, tmp_path, text, root=None):
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    return list(list_inputs(layout, str(path), Folder(root or tmp_path)))


def test_webvid_looks_in_three_places(tmp_path):
    found = rows(
        "webvid",
        tmp_path,
        "videoid,contentUrl,duration,page_dir,name\n"
        '7,a/b.mp4,PT1S,000001_000050,"red, blue"\n,,,,\n',
    )
    places = (Place("a/b.mp4"), Place("000001_000050/7.mp4"), Place("7.mp4"))
    assert found[0] == Input("000001_000050__7", "red, blue", places)
    assert found[1].fault[0] == "bad_row" and found[1].position == 1


def test_openvid_names_files_and_captions(tmp_path):
    found = rows(
        "openvid",
        tmp_path,
        "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,"
        "frame,fps,seconds\ncelebv_x.mp4,A man talks.,5.1,2.2,0.99,static,120,24.0,5.0\n",
    )
    assert found == [Input("celebv_x.mp4", "A man talks.", (Place("celebv_x.mp4"),))]


def test_panda70m_makes_a_clip_of_every_span(tmp_path):
    spans = "[['0:00:01.500', '0:00:04.000'], ['1:02:03.250', '1:02:05.000']]"
    found = rows(
        "panda70m",
        tmp_path,
        "videoID,url,timestamp,caption,matching_score\n"
        f'abc,https://x,"{spans}","[""a dog\'s nose"", \'a cat\']","[0.5, 0.6]"\n'
        'def,https://x,"[[\'0:00:01\'","[]","[]"\n'
        "ghi,https://x,\"[['0:00:01', '0:00:02']]\",\"['a', 'b']\",\"[]\"\n",
    )
    assert [each.id for each in found] == ["abc_0", "abc_1", "row 3", "row 4"]
    assert [each.caption for each in found[:2]] == ["a dog's nose", "a cat"]
    assert found[1].places == (
        Place("abc_1.mp4"),
        Place("abc/1.mp4"),
        Place("abc.mp4", (3723.25, 3725.0)),
    )
    assert [each.fault[0] for each in found[2:]] == ["bad_row", "bad_row"]


@pytest.mark.parametrize(
    "spans,captions",
    [
        ("[[1.0, 2.0]]", "['a']"),
        ("[['1', '2']]", "['a']"),
        ("[['0:00:nan', '0:00:02']]", "['a']"),
        ("[['0:00:01', '0:00:02']]", "[None]"),
        ("[['0:00:01', '0:00:02']]", r"['\ud800']"),
        ("[" * 5000, "['a']"),
        ("5", "['a']"),
    ],
)
def test_row_of_anything_is_a_fault_and_the_next_row_is_read(tmp_path, spans, captions):
    found = rows(
        "panda70m",
        tmp_path,
        f'videoID,timestamp,caption\nabc,"{spans}","{captions}"\n'
        "def,\"[['0:00:01', '0:00:02']]\",\"['a cat']\"\n",
    )
    assert [each.id for each in found] == ["row 2", "def_0"]
    assert found[0].fault[0] == "bad_row" and "row 2 of list.csv" in found[0].fault[1]
    found[0].to_json().encode()


@pytest.mark.parametrize("error", [ImportError("Install gcsfs"), ValueError("Protocol not known")])
def test_list_that_nothing_can_open_is_the_users_error(tmp_path, monkeypatch, error):
    def open_url(*arguments, **options):
        raise error

    monkeypatch.setattr("nuwa_jax.data.sources.fsspec.open", open_url)
    with pytest.raises(UserError, match=f"--csv=gs://x cannot be read: {error}"):
        list(list_inputs("openvid", "gs://x", Folder(tmp_path)))


def test_ucf101_takes_the_class_for_a_caption(tmp_path):
    for name in ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "TaiChi/v_TaiChi_g02_c01.avi"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    found = list(list_inputs("ucf101", None, Folder(tmp_path)))
    assert [each.caption for each in found] == ["apply eye makeup", "tai chi"]
    assert found[0].places == (Place("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"),)


def test_name_that_is_not_utf8_is_a_fault_of_its_own(tmp_path):
    for name in (b"caf\xe9.mp4", "caf\u00e9.mp4".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    good, bad = sorted(list_inputs("folder", None, Folder(tmp_path)), key=lambda each: each.id)[
        ::-1
    ]
    assert good.id == "caf\u00e9.mp4" and good.fault is None
    assert bad.id == "caf\\xe9.mp4" and bad.fault[0] == "bad_row" and not bad.places
    for each in (good, bad):
        assert Input.from_json(each.to_json().encode().decode()) == each
        assert shard_of(each, 3) in range(3)


def test_layout_and_csv_must_fit(tmp_path):
    with pytest.raises(UserError, match="need a csv"):
        list(list_inputs("openvid", None, Folder(tmp_path)))
    with pytest.raises(UserError, match="need a csv"):
        list(list_inputs("ucf101", "a.csv", Folder(tmp_path)))
    with pytest.raises(UserError, match="lacks the column caption"):
        rows("openvid", tmp_path, "video,text\na,b\n")


def test_inputs_survive_json():
    inputs = [
        Input("a", "ünïcode\nlines", (Place("a.mp4"), Place("b.mp4", (0.5, 2.0))), position=3),
        Input("row 4", "", (), fault=("bad_row", "no id"), position=4),
    ]
    for each in inputs:
        line = each.to_json()
        assert "\n" not in line and Input.from_json(line) == each
    assert json.loads(inputs[0].to_json())[0] == "a"


def test_repeated_ids_meet_in_one_shard_whatever_their_order():
    inputs = [Input(f"clip{n % 50}", "", ()) for n in range(100)]
    shards = [shard_of(each, 7) for each in inputs]
    assert shards[:50] == shards[50:] and set(shards) == set(range(7))
    kept = [each for each in without_repeats(inputs) if each.fault is None]
    assert [each.id for each in kept] == [f"clip{n}" for n in range(50)]


def test_paths_that_lead_out_of_the_root_are_passed_over(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "outside.mp4").write_bytes(b"x")
    (tmp_path / "root" / "in.mp4").write_bytes(b"x")
    root = Folder(tmp_path / "root")
    outside = ("../outside.mp4", str(tmp_path / "outside.mp4"), "file:///etc/passwd", "a\0b", "")
    assert find_video(root, tuple(Place(path) for path in outside)) is None
    assert find_video(root, (Place("no.mp4"), Place("in.mp4", (1, 2)))) == Place("in.mp4", (1, 2))
