import uuid

import pytest

from nuwa_jax.data.storage import Folder
from nuwa_jax.errors import UserError


@pytest.fixture(params=["path", "file", "memory"])
def folder(request, tmp_path):
    """A folder on the disk, and what fsspec does with one that it reaches by a URL."""
    urls = {
        "path": str(tmp_path / "a folder"),
        "file": f"file://{tmp_path}/a folder",
        "memory": f"memory://{uuid.uuid4().hex}/a folder",
    }
    made = Folder(urls[request.param])
    made.make()
    return made


def test_files_appear_complete_or_not_at_all(folder):
    with folder.writing("a.txt") as path:
        path.write_text("complete")
        assert folder.size("a.txt") == -1
    assert folder.read_text("a.txt") == "complete" and folder.size("a.txt") == 8
    with pytest.raises(KeyboardInterrupt), folder.writing("b.txt") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert list(folder.walk()) == ["a.txt"]
    with folder.writing("a.txt") as path:
        path.write_text("new")
    assert folder.read_text("a.txt") == "new"


def test_files_are_listed_read_moved_and_removed(folder):
    below = folder / "below"
    below.make()
    for where, name in ((folder, "b.mp4"), (folder, "a.mp4"), (below, "c.mp4")):
        where.write_text(name, f"in {name}")
    assert list(folder.walk()) == ["a.mp4", "b.mp4", "below/c.mp4"]
    assert folder.list("*.mp4") == ["a.mp4", "b.mp4"]
    assert folder.exists() and not (folder / "nowhere").exists()
    assert folder.size("below/c.mp4") == 8 and folder.size("below") == -1
    with folder.reading("below/c.mp4") as path:
        assert path.read_text() == "in c.mp4" and path.suffix == ".mp4"
    below.move("c.mp4", folder, "d.mp4")
    assert folder.read_text("d.mp4") == "in c.mp4" and below.size("c.mp4") == -1
    folder.remove("d.mp4")
    folder.remove("d.mp4")
    assert folder.read_text("d.mp4") is None
    folder.write_text(".a.mp4.1234.tmp", "left behind")
    folder.remove_temporary()
    assert list(folder.walk()) == ["a.mp4", "b.mp4"]


def test_names_that_no_disk_can_hold_are_of_no_file(tmp_path):
    folder = Folder(tmp_path)
    folder.write_text("a.mp4", "a file")
    for name in ("a" * 300 + ".mp4", "a.mp4/b.mp4"):
        assert folder.size(name) == -1


def test_unknown_places_are_the_users_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be reached"):
        Folder("nonsense://bucket/folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Folder(tmp_path / "file" / "below").make()
