"""Defines `Variant`, a model as it is run: its graphs at one precision on one backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backends.base import Graph, Precision, TensorInfo


@dataclass(frozen=True)
class Variant:
    """The graphs of one model by their names, in the order of first use, with backend, precision and options.

    forms: further options of single graphs, which change how they run and not what they compute.
    """

    name: str
    backend: str
    precision: Precision
    graphs: Mapping[str, Graph]
    options: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of each graph."""
        return {name: graph.sha256 for name, graph in self.graphs.items()}

    def options_of(self, graph: str) -> dict[str, Any]:
        """Returns the options of the engine of one graph."""
        return {**self.options, **self.forms.get(graph, {})}

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for a worker process."""
        return {
            "name": self.name,
            "backend": self.backend,
            "precision": str(self.precision),
            "graphs": graphs_to_json(self.graphs),
            "options": dict(self.options),
            **({"forms": {name: dict(form) for name, form in self.forms.items()}} if self.forms else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Variant:
        return Variant(
            data["name"],
            data["backend"],
            Precision(data["precision"]),
            graphs_from_json(data["graphs"]),
            data["options"],
            data.get("forms", {}),
        )


def graphs_to_json(graphs: Mapping[str, Graph]) -> dict[str, Any]:
    """Returns plain data of graphs by their names."""
    return {name: graph_to_json(graph) for name, graph in graphs.items()}


def graphs_from_json(data: Mapping[str, Any], folder: Path | None = None) -> dict[str, Graph]:
    """Returns the graphs of plain data, the inverse of `graphs_to_json`; with `folder`, paths are relative to it."""
    placed = (
        data if folder is None else {n: {**graph, "path": str(folder / graph["path"])} for n, graph in data.items()}
    )
    return {name: graph_from_json(graph) for name, graph in placed.items()}


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """Returns plain data; the path is absolute, for a worker on the same machine."""
    return {
        "path": str(graph.path),
        "inputs": [asdict(t) for t in graph.inputs],
        "outputs": [asdict(t) for t in graph.outputs],
        "sha256": graph.sha256,
        **({"left_float": True} if graph.left_float else {}),
    }


def graph_from_json(data: Mapping[str, Any]) -> Graph:
    """Returns the graph of plain data; the inverse of `graph_to_json`."""

    def ports(items: Any) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(t["name"], tuple(t["shape"]), t["dtype"]) for t in items)

    left_float = data.get("left_float", False)
    return Graph(Path(data["path"]), ports(data["inputs"]), ports(data["outputs"]), data["sha256"], left_float)
