"""Floating-point operations of a program, counted in its jaxpr before any compiler sees it.

*Model FLOPs*, as MFU is defined on them (PaLM, arXiv 2204.02311, appendix B): what the mathematics
needs, forward and backward, without what rematerialisation computes a second time. A multiplication
and an addition are two operations. Counted are products of matrices and convolutions, which are all
but a few per cent of the arithmetic; elementwise operations, sorting and random numbers are not.

Known limits: a `while` loop of unknown length that holds products is an error; the scores that a
custom backward pass of attention makes anew count as model FLOPs, unless it says so with
`jax.named_scope("rematted_computation")`, the name by which `jax.checkpoint` marks its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# In the name stack of whatever `jax.checkpoint` computes again in the backward pass.
RECOMPUTED = "rematted_computation"
# And of what is computed of rows or keys that a kernel's blocks were filled up with
# (`nuwa_jax.models.attention.padded_scope`): which, how many are real, of how many.
PADDED = re.compile(r"(rows|keys)_(\d+)_of_(\d+)")
# Kernels that are counted by their formula, by what is in their names (`nuwa_jax.models`).
SPLASH, OVER_TIME, FED_FORWARD = "splash", "attention_over_time", "fed_forward"

Padded = frozenset[tuple[str, str, str]]


class Product(NamedTuple):
    """A matrix product, convolution or attention kernel of a program.

    Attributes:
      kind: "dot", "conv" or "kernel".
      flops: of one execution, without what is done on padding.
      times: executions, over loops and over the devices of a `shard_map`.
      recomputed: whether it repeats work of the forward pass (`jax.checkpoint`).
      equation: of the jaxpr.
    """

    kind: str
    flops: int
    times: int
    recomputed: bool
    equation: core.JaxprEqn


def model_flops(fn: Callable[..., Any], *abstract_args: Any) -> int:
    """Floating-point operations of `fn(*abstract_args)` over all devices, recomputation left out.

    Args:
      fn: any traceable function, jitted or not; a whole training step, for instance.
      *abstract_args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

    Raises:
      ValueError: a product stands in a `while` loop, whose length a jaxpr does not tell.
    """
    jaxpr = jax.make_jaxpr(fn)(*abstract_args)
    return sum(p.flops * p.times for p in products(jaxpr.jaxpr) if not p.recomputed)


def products(
    jaxpr: core.Jaxpr, times: int = 1, recomputed: bool = False, padded: Padded = frozenset()
) -> Iterator[Product]:
    """Every product of a jaxpr and of those within it.

    Of the branches of a `cond` the costliest counts, of those of `lax.platform_dependent` the
    default: the mathematics, without what a platform's kernel pads or its devices do twice. A
    `shard_map`'s body counts once for every device of its manual axes.

    Args:
      jaxpr: the program.
      times: that it runs.
      recomputed: whether it is part of what is computed again.
      padded: matches of `PADDED` in the names of what it is part of.

    Raises:
      ValueError: a product stands in a `while` loop.
    """
    for equation in jaxpr.eqns:
        names = str(equation.source_info.name_stack)
        again = recomputed or RECOMPUTED in names
        yield from _of_equation(equation, times, again, padded | set(PADDED.findall(names)))


def _of_equation(
    equation: core.JaxprEqn, times: int, again: bool, padded: Padded
) -> Iterator[Product]:
    name, params = equation.primitive.name, equation.params

    def product(kind: str, flops: int) -> Product:
        for _, real, of in padded:
            flops = flops * int(real) // int(of)
        return Product(kind, flops, times, again, equation)

    if name == "dot_general":
        yield product("dot", dot_flops(equation))
    elif name == "conv_general_dilated":
        yield product("conv", conv_flops(equation))
    elif name == "pallas_call":
        kernel = str(params.get("name_and_src_info", params.get("name", "")))
        if SPLASH in kernel:
            yield product("kernel", _splash_flops(equation, kernel))
        elif OVER_TIME in kernel:
            yield product("kernel", _over_time_flops(equation))
        elif FED_FORWARD in kernel:
            model, anew = _fed_forward_flops(equation)
            yield product("kernel", model)
            if anew:
                yield product("kernel", anew)._replace(recomputed=True)
        else:
            grid = [size for size in params["grid_mapping"].grid if isinstance(size, int)]
            for inner in products(params["jaxpr"], times * math.prod(grid), again, padded):
                yield inner._replace(kind="kernel")
    elif name == "scan":
        yield from products(params["jaxpr"].jaxpr, times * params["length"], again, padded)
    elif name == "while":
        found = [p for part in _inner(params) for p in products(part, times, again, padded)]
        if found:
            raise ValueError(
                f"{len(found)} products stand in a while loop, whose length is not known before it "
                "runs: write it as lax.scan, or as lax.fori_loop with constant bounds under grad"
            )
    elif name == "cond":
        bodies, platforms = params["branches"], params.get("branches_platforms") or ()
        if None in platforms:  # the default
            bodies = [bodies[platforms.index(None)]]
        branches = [list(products(b.jaxpr, times, again, padded)) for b in bodies]
        yield from max(branches, key=lambda found: sum(p.flops * p.times for p in found))
    elif name == "shard_map":
        mesh, manual = params["mesh"], params["newly_manual_axes"]
        parts = math.prod(size for axis, size in mesh.shape.items() if axis in manual)
        yield from products(_open(params["jaxpr"]), times * parts, again, padded)
    elif name in ("custom_jvp_call", "custom_vjp_call"):
        # Their other parameters are rules of differentiation, not what is computed here.
        inner = params["call_jaxpr"] if "call_jaxpr" in params else params["fun_jaxpr"]
        yield from products(_open(inner), times, again, padded)
    else:
        for inner in _inner(params):
            yield from products(inner, times, again, padded)


def dot_flops(equation: core.JaxprEqn) -> int:
    """2 x batch x rows x columns x contracted."""
    lhs = equation.invars[0].aval.shape
    (contracting, _), _ = equation.params["dimension_numbers"]
    contracted = math.prod(lhs[i] for i in contracting)
    return 2 * math.prod(equation.outvars[0].aval.shape) * contracted


def conv_flops(equation: core.JaxprEqn) -> int:
    """2 x batch x in x out channels x pairs of output position and kernel tap that meet a value.

    Taps on the padding and in the holes of a dilated input are left out, as XLA's cost analysis
    does: then a convolution and its two gradients need the same.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    lhs, rhs = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    positions = 1
    for i, (low, _) in enumerate(params["padding"]):
        positions *= _meetings(
            lhs[numbers.lhs_spec[2 + i]],
            rhs[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            params["window_strides"][i],
            low,
            params["lhs_dilation"][i],
            params["rhs_dilation"][i],
        )
    batch = lhs[numbers.lhs_spec[0]] // params["batch_group_count"]
    return 2 * batch * rhs[numbers.rhs_spec[1]] * rhs[numbers.rhs_spec[0]] * positions


def _meetings(
    size: int, taps: int, out: int, stride: int, low: int, dilation: int, tap_dilation: int
) -> int:
    """Pairs of output position and tap, along one dimension, at which the input has a value."""
    at = np.arange(out)[:, None] * stride - low + np.arange(taps) * tap_dilation
    return int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())


def _splash_flops(equation: core.JaxprEqn, name: str) -> int:
    """Attention of every query to every key: 2 products of 2 b n lq lk d forward, 4 backward.

    Backward they are those of q and of k and v, in a kernel each or all in one. The scores that
    those kernels make anew are not counted, nor is it taken off where a mask leaves blocks out.
    """
    # The first float arrays of such rank are the queries [.. n lq d] and the keys [.. n lk d].
    floats = [v.aval.shape for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    q, k = [shape for shape in floats if len(shape) >= 3][:2]
    # Beside the gradients, one array of scratch for each is among the outputs.
    count = 4 if "_dkv" in name and len(equation.outvars) > 4 else 2
    # Longer than d is wide, as the kernels ask for; the last axis if that is how keys are laid out.
    return count * 2 * math.prod(q) * max(k[-2:])


def _over_time_flops(equation: core.JaxprEqn) -> int:
    """As `_splash_flops`, of `[b t l c]` over t: what falls to other pixels is not counted."""
    shape = equation.invars[0].aval.shape
    backward = len(equation.outvars) == 3
    return (4 if backward else 2) * 2 * math.prod(shape) * shape[1]


def _fed_forward_flops(equation: core.JaxprEqn) -> tuple[int, int]:
    """3 products forward, 6 backward; and 2 that the backward pass makes anew."""
    n, c, l = equation.invars[0].aval.shape
    hidden = max(v.aval.shape[0] for v in equation.invars if v.aval.shape[1:] == (1,)) // 2
    each = 2 * n * l * c * hidden
    return (6 * each, 2 * each) if len(equation.outvars) > 1 else (3 * each, 0)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield _open(item)


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
