import jax
import jax.numpy as jnp
import pytest

from nuwa_jax.parallel.padding import padding_waste
from nuwa_jax.watching.flops import products


def waste(fn, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return padding_waste(products(jax.make_jaxpr(fn)(*args).jaxpr))


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_widths_that_are_multiples_waste_nothing():
    assert waste(jnp.matmul, (4096, 384), (384, 1152))["weights"].share == 0
    assert waste(conv, (1, 34, 34, 128), (3, 3, 128, 256))["weights"].share == 0


@pytest.mark.parametrize(
    ("rows", "inside", "out", "share"),
    [
        (4096, 320, 320, (384 / 320) ** 2 - 1),
        (4096, 320, 1280, 384 / 320 - 1),
        (321, 128, 128, 7 / 321),
    ],
)
def test_a_product_is_filled_to_whole_tiles(rows, inside, out, share):
    found = waste(jnp.matmul, (rows, inside), (inside, out))["weights"]
    assert found.flops == 2 * rows * inside * out
    assert found.share == pytest.approx(share)


def test_a_convolution_and_its_gradients_waste_the_same():
    x, w = (2, 34, 34, 320), (3, 3, 320, 640)
    share = 384 / 320 - 1
    assert waste(conv, x, w)["weights"].share == pytest.approx(share)
    for argument in (0, 1):
        grad = jax.grad(lambda *args: jnp.sum(conv(*args).astype(jnp.float32)), argument)
        assert waste(grad, x, w)["weights"].share == pytest.approx(share)


def test_batched_products_are_told_apart():
    found = waste(lambda q, k: jnp.einsum("bqd,bkd->bqk", q, k), (6, 256, 64), (6, 512, 64))
    assert found["weights"].flops == 0
    assert found["attention"].share == 1
