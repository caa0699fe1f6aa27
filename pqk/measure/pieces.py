"""Times parts of graphs alone, `time_pieces`: the micro-measurements of which speeds are predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backends import registry
from backends.base import Precision, pieces_of
from pqk.measure.noise import load_now


def time_pieces(request: dict[str, Any]) -> dict[str, Any]:
    """Returns `times`, the milliseconds of each run of each graph, and `load`, the cores that others used before.

    Request: backend, rest (float precision), graphs (paths of parts that `Pieces.cut` gave).
    """
    tool = pieces_of(registry.get(request["backend"]))
    assert tool is not None  # who asks has cut the graphs with it
    load = load_now()
    return {"times": [tool.time(Path(path), Precision(request["rest"])) for path in request["graphs"]], "load": load}
