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
_PARTS_PER_YARD = 6


def time_pieces(request: dict[str, Any]) -> dict[str, Any]:
    """Returns `times` of each part in each round in yardsticks, and `load`, the cores that others used meanwhile.

    Request: backend, rest (float precision), yardstick and graphs (paths; see `backends.base.Pieces`). A yardstick is
    the mean time of fixed work that runs between the parts of the same round, so parts that were timed at different
    hours, when the machine was faster or slower, can be added up. `yardstick_ms`: its median.
    """
    tool = pieces_of(registry.get(request["backend"]))
    assert tool is not None  # who asks has cut the graphs with it
    rest, paths = Precision(request["rest"]), request["graphs"]
    yard = tool.opened(Path(request["yardstick"]), rest)
    parts = [tool.opened(Path(path), rest) for path in paths]
    runs = [*parts, *[yard] * -(-len(parts) // _PARTS_PER_YARD)]
    for run in runs * _WARMUP:
        run()
    random = np.random.default_rng(0)
    taken = np.empty((ROUNDS, len(runs)))
    begin = read_clocks()
    for number in range(ROUNDS):
        for which in random.permutation(len(runs)):
            taken[number, which] = runs[which]()
    load = round(load_between(begin, read_clocks()), 3)
    yards = taken[:, len(parts) :].mean(axis=1, keepdims=True)
    times = taken[:, : len(parts)] / yards
    return {"times": times.T.tolist(), "yardstick_ms": float(np.median(yards)), "load": load}
