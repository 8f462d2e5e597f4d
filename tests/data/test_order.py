"""The same global order however the work is divided: hosts, threads, workers, batches, restarts."""

import dataclasses
import time

import jax
import numpy as np
import pytest
from prepared_clips import SMALL, assert_equal, captions, joined, make_clips, take

from nuwa_jax.data.device import to_device
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.data.records import RecordError

COUNT = 24  # elements that are compared


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Scenes and records of two folders, mirrored now and then."""
    folders = [
        make_clips(tmp_path_factory.mktemp(name), count=count, name=name)
        for name, count in (("one", 5), ("two", 7))
    ]
    sources = [{"path": folders[1], "weight": 2.0}]
    return dataclasses.replace(
        SMALL,
        clips=folders[0],
        clips_weight=1.0,
        scenes_weight=1.0,
        sources=type(SMALL).from_config({"sources": sources}).sources,
        flip_probability=0.5,
    )


@pytest.fixture(scope="module")
def reference(config):
    """The stream made one element after another."""
    return joined(take(config, COUNT, batch_size=1, with_flow=True))


def draw(config, hosts, *, batch_size, start=0, stop=COUNT, transfer=None):
    """Elements `start` to `stop` as the hosts' batches, and the state after them."""
    streams = [
        make_batches(
            config,
            seed=7,
            batch_size=batch_size,
            start_index=start,
            shard=host,
            num_shards=hosts,
            with_flow=True,
            transfer=transfer,
        )
        for host in range(hosts)
    ]
    drawn = [next(stream) for _ in range((stop - start) // batch_size) for stream in streams]
    states = {stream.next_index for stream in streams}
    for stream in streams:
        stream.close()
    (state,) = states
    return drawn, state


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_order_does_not_depend_on_hosts_nor_threads(config, reference, hosts, threads):
    drawn, state = draw(dataclasses.replace(config, threads=threads), hosts, batch_size=4)
    assert_equal(joined(drawn), reference)
    assert state == COUNT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_restart_at_a_random_step_with_another_batch_goes_on_exactly(
    config, reference, hosts, seed
):
    rng = np.random.default_rng(seed)
    threads, steps = (int(n) for n in rng.integers([3, COUNT // 4]))
    before, state = draw(
        dataclasses.replace(config, threads=threads), hosts, batch_size=4, stop=4 * steps
    )
    # The other hosts' batch divides what is left, whatever the step.
    after, _ = draw(config, 1 if hosts == 4 else 2, batch_size=2, start=state)
    assert_equal(joined([*before, *after]), reference)


def test_order_does_not_depend_on_worker_processes(config, reference):
    with_workers = dataclasses.replace(config, workers=2, threads=1, prefetch=4)
    # Compared after the workers have gone, with whom they shared the memory of their batches.
    before, state = draw(with_workers, 1, batch_size=4, stop=8, transfer=to_device)
    after, _ = draw(dataclasses.replace(with_workers, threads=0), 1, batch_size=4, start=state)
    assert_equal(joined([*before, *after]), reference)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_ahead_on_the_device_do_not_count_as_drawn(config, reference, ahead):
    config = dataclasses.replace(config, threads=2, prefetch_to_device=ahead)
    before, state = draw(config, 1, batch_size=2, stop=10, transfer=to_device)
    assert all(isinstance(batch.video, jax.Array) for batch in before)
    assert state == 10
    after, _ = draw(config, 1, batch_size=2, start=state, transfer=to_device)
    assert_equal(joined([*before, *after]), reference)


def test_the_next_batch_is_on_the_device_before_it_is_asked_for(config):
    moved = []

    def transfer(batch):
        moved.append(batch)
        return to_device(batch)

    config = dataclasses.replace(config, prefetch_to_device=2)
    batches = make_batches(config, seed=7, batch_size=2, num_batches=6, transfer=transfer)
    for drawn in range(1, 4):
        next(batches)
        deadline = time.monotonic() + 60  # another thread makes them
        while len(moved) < drawn + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(moved) >= drawn + 2
    batches.close()


def test_a_stream_of_so_many_batches_ends_after_them(config, reference):
    batches = make_batches(config, seed=7, batch_size=4, num_batches=3, with_flow=True)
    drawn = list(batches)
    assert len(drawn) == 3
    assert_equal(joined(drawn), type(reference)(*(a if a is None else a[:12] for a in reference)))


def test_damage_is_told_the_same_through_workers_and_stops_the_run(tmp_path):
    def cut(record, scene):
        del scene
        damaged = int(record.source_id) % 2
        return dataclasses.replace(
            record, video=record.video[:200] if damaged else record.video, content_hash=""
        )

    folder = make_clips(tmp_path / "clips", count=6, change=cut)
    config = dataclasses.replace(SMALL, clips=folder, clips_weight=1.0, scenes_weight=0.0)
    counts = {}
    for workers in (0, 2):
        batches = make_batches(
            dataclasses.replace(config, workers=workers), seed=1, batch_size=4, num_batches=6
        )
        names = [name for batch in batches for name in captions(batch)]
        assert set(names) == {"clip 0", "clip 2", "clip 4"}
        counts[workers] = batches.num_replaced
        batches.close()
    assert counts[0] == counts[2] == 12  # half of four epochs

    batches = make_batches(config, seed=1, batch_size=4)
    with pytest.raises(RecordError, match=r"1\d of 3\d records .* record 1 of .*; record 3 of"):
        while True:
            next(batches)
    batches.close()
    patient = dataclasses.replace(config, max_replaced_share=0.9)
    assert len(take(patient, 20, batch_size=4)) == 20
