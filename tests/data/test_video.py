import io

import av
import numpy as np
import pytest

from nuwa_jax.data.scenes import SceneConfig, render_scene
from nuwa_jax.data.video import (
    VideoError,
    encode_video,
    probe_video,
    read_video,
    resize_video,
    stride_for,
    write_video,
)


@pytest.fixture(scope="module")
def video():
    return render_scene(3, SceneConfig(height=46, width=64, frames=25)).video


@pytest.fixture(scope="module")
def path(video, tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, video, 24.0)
    return path


def error_of(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


@pytest.mark.parametrize("height,width", [(46, 64), (47, 65), (17, 32)])
def test_written_video_comes_back_with_its_size_and_rate(tmp_path, height, width):
    video = render_scene(5, SceneConfig(height=height, width=width, frames=5)).video
    write_video(tmp_path / "a.mp4", video, 7.5)
    read, fps = read_video(tmp_path / "a.mp4")
    assert read.shape == video.shape and read.dtype == np.uint8
    assert fps == 7.5
    assert error_of(read, video) < 6
    info = probe_video(tmp_path / "a.mp4")
    assert (info.height, info.width, info.frames, info.fps) == (height, width, 5, 7.5)


def test_odd_sizes_are_stored_even_so_that_any_player_shows_them(tmp_path, video):
    write_video(tmp_path / "a.mp4", video[:, :45, :63], 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (46, 64)
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_bytes_and_files_decode_alike(path):
    np.testing.assert_array_equal(read_video(path)[0], read_video(path.read_bytes())[0])


def test_encoded_bytes_are_the_same_every_time(video):
    assert encode_video(video, 8) == encode_video(video, 8)


@pytest.mark.parametrize("fps", [8, 23.976023976, 29.97 / 4, 12.5])
def test_frame_rates_survive(video, fps):
    assert read_video(encode_video(video[:3], fps))[1] == pytest.approx(fps, rel=1e-6)


def test_part_of_a_clip_is_exact(path):
    whole, fps = read_video(path)
    part, _ = read_video(path, start=7 / fps, max_frames=4)
    np.testing.assert_array_equal(part, whole[7:11])
    strided, strided_fps = read_video(path, stride=3)
    np.testing.assert_array_equal(strided, whole[::3])
    assert strided_fps == fps / 3
    nearest, nearest_fps = read_video(path, fps=8)
    np.testing.assert_array_equal(nearest, whole[::3])
    assert nearest_fps == 8


def write_with(path, video, codec, container_format, **options):
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "name,codec,container_format,options",
    [
        ("a.mpg", "mpeg1video", "mpeg", {}),
        ("b.mpg", "mpeg2video", "mpeg", {"bf": "2"}),
        ("a.avi", "mpeg4", "avi", {}),
        ("b.avi", "mpeg4", "avi", {"bf": "2"}),
        ("h264.avi", "libx264", "avi", {}),
        ("a.ts", "libx264", "mpegts", {}),
        ("a.flv", "libx264", "flv", {}),
        ("mpeg4.mp4", "mpeg4", "mp4", {"bf": "2"}),
        ("a.mov", "libx264", "mov", {"g": "12"}),
        ("a.mkv", "libx264", "matroska", {"g": "12", "x264-params": "open-gop=1"}),
        ("a.264", "libx264", "h264", {}),
    ],
)
def test_part_of_a_clip_is_exact_in_any_container(tmp_path, name, codec, container_format, options):
    moving = render_scene(3, SceneConfig(height=46, width=64, frames=1)).video[0]
    video = np.stack([np.roll(moving, 2 * shift, axis=1) for shift in range(40)])
    write_with(tmp_path / name, video, codec, container_format, **options)
    whole, fps = read_video(tmp_path / name)
    assert len(whole) == 40
    for first in (1, 9, 10, 11, 12, 13, 24, 25, 38):
        part, _ = read_video(tmp_path / name, start=first / fps, max_frames=2)
        np.testing.assert_array_equal(part, whole[first : first + 2], err_msg=str(first))


def test_start_after_the_end_is_an_error(path):
    with pytest.raises(VideoError, match="no frame at 99 s"):
        read_video(path, start=99)


@pytest.mark.parametrize(
    "source,wanted,stride", [(24, 8, 3), (30, 8, 4), (25, 8, 3), (8, 8, 1), (5, 8, 1), (60, 8, 8)]
)
def test_stride_comes_nearest_to_the_wanted_rate(source, wanted, stride):
    assert stride_for(source, wanted) == stride


def test_frames_of_a_telephone_are_turned_upright(tmp_path, video):
    # A display matrix of a quarter turn, as telephones write it.
    write_video(tmp_path / "a.mp4", video[:2], 8)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    identity = b"".join(
        int(x).to_bytes(4, "big") for x in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    )
    turned = b"".join(
        int(x).to_bytes(4, "big", signed=True)
        for x in (0, 1 << 16, 0, -(1 << 16), 0, 0, 46 << 16, 0, 1 << 30)
    )
    track = data.index(b"tkhd")
    place = data.index(identity, track)
    data[place : place + len(turned)] = turned
    read, _ = read_video(bytes(data))
    assert read.shape == (2, 64, 46, 3)
    assert error_of(np.rot90(read[0], 1), video[0]) < 6  # it was turned clockwise
    info = probe_video(bytes(data))
    assert (info.height, info.width) == (64, 46)


def make_audio():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("read", [read_video, probe_video])
def test_unusable_files_say_what_is_wrong(read, path, tmp_path):
    data = path.read_bytes()
    encoded = encode_video(read_video(path)[0], 24)  # its index is at the end
    cases = {
        "empty.mp4": (b"", "0 bytes"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "cannot be decoded"),
        "text.mp4": (b"<html>404 not found</html>" * 50, "cannot be decoded"),
        "sound.mp4": (make_audio(), "no video"),
        "cut.mp4": (data[: len(data) * 2 // 3], "damaged|truncated|cannot be decoded"),
        "cut_index.mp4": (encoded[: len(encoded) // 2], "cannot be decoded"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=message) as error:
            read(tmp_path / name)
        assert name in str(error.value)
    for name in ("missing.mp4", "http://127.0.0.1:9/a.mp4"):
        with pytest.raises(VideoError, match="not a file"):
            read(name)
    with pytest.raises(VideoError, match="not a file"):
        read(tmp_path)


def test_a_failed_write_leaves_nothing_behind(tmp_path, video):
    with pytest.raises(VideoError, match=".mp4"):
        write_video(tmp_path / "a.avi", video, 8)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.mp4", video / 255.0, 8)
    (tmp_path / "file").write_text("")
    with pytest.raises(VideoError, match="cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", video, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "old,new",
    [((40, 60), (20, 30)), ((40, 60), (32, 32)), ((60, 40), (24, 36)), ((19, 27), (61, 50))],
)
def test_resized_points_stay_on_what_they_marked(old, new):
    # A bright blob at the middle: its centre of mass is found again where the transform says.
    y, x = np.mgrid[: old[0], : old[1]]
    centre = np.array([old[1] * 0.52, old[0] * 0.47])
    blob = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * (min(old) / 10) ** 2))
    video = np.repeat((255 * blob)[None, ..., None], 3, axis=-1).astype(np.uint8)
    resized, transform = resize_video(video, *new)
    assert resized.shape == (1, *new, 3)
    mass = resized[0, ..., 0].astype(float)
    y, x = np.mgrid[: new[0], : new[1]]
    found = np.array([(x * mass).sum(), (y * mass).sum()]) / mass.sum()
    np.testing.assert_allclose(transform(centre), found, atol=0.15)


def test_resize_to_the_same_size_changes_nothing(video):
    resized, transform = resize_video(video, 46, 64)
    np.testing.assert_array_equal(resized, video)
    np.testing.assert_allclose(transform(np.array([[3.0, 4.0]])), [[3.0, 4.0]])
