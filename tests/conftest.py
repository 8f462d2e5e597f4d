"""What all tests share: the device they run on and the programs they have compiled before."""

import os

import pytest

# Before anything imports jax: tests are about what is computed, and the CPU is always there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling, and what is compiled runs once or twice on tiny arrays.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs between runs, for the workers and for programs the tests start.

    Compiling is most of what these tests do. A kept program is the very one that was compiled, so
    bit-exactness is tested as well as without. `make clean` forgets them.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
