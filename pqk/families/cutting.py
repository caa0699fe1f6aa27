"""What a family tells of the sizes of its networks that may shrink, for pruning and for students.

The family names layers; which weights belong to a unit of them is found by tracing (`pqk.compress.cut.units`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Plan = Mapping[str, int]
"""Name of a size -> units that stay; sizes that are not named keep all."""


@dataclass(frozen=True)
class Channels:
    """Output channels of the layer `root`, one by one or head by head.

    name: of the group of units. heads: how many heads the first `inner` channels make up; 0 where each channel of the
    layer is a unit of its own. fused: how many times `inner` channels lie behind each other in the layer, 3 where it
    gives queries, keys and values; the units are the same in each. norm: a module behind the layer whose parameters and
    buffers have a number for each of its channels, and which is left out of what is traced.
    """

    name: str
    root: str
    heads: int = 0
    inner: int = 0
    fused: int = 1
    norm: str | None = None


@dataclass(frozen=True)
class Size:
    """One size of a configuration and everything that has to follow it.

    kind: heads, ffn, block, or a kind of the family's own. units: the size now. step: what is cut at a time. groups:
    channels whose number is this size or a fixed share of it; each group chooses which of its units stay. Of a block,
    which goes as a whole or not at all, the `modules` that go together: with weights of zero each is only its residual
    path, or it has a flag `skipped` with which the network runs without it. follows: layers as wide as this size on
    both sides that no output depends on.
    """

    name: str
    kind: str
    units: int
    step: int = 1
    groups: tuple[Channels, ...] = ()
    modules: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()


class CuttingPart(Protocol):
    """What pruning, students and the joint recipe ask of a family: a module with these functions.

    Networks are those of the family, and can be built as `type(net)(net.config)`.
    """

    def sizes(self, config: Mapping[str, Any], round_to: int) -> list[Size]:
        """Everything that may shrink. Widths are cut to multiples of round_to, or of the family's own step."""

    def smaller(self, config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """The configuration that is left when each size of the plan keeps the units it says."""

    def may_drop(self, config: Mapping[str, Any], blocks: Sequence[str], *, retrained: bool = False) -> bool:
        """Whether these block sizes may all go. retrained: parts behind may read other blocks than they were trained
        on, as long as enough are left.
        """

    def tracing(self, net: Any) -> tuple[Callable[[Any, Tensor], Any], Tensor]:
        """Make a network ready for the dependency tracer, in place; returns a forward and its example input."""

    def run_sample(self, net: Any, side: int) -> int:
        """Run the network once on a sample of square images, all zeros: its FLOPs are counted. Return their side.

        It is `side`, or the next smaller one that the network takes.
        """

    def begin(self, net: Any, batch: Any) -> Any:
        """The part of the forward for a batch that cuts of sizes for which `begins` is False leave as it is."""

    def begins(self, size: str) -> bool:
        """Whether cutting this size changes what `begin` gives."""

    def finish(self, net: Any, begun: Any, batch: Any) -> Mapping[str, Tensor]:
        """The outputs for a batch, as `LearningPart.forward` gives them, from what `begin` gave."""
