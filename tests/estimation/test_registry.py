import importlib.metadata
import subprocess
import sys

import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.estimation import BACKENDS, load_estimators, package_versions
from nuwa_jax.estimation.registry import PACKAGES


def test_the_default_needs_no_weights_and_no_jax():
    program = (
        "import sys; from nuwa_jax.estimation import load_estimators; "
        "print(*[each.name for each in load_estimators('lk_dis')], 'jax' in sys.modules, sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    tracker, flow, has_jax = run.stdout.splitlines()
    assert tracker.startswith("opencv-lk") and flow.startswith("opencv-dis")
    assert has_jax == "False"


def test_unknown_backends_and_superfluous_weights_are_named():
    with pytest.raises(UserError, match=r"'raft'.*lk_dis"):
        load_estimators("raft")
    with pytest.raises(UserError, match=r"no weights.*model\.safetensors"):
        load_estimators("lk_dis", "model.safetensors")


def test_versions_that_learned_backends_depend_on_are_told():
    assert PACKAGES.keys() == BACKENDS.keys()
    assert package_versions("lk_dis") == {}
    assert package_versions("gmflow_x2")["jaxlib"] == importlib.metadata.version("jaxlib")
    assert package_versions("tapir")["tapnet"]  # installed or not
