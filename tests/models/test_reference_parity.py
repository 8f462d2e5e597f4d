"""All that `python -m nuwa_jax.golden` compares, where the original code's arrays are at hand.

They are 24 MB and not part of the repository (`test_reference_blocks.py` needs none of them).
"""

import pathlib

import numpy as np
import pytest
from golden_checks import check_items

from nuwa_jax.convert.rules import CLIP, clip_rows, to_state
from nuwa_jax.golden.model import Golden
from nuwa_jax.golden.run import CHECKS, run_checks

GOLDEN = pathlib.Path(__file__).parents[3] / "shared" / "golden" / "small"
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "weights.safetensors").is_file(),
    reason=f"the reference's arrays are not at {GOLDEN}",
)
SLOW = ("unet_taps", "sampler", "e2e")


@pytest.fixture(scope="module")
def golden():
    return Golden(GOLDEN)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CHECKS]
)
def test_equals_the_reference(golden, name):
    check_items(run_checks(golden, [name]))


def test_names_read_backwards(golden):
    """The table gives back every array of CLIP's image tower, bit for bit."""
    params = golden.params("image_encoder")["image_encoder"]
    back = to_state(params, clip_rows(golden.model.image_encoder))
    theirs = {name: value for name, value in golden.state.items() if name.startswith(CLIP)}
    assert back.keys() == theirs.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
