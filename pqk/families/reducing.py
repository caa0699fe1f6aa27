"""What a family tells of the work that its networks can be spared without training, for letter T of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from pqk.errors import PqkError
from pqk.families.sizes import known

if TYPE_CHECKING:
    from torch import Tensor

TAILS = {"full": 1, "half": 2, "quarter": 4}
"""Names of the grids that the linear tail of a dense head can run on, and how much coarser each one is."""

MOST_MERGED = 0.6
"""Largest share of tokens that may be merged: beyond it delta1 falls by more than a point."""


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


def read_reduce(of: str, given: Any) -> tuple[int, float]:
    """Reads the key `reduce` of a configuration, {tail: full | half | quarter, tokens: 0..0.6}.

    of: what the configuration is of, for messages. Returns how much coarser the grid of the tail is (1, 2 or 4), and
    the largest share of tokens that is merged. Raises PqkError for anything else.
    """
    asked = {"tail": "full", "tokens": 0.0, **known(of, given or {}, ("tail", "tokens"), "reduce")}
    tail, tokens = asked["tail"], asked["tokens"]
    if tail not in TAILS:
        raise PqkError(f"{of}: reduce.tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not 0 <= tokens <= MOST_MERGED:
        raise PqkError(f"{of}: reduce.tokens must be a share from 0 to {MOST_MERGED}, got {tokens!r}")
    return TAILS[tail], float(tokens)


def folded(kernel: Tensor, coarser: float) -> Tensor:
    """Kernel (O, I, 3, 3) of a map that was resized bilinearly by `coarser` (at least 1) -> the kernel that gives its
    values at the points of the map before the resize.

    A tap half a coarse pixel away reads half of each of two coarse pixels, one a quarter away three quarters of the
    nearer one. Exact away from the borders where coarse pixels lie `coarser` fine ones apart; with corners aligned
    they do but for 1 / size.
    """
    if coarser == 1:
        return kernel
    near = 1 / coarser
    taps = kernel.new_tensor(((near, 1 - near, 0.0), (0.0, 1.0, 0.0), (0.0, 1 - near, near)))
    found: Tensor = taps.mT @ kernel @ taps
    return found
