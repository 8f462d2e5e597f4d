"""All checks of a folder, in the order from numbers to a whole video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax

from nuwa_jax.errors import UserError
from nuwa_jax.golden.blocks import check_flow_encoder, check_resblock, check_transformer
from nuwa_jax.golden.compare import SKIPPED, Item, guarded
from nuwa_jax.golden.drags import check_drag
from nuwa_jax.golden.model import Golden
from nuwa_jax.golden.numbers import check_lora, check_scalars
from nuwa_jax.golden.pictures import check_clip, check_vae
from nuwa_jax.golden.sampling import check_e2e, check_sampler
from nuwa_jax.golden.taps import check_unet_taps
from nuwa_jax.golden.unet import check_unet

# One check per file of arrays.
CHECKS: dict[str, Callable[[Golden], Iterator[Item]]] = {
    "scalars": check_scalars,
    "lora": check_lora,
    "drag": check_drag,
    "resblock": check_resblock,
    "transformer": check_transformer,
    "flow_encoder": check_flow_encoder,
    "vae": check_vae,
    "clip": check_clip,
    "unet": check_unet,
    "unet_taps": check_unet_taps,
    "sampler": check_sampler,
    "e2e": check_e2e,
}


def run_checks(golden: Golden, only: Sequence[str] = ()) -> Iterator[Item]:
    """Every item of the checks named, or of all, each thing that is missing once.

    Raises:
      UserError: there is no check of a name.
    """
    unknown = sorted(set(only) - set(CHECKS))
    if unknown:
        raise UserError(f"no check is called {', '.join(unknown)}: there are {', '.join(CHECKS)}")
    return _run(golden, [name for name in CHECKS if not only or name in only])


def _run(golden: Golden, names: Sequence[str]) -> Iterator[Item]:
    seen = set()
    with jax.default_matmul_precision("highest"):
        for name in names:
            for item in _check(golden, name):
                if item.error is not None or item.name not in seen:
                    yield item
                if item.error is None:
                    seen.add(item.name)


def _check(golden: Golden, name: str) -> Iterator[Item]:
    yield from guarded(name, CHECKS[name](golden))
    yield from guarded(name, _unread(golden, name))


def _unread(golden: Golden, name: str) -> Iterator[Item]:
    """What the file holds beyond what its check knows, or came to."""
    for array in golden.arrays(name).unread():
        yield Item(array, None, None, SKIPPED, "no comparison came to this array")
