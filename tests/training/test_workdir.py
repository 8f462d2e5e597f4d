import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nuwa_jax.training import workdir as workdir_module
from nuwa_jax.training.workdir import Workdir


class Bucket(MemoryFileSystem):
    """A bucket in memory; `meanwhile` happens while a file is being sent."""

    cachable = False
    store, pseudo_dirs = {}, [""]
    meanwhile = staticmethod(lambda name: None)

    def put_file(self, source, target, **options):
        self.meanwhile(target.rpartition("/")[2])
        super().put_file(source, target, **options)


@pytest.fixture
def bucket(monkeypatch):
    Bucket.store.clear()
    made = Bucket()
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (made, "/bucket/run"))
    return made


def open_run():
    return Workdir("gs://bucket/run")


def test_what_is_about_to_replace_a_file_is_not_copied(bucket):
    run = open_run()
    (run.local / "goodput.json").write_text("whole")
    (run.local / "goodput.part").write_text("half")
    run.close()
    assert bucket.find("/bucket") == ["/bucket/run/goodput.json"]


def test_a_file_that_vanishes_while_another_is_sent_is_left_out(bucket):
    run = open_run()
    for name in "abc":
        (run.local / name).write_text(name)
    bucket.meanwhile = lambda name: (run.local / "b").unlink(missing_ok=True)
    run.close()
    assert bucket.find("/bucket") == ["/bucket/run/a", "/bucket/run/c"]


def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_was_and_again_later(bucket):
    run = open_run()
    metrics = run.local / "metrics.jsonl"
    metrics.write_text("one\n")

    def grow(name):
        with metrics.open("a") as file:
            file.write("two\n")

    bucket.meanwhile = grow
    run.copy()
    assert bucket.cat("/bucket/run/metrics.jsonl") == b"one\n"
    bucket.meanwhile = lambda name: None
    run.copy()
    assert bucket.cat("/bucket/run/metrics.jsonl") == b"one\ntwo\n"
    bucket.meanwhile = lambda name: pytest.fail(f"{name} has not changed")
    run.close()


def test_no_more_is_sent_than_a_file_had_when_it_was_looked_at(bucket, monkeypatch):
    run = open_run()
    metrics = run.local / "metrics.jsonl"
    metrics.write_text("one\n")
    looked = workdir_module.os.fstat

    def grows_after(descriptor):
        found = looked(descriptor)
        with metrics.open("a") as file:
            file.write("two\n")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(workdir_module.os, "fstat", grows_after)
        run.copy()
    assert bucket.cat("/bucket/run/metrics.jsonl") == b"one\n"
    run.close()
    assert bucket.cat("/bucket/run/metrics.jsonl") == b"one\ntwo\n"


def test_a_run_that_goes_on_adds_to_what_is_there_and_leaves_no_scratch(bucket):
    run = open_run()
    (run.local / "metrics.jsonl").write_text("one\n")
    run.close()
    again = open_run()
    assert (again.local / "metrics.jsonl").read_text() == "one\n"
    scratch = again.local.parent
    again.close()
    assert not scratch.exists()
