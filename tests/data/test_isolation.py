import functools
import sys
from pathlib import Path

import pytest

from nuwa_jax.data.isolation import IsolatedPool, Lost
from nuwa_jax.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # workers import what is on the parent's path
import faulty  # noqa: E402


def setup(number=10):
    return functools.partial(faulty.adder, number)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_tasks(workers):
    with IsolatedPool(setup(), workers, 60) as pool:
        assert list(pool.map(range(40))) == [(n, n + 10) for n in range(40)]
        assert list(pool.map([])) == []


def test_dying_and_hanging_cost_the_task_and_nothing_else():
    with IsolatedPool(setup(), 2, 3) as pool:
        results = dict(pool.map([1, "crash", 2, "hang", 3]))
    assert [results[n] for n in (1, 2, 3)] == [11, 12, 13]
    assert isinstance(results["crash"], Lost) and results["crash"].reason == "crashed"
    assert "-11" in results["crash"].detail
    assert isinstance(results["hang"], Lost) and results["hang"].reason == "timeout"


def test_crash_that_was_not_the_tasks_fault_is_made_good(tmp_path):
    with IsolatedPool(setup(), 1, 60) as pool:
        assert [result for _, result in pool.map([tmp_path / "seen"])] == ["second try"]


def test_setup_that_fails_ends_the_run_and_not_task_after_task():
    with IsolatedPool(faulty.refuse, 1, 60) as pool, pytest.raises(UserError, match="weights"):
        list(pool.map([1, 2]))
    with IsolatedPool(faulty.cannot_start, 1, 60) as pool:
        with pytest.raises(RuntimeError, match="exit code 7 before its first task"):
            list(pool.map([1, 2]))


def test_processes_end_with_the_pool():
    with IsolatedPool(setup(), 1, 60) as pool:
        list(pool.map([1]))
        process = pool._processes[0]._process
        assert process.poll() is None
    assert process.poll() is not None
