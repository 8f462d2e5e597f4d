"""From files to files: a picture and drags to a video, with a very small model."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import tiny
from nuwa_jax.data.video import read_video, write_video
from nuwa_jax.errors import UserError
from nuwa_jax.generation.animate import DragNuwaTracks, animate
from nuwa_jax.generation.generator import Generator
from nuwa_jax.generation.weights import WEIGHTS, Model, load_model, save_model
from nuwa_jax.models.lora import init_lora, merge_lora
from nuwa_jax.models.video_ldm import VideoLDM

FRAMES, HEIGHT, WIDTH = 3, 16, 24


@pytest.fixture(scope="module")
def generator() -> Generator:
    config = tiny.get_config()
    config.data.update(height=HEIGHT, width=WIDTH, frames=FRAMES, max_drags=2)
    config.model.autoencoder.base_channels = 8
    config.model.unet.update(model_channels=8, head_channels=8)
    config.model.drag.update(token_channels=8, heads=2)
    config.model.text.update(channels=8)
    config.sampling.steps = 2
    model = VideoLDM.from_config(config.model)
    params = model.init(jax.random.key(0), height=HEIGHT, width=WIDTH, frames=FRAMES)
    # Zero-initialised layers would hide everything that the conditions do.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return Generator(Model(jax.tree.unflatten(tree, noisy), config, "test"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    return {
        "image": tmp_path / "picture.png",
        "drags": drags_file(tmp_path / "drags.json"),
        "out": tmp_path / "out.mp4",
    }


def drags_file(path: Path, **changes: object) -> Path:
    drag = {"id": "d1", "kind": "drag", "points": [[20, 20], [30, 25]]}
    document = {"version": 1, "width": 50, "height": 40, "frames": FRAMES, "fps": 8}
    path.write_text(json.dumps(document | {"drags": [drag]} | changes))
    return path


def test_a_picture_and_drags_become_a_video_and_an_overlay(generator, files):
    written = animate(generator, **files)
    video, fps = read_video(written.video)
    assert video.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert fps == pytest.approx(8)
    overlay, _ = read_video(written.overlay)
    assert len(overlay) == FRAMES
    assert overlay.shape[1] > HEIGHT
    assert written.remarks == ()


def demo_tracks(path: Path, tracks: object) -> Path:
    path.write_text(json.dumps(tracks))
    return path


def test_tracks_of_the_dragnuwa_demo(generator, files, tmp_path):
    """On its canvas of 576x320; a point that should stay moves if its defect is asked for."""
    path = demo_tracks(tmp_path / "tracks.json", [[[100, 100], [300, 200]], [[400, 160]]])
    videos = []
    for defects in ((), ("still_points_move",)):
        files["drags"] = DragNuwaTracks(path, defects)
        videos.append(read_video(animate(generator, **files).video)[0])
    assert videos[0].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert (videos[0] != videos[1]).any()


@pytest.mark.parametrize(
    ("tracks", "defects", "told"),
    [
        ([[[100, 100], [700, 100], [900, 100]]], ("crash",), "beyond the border"),
        ([[[700, 100]]], (), "no track that starts in the picture"),
        ({"drags": 3}, (), "no file of the demo's tracks"),
        ([[100, 100]], (), "no file of the demo's tracks"),
        ([[[100, 100]]], ("fly",), "still_points_move, overwrite, wrap, crash"),
    ],
)
def test_tracks_of_the_demo_that_cannot_be_used(generator, files, tmp_path, tracks, defects, told):
    path = demo_tracks(tmp_path / "tracks.json", tracks)
    files["drags"] = DragNuwaTracks(path, defects)
    with pytest.raises(UserError, match=told):
        animate(generator, **files)
    files["drags"] = DragNuwaTracks(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        animate(generator, **files)


def test_a_drag_that_leaves_the_picture_is_remarked(generator, files):
    drag = {"id": "leaves", "kind": "drag", "points": [[20, 20], [70, 20]]}
    drags_file(files["drags"], drags=[drag])
    (remark,) = animate(generator, **files).remarks
    assert "leaves" in remark
    assert "point 1" in remark


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(frames=5), "5 frames but the model makes 3"),
        (dict(drags=[]), "drag"),
        (dict(drags=[{"id": "a", "kind": "drag", "points": [[90, 20], [30, 25]]}]), "'a' point 0"),
        (dict(drags=[{"id": "a", "kind": "drag", "points": [[float("nan"), 2], [3, 5]]}]), "'a'"),
        # Inside the picture, but in the part that is cut off to get the model's shape.
        (dict(drags=[{"id": "a", "kind": "drag", "points": [[20, 0], [30, 25]]}]), "'a' point 0"),
    ],
)
def test_drags_that_cannot_be_used_are_told(generator, files, changes, told):
    drags_file(files["drags"], **changes)
    with pytest.raises(UserError, match=told):
        animate(generator, **files)
    assert not files["out"].exists()


def test_files_that_cannot_be_used_are_told(generator, files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(files["image"].read_bytes()[:200])
    with pytest.raises(UserError, match=r"broken\.png"):
        animate(generator, **files | {"image": broken})
    with pytest.raises(UserError, match="does not exist"):
        animate(generator, **files | {"image": tmp_path / "none.png"})
    with pytest.raises(UserError, match=r"\.mp4"):
        animate(generator, **files | {"out": tmp_path / "out.gif"})
    with pytest.raises(UserError, match="picture"):
        animate(generator, **files | {"image": None})
    short = tmp_path / "short.mp4"
    write_video(short, np.zeros((2, 16, 24, 3), np.uint8), 8)
    with pytest.raises(UserError, match="2 frames"):
        animate(generator, **files | {"video": short})


def test_a_clip_is_kept_where_strength_is_low(generator, files, tmp_path):
    clip = np.random.default_rng(1).integers(0, 255, (1, FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    image = clip[:, 0]
    kept = generator.generate(image, video=clip, strength=0.4, seed=0, steps=5)
    again = generator.generate(image, video=clip, strength=0.4, seed=1, steps=5)
    remade = generator.generate(image, video=clip, strength=1.0, seed=0, steps=5)
    free = generator.generate(image, video=clip, strength=1.0, seed=1, steps=5)

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        return np.abs(a.astype(float) - b).mean()

    assert difference(kept, again) < difference(remade, free)


def test_samples_depend_on_seed_drags_and_text(generator):
    image = np.random.default_rng(2).integers(0, 255, (2, HEIGHT, WIDTH, 3), np.uint8)
    points = np.zeros((2, 2, FRAMES, 2), np.float32) + 8
    points[:, 0, :, 0] += np.arange(FRAMES) * 3
    state = np.ones((2, 2, FRAMES), np.uint8)
    first = generator.generate(image, points, state, ["red", "red"], seed=3)
    assert np.array_equal(first, generator.generate(image, points, state, ["red", "red"], seed=3))
    for other in (
        generator.generate(image, points, state, ["red", "red"], seed=4),
        generator.generate(image, points + 4, state, ["red", "red"], seed=3),
        generator.generate(image, points, state, ["blue", "blue"], seed=3),
        generator.generate(image, None, None, ["red", "red"], seed=3),
    ):
        assert not np.array_equal(first, other)


def test_a_saved_model_samples_as_before(generator, tmp_path):
    save_model(Model(generator.params, generator.config, ""), tmp_path / "m", dtype="float32")
    image = np.full((1, HEIGHT, WIDTH, 3), 90, np.uint8)
    again = Generator.load(tmp_path / "m")
    assert np.array_equal(generator.generate(image), again.generate(image))


def test_weights_are_held_in_the_type_asked_for(generator, tmp_path):
    save_model(Model(generator.params, generator.config, ""), tmp_path / "m", dtype="float32")
    loaded = Generator.load(tmp_path / "m", param_dtype="bfloat16", dtype="bfloat16")
    types = {part: {leaf.dtype for leaf in jax.tree.leaves(p)} for part, p in loaded.params.items()}
    assert types.pop("latents") == {np.dtype("float32")}
    assert set().union(*types.values()) == {np.dtype("bfloat16")}
    assert loaded.model.dtype == np.dtype("bfloat16")


def test_the_sampler_adds_updates_in_and_decodes_as_configured(generator):
    """Low-rank updates apart give the video of their sum; fewer frames per call another one."""
    image = np.random.default_rng(5).integers(0, 255, (1, HEIGHT, WIDTH, 3), np.uint8)
    updates = init_lora(jax.random.key(2), {"unet": generator.params["unet"]}, 2)
    updates = jax.tree.map(lambda a: a + 0.1, updates)
    apart = generator.params | {"lora": updates}

    def video(params, **sampling):
        config = generator.config.copy_and_resolve_references()
        config.sampling.update(steps=1, **sampling)
        return Generator(Model(params, config, "test")).generate(image).astype(int)

    summed = video(merge_lora(apart))
    assert np.abs(video(apart) - summed).max() <= 1  # rounded to grey levels
    assert np.abs(video(generator.params) - summed).max() > 5
    assert np.abs(video(merge_lora(apart), decode_frames=1) - summed).max() > 1


def test_checkpoints_that_cannot_be_used_are_told(generator, tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load_model(tmp_path / "none")
    with pytest.raises(UserError):
        load_model(tmp_path)
    path = save_model(Model(generator.params, generator.config, ""), tmp_path / "m")
    (tmp_path / "m" / WEIGHTS).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="no whole .safetensors file.*copy it again"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "wrong",
    [
        dict(image=np.zeros((1, 8, 8, 3), np.uint8)),
        dict(points=np.zeros((1, 1, FRAMES + 1, 2)), state=np.ones((1, 1, FRAMES + 1))),
        dict(strength=0.0),
    ],
)
def test_arrays_of_another_shape_are_refused(generator, wrong):
    given = dict(image=np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)) | wrong
    with pytest.raises(ValueError, match="expected|strength"):
        generator.generate(**given)
