import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nuwa_jax.watching.compile_cache import use_compile_cache


@pytest.fixture(autouse=True)
def no_cache():
    """JAX as it is without the cache that the tests share."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def kept(folder):
    return [path for path in folder.rglob("*") if "hypotenuse" in path.name]


def run():
    def hypotenuse(a, b):
        return jnp.sqrt(a * a + b * b)

    return float(jax.jit(hypotenuse)(3.0, 4.0))


def test_programs_are_kept_below_the_workdir(tmp_path):
    run()  # a program before it, without a cache
    place = use_compile_cache("compiled", below=tmp_path, min_seconds=0.0)
    assert place == str(tmp_path / "compiled")
    jax.clear_caches()
    assert run() == 5.0
    assert kept(tmp_path / "compiled")


def test_what_compiles_quickly_is_not_kept(tmp_path):
    use_compile_cache("compiled", below=tmp_path, min_seconds=3600.0)
    jax.clear_caches()
    assert run() == 5.0
    assert not kept(tmp_path)


def test_an_empty_folder_keeps_nothing_and_one_given_to_jax_stays(tmp_path):
    assert use_compile_cache("", below=tmp_path) == ""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    assert use_compile_cache("compiled", below=tmp_path) == str(tmp_path / "given")


def test_urls_stay_urls():
    assert use_compile_cache("gs://bucket/programs", below="run") == "gs://bucket/programs"


def test_a_folder_below_a_url_is_a_url():
    assert use_compile_cache("compiled", below="gs://bucket/run") == "gs://bucket/run/compiled"
