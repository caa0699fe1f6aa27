"""Times parts of graphs alone, `time_pieces`: the micro-measurements of which speeds are predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.base import Precision, pieces_of
from pqk.measure.noise import load_between, read_clocks

ROUNDS = 21
"""In each every part runs once, in a new random order: what slows the machine down for a while slows all of them."""
_WARMUP = 2


def time_pieces(request: dict[str, Any]) -> dict[str, Any]:
    """Returns `times`, the milliseconds of each part in each round, and `load`, the cores that others used meanwhile.

    Request: backend, rest (float precision), graphs (paths of parts that `Pieces.cut` gave).
    """
    tool = pieces_of(registry.get(request["backend"]))
    assert tool is not None  # who asks has cut the graphs with it
    runs = [tool.opened(Path(path), Precision(request["rest"])) for path in request["graphs"]]
    times: list[list[float]] = [[] for _ in runs]
    random = np.random.default_rng(0)
    for run in runs * _WARMUP:
        run()
    begin = read_clocks()
    for _ in range(ROUNDS):
        for which in random.permutation(len(runs)):
            times[which].append(runs[which]())
    return {"times": times, "load": round(load_between(begin, read_clocks()), 3)}
