"""A backend whose engines are files of their own, as TensorRT's are: ONNX Runtime with a plan beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.base import Engine, Graph, Precision
from backends.reference import OnnxRuntimeEngine, ReferenceBackend


class PlannedEngine(OnnxRuntimeEngine):
    """Pretends that its plan is the reversed graph, so that a test can tell whose plan was taken."""

    measured = "emulated"

    def __init__(self, graph: Graph, options: Mapping[str, Any] | None) -> None:
        super().__init__(graph, options)
        self.plan = graph.path.parent.parent / f"{graph.path.stem}-{graph.sha256[:8]}.plan"
        self.plan.write_bytes(graph.path.read_bytes()[::-1])


class PlannedBackend(ReferenceBackend):
    """Float only."""

    name = "planned"

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
        return PlannedEngine(graph, options)


def registered() -> str:
    """What the registry of backends holds for it."""
    assert Path(__file__).name == "plan_toys.py"
    return "plan_toys:PlannedBackend"
