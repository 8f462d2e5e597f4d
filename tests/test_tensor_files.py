"""Our files of arrays and those of the format's own library, either way round."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nuwa_jax.errors import UserError
from nuwa_jax.tensor_files import (
    JoinedSource,
    MemorySource,
    SafetensorsFile,
    Spec,
    write_safetensors,
)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a/kernel": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=(2, 1, 3)).astype(np.float16),
        "one": np.array(2.5, np.float64),
        "none": np.zeros((0, 4), np.float32),
        "index": np.arange(5),
    }


def specs_of(arrays):
    return {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_the_library_reads_what_we_write(arrays, tmp_path):
    write_safetensors(tmp_path / "f", specs_of(arrays), arrays.items(), {"format": "pt"})
    assert_same(load_file(tmp_path / "f"), arrays)
    assert SafetensorsFile(tmp_path / "f").metadata == {"format": "pt"}


def test_we_read_what_the_library_writes(arrays, tmp_path):
    save_file(arrays, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    assert file.specs == specs_of(arrays)
    assert_same({name: file.read(name) for name in file.specs}, arrays)


def test_rows_of_a_larger_array_are_written_as_they_are(tmp_path):
    whole = np.arange(12.0).reshape(3, 4).T  # not contiguous
    write_safetensors(tmp_path / "f", {"a": Spec((4, 3), whole.dtype)}, [("a", whole)])
    np.testing.assert_array_equal(load_file(tmp_path / "f")["a"], whole)


@pytest.mark.parametrize("fault", ["order", "shape", "dtype", "missing"])
def test_what_was_not_announced_is_refused_and_leaves_no_file(arrays, tmp_path, fault):
    given = list(arrays.items())
    if fault == "order":
        given[:2] = given[1::-1]
    elif fault == "shape":
        given[0] = ("a/kernel", given[0][1].T)
    elif fault == "dtype":
        given[0] = ("a/kernel", given[0][1].astype(np.float64))
    else:
        given.pop()
    with pytest.raises(ValueError, match=r"expected a/kernel|index and perhaps more"):
        write_safetensors(tmp_path / "f", specs_of(arrays), given)
    assert not list(tmp_path.iterdir())


def test_sources_are_joined_by_prefix(arrays):
    joined = JoinedSource([("x/", MemorySource(arrays)), ("y/", MemorySource(arrays))])
    assert len(joined.specs) == 2 * len(arrays)
    np.testing.assert_array_equal(joined.read("y/b"), arrays["b"])
    with pytest.raises(UserError, match="two files hold b"):
        JoinedSource([("", MemorySource(arrays)), ("", MemorySource({"b": arrays["b"]}))])
