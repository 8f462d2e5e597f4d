"""Arithmetic that a matrix unit does on padding, because widths do not divide by its own.

A TPU multiplies tiles of 128 x 128 (8 rows at a time): of a product whose shortest two extents are
K and N, each is filled up to a multiple of 128, the longest one to a multiple of 8. That is an
estimate, of products taken as the jaxpr has them: the compiler may fold the taps of a convolution
into its channels, and small products into vector operations, and v6e has tiles of 256.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from nuwa_jax.watching.flops import Product

LANES, SUBLANES = 128, 8


class Padding(NamedTuple):
    """FLOPs of a kind of product, and what padding adds to them."""

    flops: int
    extra: int

    @property
    def share(self) -> float:
        """Extra FLOPs for each that is asked for."""
        return self.extra / self.flops if self.flops else 0.0


def padding_waste(products: Iterable[Product]) -> dict[str, Padding]:
    """What padding adds to a program's products, recomputed ones included.

    Returns:
      "weights": of convolutions and products without batch axes, which are those with parameters
      and their gradients, whose extents are the model's widths; "attention": of batched products,
      with heads' widths and numbers of frames or tokens. Kernels, which pad by themselves, are in
      neither.
    """
    totals = {"weights": [0, 0], "attention": [0, 0]}
    for product in products:
        if product.kind == "kernel":
            continue
        extents, batched = _extents(product)
        kind = "attention" if batched else "weights"
        flops = product.flops * product.times
        totals[kind][0] += flops
        totals[kind][1] += round(flops * (_filled(extents) / math.prod(extents) - 1))
    return {kind: Padding(*total) for kind, total in totals.items()}


def _filled(extents: tuple[int, int, int]) -> int:
    short, middle, long = sorted(extents)
    return _up(short, LANES) * _up(middle, LANES) * _up(long, SUBLANES)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _extents(product: Product) -> tuple[tuple[int, int, int], bool]:
    """Rows, contracted and columns of a product, and whether many such are made side by side."""
    equation = product.equation
    lhs, rhs = (v.aval.shape for v in equation.invars)
    if product.kind == "dot":
        (contracting, other), (batch, other_batch) = equation.params["dimension_numbers"]
        contracted = math.prod(lhs[i] for i in contracting)
        rows = math.prod(n for i, n in enumerate(lhs) if i not in (*contracting, *batch))
        columns = math.prod(n for i, n in enumerate(rhs) if i not in (*other, *other_batch))
        return (rows, contracted, columns), bool(batch)
    # Of a convolution each tap is a product of pixels and channels; where the window is larger than
    # the result (a kernel's gradient), each position of the result is one, of channels over pixels.
    params = equation.params
    numbers, out = params["dimension_numbers"], equation.outvars[0].aval.shape
    groups = params["feature_group_count"] * params["batch_group_count"]
    batch, channels = lhs[numbers.lhs_spec[0]], rhs[numbers.rhs_spec[1]]
    columns = rhs[numbers.rhs_spec[0]] // groups
    positions = math.prod(out[i] for i in numbers.out_spec[2:])
    taps = math.prod(rhs[i] for i in numbers.rhs_spec[2:])
    if taps > positions:
        return (batch, channels * taps, columns), False
    return (batch * positions, channels, columns), False
