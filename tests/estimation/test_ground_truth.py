"""Finding pairs of pictures with true flow in the layouts of the well-known datasets."""

import cv2
import numpy as np
import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.estimation.ground_truth import find_pairs, read_flo


def write_flo(path, flow):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = flow.shape[:2]
    size = np.array([width, height], "<i4").tobytes()
    path.write_bytes(b"PIEH" + size + flow.astype("<f4").tobytes())


def picture(path, value=0, size=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), (value, 10, 200), np.uint8))


def test_flying_chairs_middlebury_and_sintel_are_found(tmp_path):
    flow = np.arange(48, dtype=np.float32).reshape(4, 6, 2)
    write_flo(tmp_path / "chairs" / "7_flow.flo", flow)
    for name in ("7_img0", "7_img1", "17_img0", "17_img1"):
        picture(tmp_path / "chairs" / f"{name}.ppm")
    write_flo(tmp_path / "middlebury" / "Venus" / "flow10.flo", flow)
    for number in (9, 10, 11):
        picture(tmp_path / "middlebury" / "Venus" / f"frame{number}.png", number)
    write_flo(tmp_path / "sintel" / "flow" / "alley_1" / "frame_0002.flo", flow)
    for number in (1, 2, 3):
        picture(tmp_path / "sintel" / "clean" / "alley_1" / f"frame_{number:04}.png")
    found = {pair.name: (pair.before.name, pair.after.name) for pair in find_pairs(tmp_path)}
    assert found == {
        "chairs/7_flow": ("7_img0.ppm", "7_img1.ppm"),
        "middlebury/Venus/flow10": ("frame10.png", "frame11.png"),
        "sintel/flow/alley_1/frame_0002": ("frame_0002.png", "frame_0003.png"),
    }
    pair = next(pair for pair in find_pairs(tmp_path) if "Venus" in pair.name)
    np.testing.assert_array_equal(pair.truth(), flow)
    assert pair.video()[:, 0, 0].tolist() == [[200, 10, 10], [200, 10, 11]]  # RGB


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        find_pairs(tmp_path / "none")
    with pytest.raises(UserError, match=r"no \.flo"):
        find_pairs(tmp_path)
    write_flo(tmp_path / "flow10.flo", np.zeros((4, 6, 2)))
    picture(tmp_path / "frame10.png")
    with pytest.raises(UserError, match=r"flow10\.flo.*found \['frame10\.png'\]"):
        find_pairs(tmp_path)
    picture(tmp_path / "frame11.png", size=(5, 6))
    (pair,) = find_pairs(tmp_path)
    with pytest.raises(UserError, match="differ in size"):
        pair.video()
    (tmp_path / "frame11.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"frame11\.png cannot be read"):
        pair.video()
    whole = (tmp_path / "flow10.flo").read_bytes()
    for damaged in (b"", b"XXXX" + whole[4:], whole[:-1], whole[:4] + b"\xff" * 8 + whole[12:]):
        (tmp_path / "cut.flo").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cut\.flo is no whole"):
            read_flo(tmp_path / "cut.flo")
