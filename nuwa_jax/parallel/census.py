"""What devices send one another in a compiled program, read from its HLO, beside what they must.

Three traps of reading HLO text. On TPU an asynchronous collective is spread over several fusions,
each of which repeats the operation; the first of such a chain counts. (They share a `channel_id`,
but so do all collectives that `jax.shard_map` wrote, which have the number 1.) A reduce-scatter may
be an all-reduce inside a fusion named `all-reduce-scatter`. What stands in a loop's body stands
there once, however often it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from nuwa_jax.parallel.sharding import partition_spec
from nuwa_jax.training.curriculum import Params

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# An all-reduce is a reduce-scatter and an all-gather of the same array.
PASSES = {"all-reduce": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array, once: what is gathered together, or what each device had to add.
      group: devices that take part together; 0: not known.
      times: how often a step runs it.
      source: the operation of the traced program that it comes from.
    """

    kind: str
    bytes: int
    group: int
    times: int
    source: str

    @property
    def traffic(self) -> int:
        """Bytes that each device sends by it in a step: as on a ring, twice for an all-reduce.

        A gather in phases, along one side of a torus after the other, counts as one over all
        devices does: as each phase leaves out its first part, they add up to (n - 1) / n.
        """
        if self.kind == "collective-permute":
            return self.bytes * self.times
        return on_ring(self.bytes, self.group) * PASSES.get(self.kind, 1) * self.times


def on_ring(size: int, devices: int) -> int:
    """Of an array of so many bytes, those that each device of a ring sends to gather or add it.

    (g - 1) / g: each part goes round to all but the one that has it. All of it where the group is
    not known (0).
    """
    return size * (devices - 1) // devices if devices else size


@dataclasses.dataclass(frozen=True)
class Census:
    """The collectives of a program, and what the text tells besides.

    Attributes:
      collectives: each once.
      endless: loops whose length the text does not tell; what is in them counts once.
      cycles: the compiler's estimates of its fusions, added up; collectives and copies have none.
    """

    collectives: tuple[Collective, ...]
    endless: int
    cycles: int

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Of every kind, how many there are and how many bytes each device sends by them."""
        table = {kind: {"count": 0, "traffic": 0} for kind in KINDS}
        for collective in self.collectives:
            table[collective.kind]["count"] += collective.times
            table[collective.kind]["traffic"] += collective.traffic
        return {kind: row for kind, row in table.items() if row["count"]}

    @property
    def traffic(self) -> int:
        """Bytes that each device sends by all of them in a step."""
        return sum(collective.traffic for collective in self.collectives)


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERATION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) (" + "|".join(KINDS) + r")(-start)?\((.*)$"
)
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_CONTINUED = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')  # -1 begins
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_SCATTER = "all-reduce-scatter"


def read_hlo(text: str) -> Census:
    """The census of a compiled program's text (`compiled.as_text()`), of one device."""
    program = _Program()
    for line in text.splitlines():
        program.read(line)
    runs = program.runs()
    collectives = []
    for where, collective in program.collectives:
        scattered = where in program.scatters or where.startswith(_SCATTER)
        kind = "reduce-scatter" if scattered else collective.kind
        collectives.append(dataclasses.replace(collective, kind=kind, times=runs.get(where, 1)))
    cycles = sum(count * runs.get(where, 1) for where, count in program.cycles.items())
    return Census(tuple(collectives), program.endless, cycles)


class _Program:
    """What the lines of a program tell, computation by computation."""

    def __init__(self) -> None:
        self.collectives: list[tuple[str, Collective]] = []
        self.cycles: dict[str, int] = {}
        self.scatters: set[str] = set()  # computations of fusions that are named so
        self.endless = 0
        self._inside = self._entry = ""
        self._callers: dict[str, list[str]] = {}
        self._loops: dict[str, str] = {}  # body -> condition
        self._constants: dict[tuple[str, str], int] = {}
        self._bounds: dict[str, str] = {}  # condition -> the constant that its counter is below

    def read(self, line: str) -> None:
        header = _HEADER.match(line)
        if header is not None:
            self._inside = header[2]
            self._entry = self._inside if header[1] else self._entry
            return
        inside = self._inside
        loop = _WHILE.search(line)
        if loop is not None:
            self._loops[loop[2]] = loop[1]
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [name.strip(" %") for name in branches.split(",")]
        for name in called:
            self._callers.setdefault(name, []).append(inside)
            if line.lstrip().removeprefix("ROOT ").startswith(f"%{_SCATTER}"):
                self.scatters.add(name)
        estimate = _CYCLES.search(line)
        if estimate is not None:
            self.cycles[inside] = self.cycles.get(inside, 0) + int(estimate[1])
        constant, below = _CONSTANT.search(line), _BELOW.search(line)
        if constant is not None:
            self._constants[inside, constant[1]] = int(constant[2])
        if below is not None:
            self._bounds[inside] = below[1]
        operation = _OPERATION.match(line)
        if operation is not None and _CONTINUED.search(line) is None:
            self.collectives.append((inside, _collective(operation, line)))

    def runs(self) -> dict[str, int]:
        """How often a step runs each computation: as often as all of its callers together.

        A loop runs as often as its counter, from 0, is below a constant; one of another form counts
        as running once, and in `endless`.
        """
        trips = {}
        for body, condition in self._loops.items():
            trips[body] = self._constants.get((condition, self._bounds.get(condition, "")))
        self.endless = sum(count is None for count in trips.values())
        known = {self._entry: 1}

        def of(name: str) -> int:
            if name not in known:
                calls = sum(of(caller) for caller in self._callers.get(name, ()))
                known[name] = calls * (trips.get(name) or 1)
            return known[name]

        for name in self._callers:
            of(name)
        return known


def _collective(operation: re.Match[str], line: str) -> Collective:
    kind, group = operation[3], _group_size(line)
    sizes = list(_array_bytes(operation[2]))
    if operation[4] and kind != "all-reduce":
        # Its result repeats the operands before what is made of them, and has scalars of its own.
        arrays = [size for size in sizes if size > 4]
        sizes = arrays[len(arrays) // 2 :]
    size = sum(sizes) * (max(group, 1) if kind == "reduce-scatter" else 1)
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, size, group, 1, source[1] if source else "")


def _array_bytes(shape: str) -> Iterator[int]:
    for kind, dimensions in _ARRAY.findall(shape):
        bits = re.search(r"\d+", kind)
        if kind == "pred" or bits is not None:
            width = 1 if kind == "pred" else max(1, int(bits[0]) // 8)
            yield width * math.prod(int(n) for n in dimensions.split(",") if n)


def _group_size(line: str) -> int:
    """From any of the three ways in which HLO writes groups of devices; 0 where it names none."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed is not None:
        return listed[1].count(",") + 1
    shaped = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if shaped is not None:
        return int(shaped[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if mesh is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return 0


class Minimum(NamedTuple):
    """Bytes that FSDP cannot do without in a step, counted as `Collective.traffic`.

    Attributes:
      gathers: of parameters, in the dtype that is computed in: those that train once in the forward
        and once in the backward pass; frozen ones once in the forward pass, and again in the
        backward pass if gradients pass through them (`PASSED_THROUGH`).
      scatters: of gradients, each once, in the dtype in which they are added.
      copies: gradients added over whole copies of the model (`data`), of the part that a device
        keeps; and those of parameters that are not split.
    """

    gathers: int
    scatters: int
    copies: int

    @property
    def traffic(self) -> int:
        """All of it."""
        return self.gathers + self.scatters + self.copies


# The part of the model through which gradients pass to others: what conditions it is upstream.
PASSED_THROUGH = "unet"


def fsdp_minimum(
    params: Params,
    frozen: Params,
    sizes: Mapping[str, int],
    *,
    compute_dtype: Any,
    reduce_dtype: Any,
    micro_batches: int = 1,
) -> Minimum:
    """What must be sent where every device holds a part of each parameter.

    Args:
      params: shapes of those that train.
      frozen: shapes of those that do not, of which the step uses any value.
      sizes: of the mesh's axes.
      compute_dtype: in which parameters are gathered.
      reduce_dtype: in which gradients are added.
      micro_batches: of a step; each gathers the parameters anew and scatters its gradients, as
        neither fits whole. Copies meet once.

    Axes `frame` and `tensor` exchange activations, which are no part of this.
    """
    compute, add = (np.dtype(dtype).itemsize for dtype in (compute_dtype, reduce_dtype))
    copies_of_model, parts = sizes["data"], sizes["fsdp"]
    gathers = scatters = copies = 0
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        size, split = math.prod(leaf.shape), _is_split(path, leaf, sizes)
        if split:
            gathers += 2 * on_ring(size * compute, parts) * micro_batches
            scatters += on_ring(size * add, parts) * micro_batches
            if copies_of_model > 1:
                copies += 2 * on_ring(size * add // parts, copies_of_model)
        elif copies_of_model * parts > 1:
            copies += 2 * on_ring(size * add, copies_of_model * parts)
    for path, leaf in traverse_util.flatten_dict(frozen, sep="/").items():
        if _is_split(path, leaf, sizes):
            passes = 2 if path.split("/")[0] == PASSED_THROUGH else 1
            gathers += passes * on_ring(math.prod(leaf.shape) * compute, parts) * micro_batches
    return Minimum(gathers, scatters, copies)


def used_parts(jaxpr: Any, tree: Any, wanted: Sequence[bool]) -> list[bool]:
    """Which leaves of a program's arguments some of its outputs depend on.

    Args:
      jaxpr: of the program, closed.
      tree: its arguments.
      wanted: for every output, whether it counts.
    """
    from jax.interpreters import partial_eval

    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, list(wanted))
    if len(used) != len(jax.tree.leaves(tree)):
        raise ValueError(f"{len(used)} arguments traced, {len(jax.tree.leaves(tree))} given")
    return used


def _is_split(path: str, leaf: Any, sizes: Mapping[str, int]) -> bool:
    return "fsdp" in partition_spec(path, tuple(leaf.shape), sizes)
