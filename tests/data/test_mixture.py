import collections
import dataclasses
import json
import resource
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from prepared_clips import SMALL, captions, joined, make_clips, take

from nuwa_jax.data.config import DataConfig, SourceConfig
from nuwa_jax.data.mixture import place, shares
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.errors import UserError


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.3, 0.7], [5, 1, 2.5], [1e-3, 1, 1, 1]])
def test_every_source_gets_its_share_evenly_and_none_of_its_clips_twice(weights):
    parts = shares(weights)
    placed = [place(index, parts) for index in range(4000)]
    total = sum(weights)
    for source, weight in enumerate(weights):
        numbers = [number for s, number in placed if s == source]
        assert numbers == list(range(len(numbers)))
        came = np.cumsum([s == source for s, _ in placed])
        expected = np.arange(1, 4001) * weight / total
        # A source after n others is spread over what their rounding leaves.
        assert np.abs(came - expected).max() <= len(weights)


def test_places_far_out_are_as_exact_as_near():
    parts = shares([1, 2, 4])
    start = (1 << 47) // 7 * 7  # whole rounds of the weights
    near, far = ([place(base + i, parts) for i in range(70)] for base in (0, start))
    assert [source for source, _ in near] == [source for source, _ in far]
    counts = collections.Counter(source for source, _ in near)
    assert counts == {0: 10, 1: 20, 2: 40}
    for (source, number), (_, later) in zip(near, far, strict=True):
        assert later == number + start // 7 * [1, 2, 4][source]


def test_clips_of_all_folders_come_in_proportion_and_each_once_an_epoch(tmp_path):
    folders = {name: make_clips(tmp_path / name, count=4, name=name) for name in ("a", "b", "c")}
    config = dataclasses.replace(
        SMALL,
        clips=folders["a"],
        clips_weight=1.0,
        scenes_weight=0.0,
        sources=(
            SourceConfig("records", folders["b"], 2.0),
            SourceConfig("records", folders["c"], 1.0),
        ),
    )
    names = captions(joined(take(config, 4, batch_size=4)))
    counts = collections.Counter(names)
    assert {name: counts[f"{name} {i}"] for name in "abc" for i in range(4)} == dict(a=1, b=2, c=1)
    assert len(counts) == 12
    orders = [[n.split()[1] for n in names if n.startswith(name)][:4] for name in "abc"]
    assert len(set(map(tuple, orders))) > 1, "each folder should have an order of its own"
    one = dataclasses.replace(config, sources=())
    prints = {make_batches(c, seed=0, batch_size=1).fingerprint for c in (config, one)}
    assert len(prints) == 2


def test_sources_are_read_from_a_config_and_faults_are_named():
    source = {"kind": "records", "path": "folder", "weight": 3}
    data = DataConfig.from_config(ConfigDict({"sources": (source,), "scenes_weight": 0.0}))
    assert data.mixed_sources() == (SourceConfig("records", "folder", 3),)
    for sources, message in (
        ("folder", "list of mappings"),
        (("folder",), "list of mappings"),
        ({"path": "folder"}, "list of mappings"),
        ([{"pth": "folder"}], r"data.sources\[0\].pth"),
        ([{"kind": "films", "path": "folder"}], "kind is one of"),
        ([{"kind": "records"}], "need a path"),
        ([{"kind": "scenes", "path": "folder"}], "scenes have none"),
        ([{"path": "folder", "weight": -1}], "weight is 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig.from_config({"sources": sources})


def test_other_entries_that_make_no_sense_are_named():
    for entries, message in (
        ({"flow_divisor": 3}, "flow_divisor 3 does not divide 64x64"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"workers": -1}, "data.workers"),
        ({"format": "jpeg"}, "data.format"),
        ({"format": "latents"}, "scenes have no latents"),
        (
            {"format": "latents", "scenes_weight": 0, "clips": "x", "clips_weight": 1}
            | {"flip_probability": 0.5},
            "cannot be mirrored",
        ),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig.from_config(entries)


def test_more_shards_than_files_may_be_open_are_refused_at_once(tmp_path, monkeypatch):
    folder = make_clips(tmp_path / "clips", count=6, shards=3)
    config = dataclasses.replace(SMALL, clips=folder, clips_weight=1.0)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (130, 200))
    with pytest.raises(UserError, match="3 shards.*130 files: run `ulimit -n 131`.*at most 200"):
        make_batches(config, seed=0, batch_size=1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (131, 200))
    make_batches(config, seed=0, batch_size=1).close()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    make_batches(config, seed=0, batch_size=1).close()


def test_folders_with_and_without_text_embeddings_do_not_mix(tmp_path):
    def make(name, **encoders):
        def change(record, scene):
            del scene
            text = np.zeros((3, 4), np.float16) if "text" in encoders else None
            latents = np.zeros((5, 3, 4, 2), np.float16)
            return dataclasses.replace(record, latents=latents, text_embedding=text)

        size = dict(frames=5, height=24, width=32)
        folder = make_clips(tmp_path / name, count=3, change=change, **size)
        manifest = tmp_path / name / "manifest.json"
        described = json.loads(manifest.read_text()) | {"encoders": encoders}
        manifest.write_text(json.dumps(described))
        return folder

    def first_batch(other):
        config = dataclasses.replace(
            SMALL,
            clips=make("both", autoencoder="1", text="2"),
            clips_weight=1.0,
            scenes_weight=0.0,
            format="latents",
            sources=(SourceConfig("records", other, 1.0),),
        )
        return take(config, 1)[0]

    assert first_batch(make("same", autoencoder="1", text="2")).text_embedding.shape == (2, 3, 4)
    bare = make("bare", autoencoder="1")
    with pytest.raises(
        UserError, match=r"both .* autoencoder and text, .*bare with autoencoder, so"
    ):
        first_batch(bare)
    # A manifest that says otherwise than its records are.
    manifest = Path(bare) / "manifest.json"
    lying = json.loads(manifest.read_text()) | {"encoders": {"autoencoder": "1", "text": "2"}}
    manifest.write_text(json.dumps(lying))
    with pytest.raises(UserError, match="some records have text_embedding and some have none"):
        first_batch(bare)
