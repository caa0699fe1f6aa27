"""What a family tells of the work that its networks can be spared without training, for letter T of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

TAILS = {"full": 1, "half": 2, "quarter": 4}
"""Names of the grids that the linear tail of a dense head can run on, and how much coarser each one is."""

MOST_MERGED = 0.6
"""Largest share of tokens that may be merged: beyond it delta1 falls by more than a point."""

_TAPS = {
    2: ((0.5, 0.5, 0.0), (0.0, 1.0, 0.0), (0.0, 0.5, 0.5)),
    4: ((0.25, 0.75, 0.0), (0.0, 1.0, 0.0), (0.0, 0.75, 0.25)),
}
"""By how much coarser a grid is: what the three taps of a kernel, at -1, 0 and 1 of the fine grid, read of its
neighbours there, where the fine map is a bilinear resize of the coarse one.
"""


class ReducingPart(Protocol):
    """What stage T asks of a family: a module with these names."""

    def reduced(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], tail: str, tokens: float
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns configuration and weights of the network that does less work.

        tail: of `TAILS`; what has no tail is left as it is. tokens: share that is merged. Raises PqkError where nothing
        becomes less.
        """
        ...

    def keep(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the keep-list entries that quantization of a reduced network needs."""
        ...


def folded(kernel: Tensor, coarser: int) -> Tensor:
    """Kernel (O, I, 3, 3) of a map that was resized bilinearly by `coarser` (1, 2 or 4) -> the kernel that gives its
    values at the points of the map before the resize.

    A tap half a coarse pixel away reads half of each of two coarse pixels, one a quarter away three quarters of the
    nearer one. Exact away from the borders where a coarse pixel is a whole number of fine ones; with corners aligned
    it is that but for 1 / size.
    """
    if coarser == 1:
        return kernel
    taps = kernel.new_tensor(_TAPS[coarser])
    found: Tensor = taps.mT @ kernel @ taps
    return found
