import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from prepared_clips import make_clips

from nuwa_jax.data.records import RecordReader, shard_name
from nuwa_jax.data.tokenizer import encode_text
from nuwa_jax.data.video import read_video
from nuwa_jax.errors import UserError
from nuwa_jax.generation.precompute import PLAN, precompute
from nuwa_jax.generation.weights import Model
from nuwa_jax.models.video_ldm import VideoLDM, to_float
from nuwa_jax.training.precomputed import check_encoders, encoder_hashes


class Encoders:
    """A model whose latents are each frame's corner, and whose text features are the bytes."""

    def latent_shape(self, height, width, frames):
        if height % 4:
            raise UserError("height must be a multiple of 4")
        return frames, height // 4, width // 4, 3

    def encode(self, params, video):
        assert video.shape[1] == 1  # one frame at a time
        return video[:, :, ::4, ::4] * params["latents"]["scale"]

    def encode_text(self, params, text):
        return jnp.asarray(text, jnp.float32)[..., None] * params["text"]["scale"]


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    monkeypatch.setattr(VideoLDM, "from_config", lambda config: Encoders())


@pytest.fixture
def records(tmp_path):
    return make_clips(tmp_path / "clips", count=5, frames=9, height=16, width=24, shards=3)


def make_model(scale=2.0):
    params = {
        "autoencoder": {"encoder": {"kernel": np.ones(2, np.float32)}},
        "latents": {"scale": np.float32([scale])},
        "text": {"scale": np.float32(0.5)},
    }
    config = ConfigDict({"model": {"text": {}}, "data": {"text_length": 7}})
    return Model(jax.tree.map(jnp.asarray, params), config, "here")


def test_records_get_what_the_encoders_make_of_them(records, tmp_path):
    model = make_model()
    counts = precompute(model, records, tmp_path / "out")
    assert counts == {"records": 5, "left_out": 0, "complete": True}
    before, after = RecordReader(records), RecordReader(tmp_path / "out")
    assert after.manifest["encoders"] == encoder_hashes(model.params)
    assert after.fingerprint != before.fingerprint
    for index in range(5):
        old, new = before.read(index), after.read(index)
        video, _ = read_video(old.video)
        np.testing.assert_allclose(
            new.latents, 2 * to_float(video)[:, ::4, ::4], atol=2e-3, rtol=1e-3
        )
        text = encode_text(old.caption, 7)[:, None] * 0.5
        np.testing.assert_array_equal(new.text_embedding, text)
        empty = dict(latents=None, text_embedding=None)
        for field in ("source_id", "caption", "video", "fps", "frames", "content_hash"):
            assert getattr(dataclasses.replace(new, **empty), field) == getattr(old, field)
        np.testing.assert_array_equal(new.tracks.state, old.tracks.state)


def test_text_and_videos_can_be_left_out(records, tmp_path):
    precompute(make_model(), records, tmp_path / "out", with_text=False, keep_video=False)
    reader = RecordReader(tmp_path / "out")
    assert set(reader.manifest["encoders"]) == {"autoencoder"}
    record = reader.read(0)
    assert record.video == b"" and record.text_embedding is None
    assert record.latents.shape == (9, 4, 6, 3)


def test_shards_made_apart_and_a_second_run_give_the_same_folder(records, tmp_path):
    model = make_model()
    precompute(model, records, tmp_path / "whole")
    out = tmp_path / "parts"
    counts = precompute(model, records, out, shards=slice(0, 1))
    assert counts == {"records": 2, "left_out": 0, "complete": False}
    assert not (out / "manifest.json").exists()
    kept = (out / shard_name(0, 3)).stat().st_mtime_ns
    assert precompute(model, records, out, shards=slice(1, None))["complete"]
    assert (out / shard_name(0, 3)).stat().st_mtime_ns == kept
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_machines_that_begin_at_once_agree_on_one_plan(records, tmp_path, monkeypatch):
    model, out = make_model(), tmp_path / "out"
    precompute(model, records, out, shards=slice(0, 1))
    plan = out / PLAN
    written, number = plan.stat().st_mtime_ns, plan.stat().st_ino
    precompute(model, records, out, shards=slice(1, 2))
    # What another machine may be reading is not written again.
    assert (plan.stat().st_mtime_ns, plan.stat().st_ino) == (written, number)

    # Another machine begins between this one's look at the folder and its own plan.
    late = tmp_path / "late"
    listed = Path.iterdir

    def iterdir(path):
        if path == late and not (late / PLAN).exists():
            found = list(listed(path))
            (late / PLAN).write_text(plan.read_text())
            (late / shard_name(0, 3)).write_bytes((out / shard_name(0, 3)).read_bytes())
            return iter([*found, late / ".precompute.json.0123.tmp", late / shard_name(0, 3)])
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert precompute(model, records, late)["complete"]
    with pytest.raises(UserError, match="begun with another model"):
        precompute(make_model(scale=3.0), records, late)


def test_damaged_records_are_told_counted_and_left_out(tmp_path, capsys):
    def change(record, scene):
        bad = record.source_id in ("1", "3")
        return dataclasses.replace(
            record, video=record.video[: 200 if bad else None], content_hash=""
        )

    options = dict(count=6, frames=5, height=16, width=24, shards=3)
    records = make_clips(tmp_path / "clips", change=change, **options)
    out, model = tmp_path / "out", make_model()
    with pytest.raises(UserError, match=r"1 of 6 records cannot be read \(record 1 of .*00000-of"):
        precompute(model, records, out)
    assert not list(out.glob("clips-*"))
    with pytest.raises(UserError, match="2 of 6 records .* --max_damaged than 0.2"):
        precompute(model, records, out, max_damaged=0.2)
    kept = (out / shard_name(0, 3)).stat().st_mtime_ns
    capsys.readouterr()
    counts = precompute(model, records, out, max_damaged=0.4)
    assert counts == {"records": 4, "left_out": 2, "complete": True}
    assert (out / shard_name(0, 3)).stat().st_mtime_ns == kept
    assert f"left out: record 1 of {shard_name(1, 3)} cannot be read" in capsys.readouterr().out
    reader = RecordReader(out)
    assert [reader.read(i).source_id for i in range(len(reader))] == ["0", "2", "4", "5"]
    assert (reader.manifest["records"], reader.manifest["left_out"]) == (4, 2)
    listed = json.loads((out / "left_out" / f"{shard_name(0, 3)}.json").read_text())
    assert list(listed) == ["1"]


def test_what_does_not_fit_is_told(records, tmp_path):
    out = tmp_path / "out"
    precompute(make_model(), records, out)
    with pytest.raises(UserError, match="begun with another model"):
        precompute(make_model(scale=3.0), records, out)
    with pytest.raises(UserError, match="begun with another model"):
        precompute(make_model(), records, out, keep_video=False)
    with pytest.raises(UserError, match="holds other files"):
        precompute(make_model(), records, tmp_path)
    odd = make_clips(tmp_path / "odd", count=1, height=18, width=24)
    with pytest.raises(UserError, match="multiple of 4"):
        precompute(make_model(), odd, tmp_path / "odd_out")


def test_latents_of_another_model_are_refused():
    ours, other = make_model().params, make_model(scale=3.0).params
    made = encoder_hashes(ours)
    assert json.dumps(made)
    check_encoders(ours, [made, {}])
    with pytest.raises(UserError, match="another autoencoder than"):
        check_encoders(other, [made])
    without = {name: part for name, part in ours.items() if name != "text"}
    assert set(encoder_hashes(without)) == {"autoencoder"}
    with pytest.raises(UserError, match="another text than"):
        check_encoders(without, [made])
