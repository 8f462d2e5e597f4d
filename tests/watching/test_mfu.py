import jax
import jax.numpy as jnp
import pytest

from nuwa_jax.errors import UserError
from nuwa_jax.watching.mfu import Mfu, peak_of


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_peaks_of_known_devices(kind, flops):
    assert peak_of(kind).flops == flops


def test_a_peak_from_the_config_goes_before_the_table():
    assert peak_of("TPU v4", 1e12).flops == 1e12
    assert peak_of("abacus") is None
    with pytest.raises(UserError, match="train.peak_flops"):
        peak_of("TPU v4", -1.0)


def test_mfu_is_the_share_of_the_peak_that_the_model_needs():
    x = jnp.zeros((4, 8))
    devices = jax.devices()[:1] * 4
    mfu = Mfu.of_step(lambda a, b: a @ b, x, x.T, devices=devices, given=1000.0)
    assert mfu.step_flops == 2 * 4 * 4 * 8
    assert mfu.of(0.5) == pytest.approx(256 / (0.5 * 4 * 1000))
    told = str(mfu)
    assert "model FLOPs per step / (step seconds x devices x peak)" in told
    assert "256 FLOP per step" in told and "4 x cpu at 1 kFLOP/s (train.peak_flops)" in told


def test_where_no_peak_is_known_no_mfu_is_made_up():
    mfu = Mfu.of_step(lambda a: a @ a, jnp.zeros((4, 4)), devices=jax.devices()[:1])
    assert mfu.of(1.0) is None
    assert "no peak is known of 'cpu', give it with --config.train.peak_flops" in str(mfu)


def test_where_flops_cannot_be_counted_the_reason_is_told():
    def endless(a):
        return jax.lax.while_loop(lambda b: b.sum() > 0, lambda b: b @ b, a)

    mfu = Mfu.of_step(endless, jnp.zeros((4, 4)), devices=jax.devices()[:1], given=1.0)
    assert mfu.of(1.0) is None and "while loop" in str(mfu)
