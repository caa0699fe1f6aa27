"""Finds where two executions of nearly the same ONNX graph diverge: at a node whose inputs agree, its output does not.

Intermediate tensors become outputs of temporary cuts of the graph: a coarse grid over the nodes in topological order,
then a finer one among the nodes that lead to the first tensor that differs, until a single node is left. Tensors are
matched by name, so the two files may differ in weights, attributes and single nodes.

Two things to know when reading the result. A tensor that is made visible cannot be fused away, so a cut graph may run
other kernels than the whole one: a fault of a fused kernel can vanish when one looks inside. Then the nodes between
the last tensors that agree and the first that differs are reported together, as `fused`. And errors can build up over
many nodes until one crosses the tolerance. So what was found is run again alone, on the same inputs on both sides:
`Difference.alone` shows whether it is the cause or only where a growing error crosses it.

Memory holds the nodes of both graphs, one engine, and the tensors that are compared (`max_bytes`). Weights lie in a
file: the graph's own, or a temporary one that all cuts refer to.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Engine, Feeds, Graph, TensorInfo, sha256_files
from backends.exchange import save_with_data
from backends.onnx_graph import OnnxGraph, constant_of, frame, reads, with_data

if TYPE_CHECKING:
    import onnx

Run = Callable[[Graph], Engine]
_GRID = 16  # tensors made visible in one round
_FLOATS = {"float32", "float16", "float64"}


@dataclass(frozen=True)
class Difference:
    """The place where two executions diverge. Errors: mean|a - b| / mean|a| over all feeds (inf: NaN or other shape).

    `nodes` are the names of all nodes between `inputs` and `output`: normally `node` alone; more when tensors between
    exist in one graph only, or when the difference vanished with the inner tensors visible (`fused`). `node` is a
    node that only one graph has, if there is one, else the node that computes `output`.
    `constants` holds the errors of weights and tables of these nodes that differ between the two files.
    `alone` is the error of `output` when both sides get the inputs of side a.
    """

    node: str
    op_type: str
    output: str
    output_error: float
    inputs: dict[str, float]
    constants: dict[str, float]
    nodes: tuple[str, ...]
    fused: bool
    alone: float
    tolerance: float

    @property
    def proven(self) -> bool:
        """Returns whether the nodes differ by more than the tolerance on equal inputs, so the cause lies in them."""
        return self.alone > self.tolerance

    def sentence(self) -> str:
        """Describes the finding in a sentence."""
        what = f"{self.op_type} {self.node!r}"
        if len(self.nodes) > 1:
            what += f" (with {len(self.nodes) - 1} more nodes{', fused' if self.fused else ''})"
        worst = max(self.inputs.values(), default=0.0)
        text = f"the executions diverge at {what}: its inputs agree within {worst:.2g}, its output differs by "
        text += f"{self.output_error:.2g}; alone, on equal inputs, by {self.alone:.2g}"
        if not self.proven:
            text += f", which is within {self.tolerance:.2g}: the error builds up over the nodes before it"
        if self.constants:
            text += f"; its constants differ: {', '.join(self.constants)}"
        return text


def first_difference(
    graph_a: Graph,
    run_a: Run,
    graph_b: Graph,
    run_b: Run,
    feeds: Sequence[Feeds],
    tolerance: float,
    max_bytes: int = 1 << 30,
    folder: Path | None = None,
) -> Difference | None:
    """Finds the first node at which side b differs from side a by more than `tolerance`; None when all outputs agree.

    A side is an ONNX graph and a function that compiles such a graph into an Engine; one engine is open at a time. The
    function gets parts of the graph too; those of a Q/DQ graph that hold no quantized node (see `quantizes`) as well.
    `max_bytes` bounds the activations that are held at once, over all `feeds`; a single tensor may exceed it.
    `folder`: where temporary graphs are written; by default beside graph a if its weights lie in a file of their own
    (which is linked, never copied: so it must be the same file system), else the system's temporary folder, which then
    gets a copy of the weights.
    Raises BackendError when a graph is not ONNX, there are no feeds, or the two graphs share no output.
    """
    if not feeds:
        raise BackendError("there is nothing to compare: no feeds")
    if folder is None and any(len(g.files()) > 1 for g in (graph_a, graph_b)):
        folder = graph_a.path.parent
    with tempfile.TemporaryDirectory(prefix=".bisect-", dir=folder) as made:
        a = _Side(graph_a, run_a, Path(made) / "a")
        if graph_b == graph_a:
            b = copy.copy(a)
            b.run = run_b
        else:
            b = _Side(graph_b, run_b, Path(made) / "b")
        return _Search(a, b, feeds, tolerance, max_bytes).find()


def quantizes(graph: Graph) -> bool:
    """Returns whether an ONNX graph has a QuantizeLinear node: some engines need precision int8 then and only then."""
    import onnx

    model = onnx.load(str(graph.path), load_external_data=False)
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


class _Side:
    """One graph, and engines of parts of it.

    `onnx.utils.extract_model` cannot cut the parts: it leaves out what the bodies of branches read, and copies the
    weights into every cut.
    """

    def __init__(self, graph: Graph, run: Run, folder: Path) -> None:
        import onnx

        if graph.format != "onnx":
            raise BackendError(f"{graph.path.name} is no ONNX graph: only those can be bisected")
        self.graph, self.run = graph, run
        self.path = folder / graph.path.name  # of every cut: the external data is named after the file
        folder.mkdir()
        for data in graph.files()[1:]:
            os.link(data.resolve(), folder / data.name)
        model = onnx.load(str(graph.path), load_external_data=False)
        if len(graph.files()) == 1:  # otherwise each cut would hold the weights once more, and write them
            save_with_data(model, self.path)
            model = onnx.load(str(self.path), load_external_data=False)
        for node in model.graph.node:
            node.name = node.name or node.output[0]  # positions are not the same in both graphs
        found = OnnxGraph(self.path, model)
        self.nodes, self.maker, self.live, self.fed = found.nodes, found.maker, found.live, found.inputs
        self.infos = {name: info for name in found.shapes if (info := _info(found, name))}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._frame = frame(model)

    def between(self, outputs: Iterable[str], stops: Iterable[str] = ()) -> tuple[list[onnx.NodeProto], list[str]]:
        """Returns the nodes, in order, that make `outputs` from `stops` and graph inputs, and which of these they read.

        An output is made even where it is one of `stops`.
        """
        first = list(outputs)
        ends = (set(stops) - set(first)) | self.fed
        todo, made, reached = first, set[str](), set[str]()
        while todo:
            name = todo.pop()
            if name in ends:
                reached.add(name)
            elif name in self.maker and name not in made:
                made.update(self.maker[name].output)
                todo += reads(self.maker[name])
        return [node for node in self.nodes if not made.isdisjoint(node.output)], sorted(reached)

    def cut(self, outputs: Sequence[str], stops: Iterable[str] = ()) -> Graph:
        """Returns a temporary graph that computes `outputs` from `stops` and the graph's inputs."""
        import onnx

        nodes, reached = self.between(outputs, stops)
        for name in (*reached, *outputs):
            if name not in self.infos:
                raise BackendError(f"{self.graph.path.name}: the shape of {name!r} is not known")
        infos_in, infos_out = (tuple(self.infos[name] for name in names) for names in (reached, outputs))
        read = {name for node in nodes for name in reads(node)}
        part = onnx.ModelProto()
        part.CopyFrom(self._frame)
        part.graph.node.extend(nodes)
        part.graph.initializer.extend(t for name, t in self.constants.items() if name in read and name not in reached)
        part.graph.input.extend(_value(info) for info in infos_in)
        part.graph.output.extend(_value(info) for info in infos_out)
        onnx.save_model(part, str(self.path))
        return Graph(self.path, infos_in, infos_out, sha256_files([self.path]) + self.graph.sha256)

    @contextlib.contextmanager
    def engine(self, outputs: Sequence[str], stops: Iterable[str] = ()) -> Iterator[Engine]:
        graph = self.cut(outputs, stops)
        with self.run(graph) as engine:
            yield engine

    def constant(self, name: str) -> np.ndarray | None:
        """Returns the value of a constant; None where nodes compute it."""
        import onnx

        tensor = constant_of(name, self.maker, self.constants)
        return None if tensor is None else onnx.numpy_helper.to_array(with_data(tensor, self.path.parent))


class _Search:
    """The bisection. `errors` holds what was measured of each tensor in the latest round that showed it."""

    def __init__(self, a: _Side, b: _Side, feeds: Sequence[Feeds], tolerance: float, max_bytes: int) -> None:
        self.a, self.b, self.feeds, self.tolerance, self.max_bytes = a, b, feeds, tolerance, max_bytes
        self.errors: dict[str, float] = {}
        order = [name for node in a.nodes for name in node.output]
        self.common = [name for name in order if self._comparable(name)]
        self.position = {name: index for index, name in enumerate(self.common)}

    def _comparable(self, name: str) -> bool:
        known = name in self.a.infos and name in self.b.infos
        return known and name in self.a.live and name in self.b.maker and self.a.infos[name].dtype in _FLOATS

    def find(self) -> Difference | None:
        outputs = [t.name for t in self.a.graph.outputs if t.name in self.position]
        if not outputs:
            raise BackendError(
                f"{self.a.graph.path.name} and {self.b.graph.path.name} have no float output of the same name"
            )
        self._measure(outputs)
        differing = [name for name in outputs if self._differs(name)]
        if not differing:
            return None
        suspect = min(differing, key=self._place)
        candidates = [name for name in self._ancestors(differing) if self.position[name] < self.position[suspect]]
        agreed: set[str] = set()
        while True:
            # Without candidates one node is left: look at its own inputs.
            shown = _spread(candidates, _GRID) if candidates else self._frontier(suspect)
            self._measure([*shown, suspect])
            found = next((name for name in [*shown, suspect] if self._differs(name)), None)
            if found is None:
                return self._narrow(suspect, agreed)
            if not candidates:
                if found == suspect:
                    return self._report(suspect, set(shown), fused=False)
                agreed -= set(self._ancestors([found]))
            # What agrees, and all that leads to it, is taken to be right until an input of the found node says no.
            agreed |= {name for name in shown if not self._differs(name)}
            suspect = found
            candidates = self._open(suspect, agreed)

    def _narrow(self, suspect: str, agreed: set[str]) -> Difference:
        """Finds the shortest stretch before `suspect` that must stay whole for the difference to show.

        One tensor at a time is shown beside it. If both agree, the tensor lies inside the stretch.
        """
        candidates = self._open(suspect, agreed)
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            name = candidates[middle]
            self._measure([name, suspect])
            if self._differs(name):
                suspect = name
                candidates = self._open(suspect, agreed)
                low, high = 0, len(candidates)
            elif self._differs(suspect):
                agreed = agreed | {name}
                low = middle + 1
            else:
                high = middle
        self._measure([suspect])
        return self._report(suspect, set(self._ancestors(sorted(agreed))) if agreed else set(), fused=True)

    def _place(self, name: str) -> int:
        return self.position[name]

    def _differs(self, name: str) -> bool:
        return not self.errors[name] <= self.tolerance

    def _ancestors(self, names: Sequence[str]) -> list[str]:
        """Returns the comparable tensors on the way to `names`, with themselves, in topological order."""
        made = {name for node in self.a.between(names)[0] for name in node.output}
        return [name for name in self.common if name in made]

    def _open(self, suspect: str, agreed: set[str]) -> list[str]:
        """Returns what leads to `suspect` but to nothing that agreed."""
        right = set(self._ancestors(sorted(agreed))) if agreed else set()
        return [name for name in self._ancestors([suspect]) if name not in right and name != suspect]

    def _frontier(self, name: str) -> list[str]:
        """Returns the nearest comparable tensors above `name`."""
        _, reached = self.a.between([name], self.position)
        return sorted((n for n in reached if n in self.position), key=self._place)

    def _measure(self, names: Sequence[str]) -> None:
        """Fills `errors` of `names`, in parts that keep within `max_bytes`."""
        for part in _parts(names, [self._bytes(name) for name in names], self.max_bytes):
            sums = dict.fromkeys(part, (0.0, 0.0))
            with self.a.engine(part) as engine:
                held = [engine.infer(_fitting(engine, feed)) for feed in self.feeds]
            with self.b.engine(part) as engine:
                for feed, want in zip(self.feeds, held, strict=True):
                    _add(sums, want, engine.infer(_fitting(engine, feed)))
            self.errors |= {name: _ratio(*both) for name, both in sums.items()}

    def _bytes(self, name: str) -> int:
        """Returns the bytes that comparing a tensor holds: side a of all feeds, side b of one, and the difference."""
        return 4 * math.prod(self.a.infos[name].shape) * (len(self.feeds) + 2)

    def _alone(self, output: str, stops: set[str]) -> tuple[float, dict[str, float]]:
        """Error of `output` when both sides get side a's values of `stops`, and the errors of the inputs."""
        _, inputs = self.a.between([output], stops)
        values = [name for name in inputs if name not in self.a.fed]
        sums = {output: (0.0, 0.0)}
        for feed in self.feeds:
            given = dict(feed)
            if values:
                with self.a.engine(values) as engine:
                    given |= engine.infer(_fitting(engine, feed))
                given = {name: array.astype(self.a.infos[name].dtype, copy=False) for name, array in given.items()}
            with self.a.engine([output], stops) as engine:
                want = engine.infer(_fitting(engine, given))
            with self.b.engine([output], stops) as engine:
                _add(sums, want, engine.infer(_fitting(engine, given)))
        return _ratio(*sums[output]), {name: self.errors.get(name, 0.0) for name in inputs}

    def _report(self, output: str, stops: set[str], fused: bool) -> Difference:
        parts = self.a.between([output], stops)[0]
        chosen_a = _working(parts, self.a)
        chosen_b = _working(self.b.between([output], stops)[0], self.b)
        outputs = [{name for node in chosen for name in node.output} for chosen in (chosen_a, chosen_b)]
        single = [n for n in (*chosen_a, *chosen_b) if (outputs[0] & outputs[1]).isdisjoint(n.output)]
        culprit = single[0] if single else next(n for n in chosen_a if output in n.output)
        alone, inputs = self._alone(output, stops)
        constants = {}
        for name in {name: None for node in parts for name in reads(node)}:
            ours, theirs = self.a.constant(name), self.b.constant(name)
            if ours is not None and theirs is not None:
                sums = {name: (0.0, 0.0)}
                _add(sums, {name: _real(ours)}, {name: _real(theirs)})
                if (error := _ratio(*sums[name])) > 0:
                    constants[name] = error
        return Difference(
            node=culprit.name,
            op_type=culprit.op_type,
            output=output,
            output_error=self.errors[output],
            inputs=inputs,
            constants=constants,
            nodes=tuple(dict.fromkeys(node.name for node in (*chosen_a, *chosen_b))),
            fused=fused,
            alone=alone,
            tolerance=self.tolerance,
        )


def _working(nodes: list[onnx.NodeProto], side: _Side) -> list[onnx.NodeProto]:
    """Returns the nodes without those that only prepare constants and shapes."""
    return [node for node in nodes if any(name in side.live for name in node.output)]


def _real(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _info(graph: OnnxGraph, name: str) -> TensorInfo | None:
    """Returns shape and dtype of a tensor; None for a type that numpy does not have."""
    import onnx

    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(graph.types[name])).name
    except (KeyError, TypeError):
        return None
    return TensorInfo(name, graph.shapes[name], dtype)


def _value(info: TensorInfo) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(
        info.name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(info.dtype)), info.shape
    )


def _fitting(engine: Engine, feeds: Feeds) -> Feeds:
    """Returns those of `feeds` that the engine takes."""
    return {info.name: feeds[info.name] for info in engine.inputs}


def _spread(items: Sequence[str], count: int) -> list[str]:
    """Returns at most `count` items at equal distances; the last but no first, as a difference shows downstream."""
    if len(items) <= count:
        return list(items)
    return [items[(step + 1) * len(items) // count - 1] for step in range(count)]


def _parts(names: Sequence[str], sizes: Sequence[int], limit: int) -> Iterator[list[str]]:
    part: list[str] = []
    total = 0
    for name, size in zip(names, sizes, strict=True):
        if part and total + size > limit:
            yield part
            part, total = [], 0
        part.append(name)
        total += size
    if part:
        yield part


def _add(sums: dict[str, tuple[float, float]], want: Feeds, got: Feeds) -> None:
    """Adds mean|want - got| and mean|want| of one feed; equal infinities and NaNs are no difference."""
    for name, (difference, scale) in sums.items():
        a, b = np.asarray(want[name]), np.asarray(got[name])
        if a.shape != b.shape:
            sums[name] = (math.inf, scale)
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(a - b)
            odd = ~np.isfinite(apart)
            if odd.any():
                same = odd & ((a == b) | (np.isnan(a) & np.isnan(b)))
                apart = np.where(same, 0.0, np.where(odd, np.inf, apart))
            size = np.where(np.isfinite(a), np.abs(a), 0.0)
        mean = float(np.mean(apart, dtype=np.float64)) if a.size else 0.0
        sums[name] = (difference + mean, scale + (float(np.mean(size, dtype=np.float64)) if a.size else 0.0))


def _ratio(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf
