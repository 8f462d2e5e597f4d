import json

import pytest

from nuwa_jax.watching.goodput import Goodput


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make(tmp_path, clock, wall=None):
    return Goodput(tmp_path / "goodput.json", clock=clock, wall=wall or clock)


def test_every_second_is_in_one_phase(tmp_path):
    clock = Clock()
    goodput = make(tmp_path, clock)
    clock.now += 1  # other
    with goodput.phase("step"):
        clock.now += 10
        with goodput.phase("checkpoint"):
            clock.now += 4
        with goodput.phase("compile"):
            clock.now += 3
        with goodput.waiting(lambda: False):
            clock.now += 2
        with goodput.waiting(lambda: True):
            clock.now += 5  # the device works meanwhile
    seconds = goodput.seconds
    assert seconds == {
        **{"step": 15, "data": 2, "checkpoint": 4, "evaluation": 0, "compile": 3, "other": 1},
        "lost": 0,
    }
    assert goodput.share == pytest.approx(15 / 25)
    assert str(goodput) == (
        "goodput 60% of 0:25: step 0:15, data 0:02, checkpoint 0:04, compile 0:03, other 0:01"
    )


def test_steps_after_the_checkpoint_that_is_gone_on_from_are_lost(tmp_path):
    clock = Clock()
    goodput = make(tmp_path, clock)
    with goodput.phase("step"):
        clock.now += 10
        goodput.saving((0, 10))
        clock.now += 10
        goodput.saving((0, 20))
        clock.now += 6
        goodput.note()
        clock.now += 3  # killed here: nobody knows of these
    killed, clock.now = clock.now, clock.now + 100
    assert killed == 29
    again = make(tmp_path, clock)
    again.resume((0, 20))
    assert (again.seconds["step"], again.seconds["lost"]) == (20, 6)
    assert (again.down, again.starts) == (103, 2)
    again.resume((0, 20))  # the next stage begins: nothing more is lost
    assert again.seconds["lost"] == 6
    # The checkpoint before that one, where the newest is damaged.
    again = make(tmp_path, clock)
    again.resume((0, 10))
    assert (again.seconds["step"], again.seconds["lost"]) == (10, 16)
    assert "lost 0:16; 2 starts, down 1:43" in str(again)


def test_without_a_checkpoint_all_steps_are_lost(tmp_path):
    clock = Clock()
    goodput = make(tmp_path, clock)
    with goodput.phase("step"):
        clock.now += 7
    goodput.note()
    again = make(tmp_path, clock)
    again.resume(None)
    assert (again.seconds["step"], again.seconds["lost"], again.share) == (0, 7, 0)


def test_a_later_stage_keeps_the_steps_of_those_before(tmp_path):
    clock = Clock()
    goodput = make(tmp_path, clock)
    with goodput.phase("step"):
        clock.now += 5
        goodput.saving((0, 100))
        clock.now += 2
        goodput.note()
    again = make(tmp_path, clock)
    again.resume((0, 100))  # the second stage had no checkpoint yet
    assert (again.seconds["step"], again.seconds["lost"]) == (5, 2)


@pytest.mark.parametrize("text", ["", '{"seconds": {}}', "[]", "half of it"])
def test_a_file_that_cannot_be_read_is_moved_aside_and_told(tmp_path, caplog, text):
    clock, file = Clock(), tmp_path / "goodput.json"
    file.write_text(text)
    with caplog.at_level("WARNING", logger="absl"):
        goodput = make(tmp_path, clock)
    assert "goodput.json.damaged now" in caplog.text
    assert (tmp_path / "goodput.json.damaged").read_text() == text and not file.exists()
    assert goodput.starts == 1 and goodput.down == 0
    with goodput.phase("step"):
        clock.now += 5
    goodput.note()
    again = make(tmp_path, clock)
    assert again.starts == 2 and again.seconds["step"] == 5


def test_half_of_a_file_counts_for_nothing(tmp_path):
    clock, file = Clock(), tmp_path / "goodput.json"
    goodput = make(tmp_path, clock)
    with goodput.phase("step"):
        clock.now += 5
    goodput.note()
    found = json.loads(file.read_text())
    del found["checkpoints"]
    file.write_text(json.dumps(found))
    assert sum(make(tmp_path, clock).seconds.values()) == 0
