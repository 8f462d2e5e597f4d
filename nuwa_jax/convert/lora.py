"""Low-rank updates as DragNUWA 1.5 stores them: `X.linear`, `X.lora_down`, `X.lora_up`.

W' = W + scale · up @ down, with no bias of their own and no alpha / rank factor (the released scale
is 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nuwa_jax.tensor_files import MemorySource, Spec, TensorSource

LINEAR, DOWN, UP = ".linear.", ".lora_down.weight", ".lora_up.weight"


class FoldedSource:
    """A source under the names it would have without LoRA: `X.weight` for `X.linear.weight`.

    With `fold` an array that has an update is given as their sum, computed in float32; without, as
    it is stored, and `down` and `up` give the update.
    """

    def __init__(self, source: TensorSource, *, scale: float = 1.0, fold: bool = True) -> None:
        self.source, self.scale, self.fold = source, scale, fold
        # Modules with an update, or with a half of one.
        self.modules = {
            name.removesuffix(half)
            for name in source.specs
            for half in (DOWN, UP)
            if name.endswith(half)
        }
        self._stored: dict[str, str] = {}
        for name in source.specs:
            if not name.endswith((DOWN, UP)):
                self._stored[self._plain(name)] = name

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Shapes by plain name."""
        return {plain: self.source.specs[name] for plain, name in self._stored.items()}

    def stored_names(self, plain: str) -> tuple[str, ...]:
        """All arrays of the file that the plain name is made of."""
        module = plain.removesuffix(".weight")
        extra = (module + DOWN, module + UP) if module in self.modules and module != plain else ()
        return (self._stored[plain], *extra)

    def read(self, name: str) -> np.ndarray:
        """The array of a plain name; float32 where an update was folded into it."""
        value = self.source.read(self._stored[name])
        module = name.removesuffix(".weight")
        if not self.fold or module == name or module not in self.modules:
            return value
        up, down = self.up(module), self.down(module)
        return value.astype(np.float32) + up @ down

    def faults(self) -> dict[str, list[str]]:
        """What is wrong with updates -> the modules of which it is true."""
        plain, stored = self.specs, self.source.specs
        found: dict[str, list[str]] = {
            "have no matrix": [],
            "lack a half": [],
            "are of another size": [],
        }
        for module in sorted(self.modules):
            matrix = plain.get(f"{module}.weight")
            down, up = (stored.get(module + half) for half in (DOWN, UP))
            if matrix is None:
                found["have no matrix"].append(module)
            elif down is None or up is None:
                found["lack a half"].append(module)
            elif (up.shape[0], down.shape[1]) != matrix.shape or up.shape[1] != down.shape[0]:
                found["are of another size"].append(module)
        return {f"low-rank updates {what}": modules for what, modules in found.items()}

    def down(self, module: str) -> np.ndarray:
        """`[rank, in]` in float32."""
        return self.source.read(module + DOWN).astype(np.float32)

    def up(self, module: str) -> np.ndarray:
        """`[out, rank]` in float32, times the scale."""
        return self.scale * self.source.read(module + UP).astype(np.float32)

    def _plain(self, name: str) -> str:
        module, dot, leaf = name.rpartition(".")
        if module.endswith(".linear") and module.removesuffix(".linear") in self.modules:
            return module.removesuffix(".linear") + dot + leaf
        return name


def fold_lora(state: Mapping[str, np.ndarray], scale: float = 1.0) -> dict[str, np.ndarray]:
    """The arrays of a whole state dict in float32 and plain names, updates added in."""
    source = FoldedSource(MemorySource(state), scale=scale)
    return {name: source.read(name).astype(np.float32) for name in source.specs}
