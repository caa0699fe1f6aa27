"""What most families say alike; a family imports from here what it has nothing better for.

    from pqk.families.defaults import *

Of the model part: UNDONE, LAYOUT, initialize, adapt, may_lack, official. Of the settings: NAMED, Quant, SIGN, KINDS,
ATTENTION, LAST_LAYERS, part_of. Of the data: SEED_DRAWS, can_grow, refuse_overlap, digest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pqk.families.contract import Given, SampleSet
from pqk.files import sha256_json
from pqk.settings.quant import Quant as Quant
from pqk.settings.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "ATTENTION",
    "KINDS",
    "LAST_LAYERS",
    "LAYOUT",
    "NAMED",
    "PATCH",
    "SEED_DRAWS",
    "SIGN",
    "UNDONE",
    "Quant",
    "adapt",
    "can_grow",
    "digest",
    "initialize",
    "may_lack",
    "official",
    "part_of",
    "refuse_overlap",
]

UNDONE: Mapping[str, Any] = {}
LAYOUT: str | None = None
NAMED: Mapping[str, Mapping[str, Any]] = {}
SIGN: str | None = None
KINDS: tuple[str, ...] = ()
ATTENTION: tuple[str, ...] = ()
LAST_LAYERS: tuple[str, ...] = ()
PATCH = 1
SEED_DRAWS: Literal["samples", "noise"] = "samples"


def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fills every parameter with normal numbers of deviation 0.02."""
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)


def adapt(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Returns the weights as they are: there are no other names."""
    return dict(weights)


def may_lack(key: str) -> bool:
    """Returns False: every weight counts."""
    return False


def official(content: Any) -> None:
    """Returns None: there are no official checkpoints."""
    return


def part_of(name: str) -> None:
    """Returns None: the network has no named parts."""
    return


def can_grow(workload: Workload, given: Given) -> bool:
    """Returns True: all data is generated."""
    return True


def refuse_overlap(sets: Mapping[str, SampleSet]) -> None:
    """Raises nothing: seeds keep generated splits apart."""


def digest(split: str, workload: Workload, sha256: Callable[[], str]) -> str:
    """Returns a sha256 of the split's name and the whole workload without its seeds."""
    return sha256_json({"split": split, **workload.model_dump(mode="json", exclude={"seeds"})})
