"""Runs the graphs of a model; each class serves as `call` of a family's `predict`.

Engines: `Engines`. Wrappers around another call: memory (`Remembering`), counter (`Counting`), stopwatch (`Stopwatch`),
recorder (`Recorder`), replay (`Replaying`).
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from backends import registry
from backends.base import Array, DeviceArray, Engine, Graph, Kernel, TensorInfo, counting_of
from backends.reference import OnnxRuntimeEngine, TorchEngine
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.families.contract import Call
from pqk.lru import Lru

if TYPE_CHECKING:
    from pqk.families.contract import Family, GraphSpec
    from pqk.settings.workload import Workload

Outputs = dict[str, Any]


class Engines:
    """Open engines by the names of their graphs; called as a family's `call`. A context manager that frees them."""

    def __init__(self, opened: Mapping[str, Callable[[], Engine]]) -> None:
        """Opens the engines. opened: a function for each engine, in the order of the graphs.

        When one fails, those before it are closed.
        """
        self._stack = ExitStack()
        self.engines: dict[str, Engine] = {}
        try:
            for name, open_engine in opened.items():
                self.engines[name] = self._stack.enter_context(open_engine())
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engines."""
        self._stack.close()

    def __call__(
        self, graph: str, feeds: Mapping[str, Array], *, reuse: Hashable | None = None, stay: bool = False
    ) -> Outputs:
        engine = self.engines[graph]
        return engine.infer_on_device(feeds) if stay else engine.infer(feeds)

    @property
    def measured(self) -> str:
        """Returns 'engine', or 'emulated' when another runtime computes in place of one of the engines."""
        return "emulated" if any(engine.measured == "emulated" for engine in self.engines.values()) else "engine"

    @property
    def size_bytes(self) -> int:
        """Returns the bytes of the files that ship."""
        return sum(engine.size_bytes for engine in self.engines.values())

    def kernels(self) -> dict[str, list[Kernel]]:
        """Returns the executed kernels of each graph; see `kernels_of`."""
        return {graph: self.kernels_of(graph) for graph in self.engines}

    def kernels_of(self, graph: str) -> list[Kernel]:
        """Returns the executed kernels of a graph. Raises PqkError when its engine reports none."""
        kernels = self.engines[graph].kernels()
        if not kernels:
            raise PqkError(f"the {graph} engine reports no kernels, so its executed precision is unknown")
        return kernels


def compiled(variant: Variant, counting: bool = False) -> Engines:
    """Returns the compiled engines of a variant. counting: they count their kernels while they run, where they can."""
    backend = registry.get(variant.backend)
    counts = counting_of(backend) if counting else {}

    def opener(name: str, graph: Graph) -> Callable[[], Engine]:
        return lambda: backend.compile(graph, variant.precision, {**variant.options_of(name), **counts})

    return Engines({name: opener(name, graph) for name, graph in variant.graphs.items()})


def on_reference(graphs: Mapping[str, Graph]) -> Engines:
    """Returns float graphs on ONNX Runtime: the reference for calibration and comparison of every toolchain."""

    def opener(graph: Graph) -> Callable[[], Engine]:
        return lambda: OnnxRuntimeEngine(graph)

    return Engines({name: opener(graph) for name, graph in graphs.items()})


def in_torch(specs: Mapping[str, GraphSpec]) -> Engines:
    """Returns the modules themselves, eager in f32: the reference for every export."""

    def opener(spec: GraphSpec) -> Callable[[], Engine]:
        inputs = [TensorInfo(name, tuple(spec.inputs[name].shape), "float32") for name in spec.input_names]
        return lambda: TorchEngine(spec.module, inputs, [TensorInfo(name, (), "float32") for name in spec.output_names])

    return Engines({name: opener(spec) for name, spec in specs.items()})


REMEMBERED = 512 * 2**20
"""Bytes of a group's outputs: tokens of 160 images of a ViT-L at 512x384."""


class Remembering:
    """A call that returns kept outputs for an equal `reuse`, up to a number of bytes; those used last are kept.

    Call `forget` when another group begins: `reuse` is unique only inside a group.
    """

    def __init__(self, call: Call, limit: int = REMEMBERED) -> None:
        self._call = call
        self._known: Lru[Hashable, Outputs] = Lru(_bytes_of, limit)

    def forget(self) -> None:
        """Drops everything that is remembered."""
        self._known.clear()

    def __call__(
        self, graph: str, feeds: Mapping[str, Any], *, reuse: Hashable | None = None, stay: bool = False
    ) -> Outputs:
        if reuse is None:
            return self._call(graph, feeds, stay=stay)
        return self._known.get((graph, reuse, stay), lambda: self._call(graph, feeds, reuse=reuse, stay=stay))


def _bytes_of(outputs: Outputs) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in outputs.values())


class Counting:
    """A call that counts the calls of each graph, whether their outputs are computed or remembered."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.calls: Counter[str] = Counter()

    def __call__(
        self, graph: str, feeds: Mapping[str, Any], *, reuse: Hashable | None = None, stay: bool = False
    ) -> Outputs:
        self.calls[graph] += 1
        return self._call(graph, feeds, reuse=reuse, stay=stay)


class Stopwatch:
    """A call that times every call of open engines. Host times include the copies to and from the device.

    `graphs`: milliseconds of each call by graph, since `reset`. `device_ms`: milliseconds of all calls together on the
    device, without copies; None where an engine does not measure it.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.reset()

    def reset(self) -> None:
        """Begins a new sample."""
        self.graphs: dict[str, list[float]] = defaultdict(list)
        self._device: list[float | None] = []

    @property
    def device_ms(self) -> float | None:
        return None if None in self._device else sum(part for part in self._device if part is not None)

    def __call__(
        self, graph: str, feeds: Mapping[str, Array], *, reuse: Hashable | None = None, stay: bool = False
    ) -> Outputs:
        begin = time.perf_counter_ns()
        found = self._engines(graph, feeds, stay=stay)
        self.graphs[graph].append((time.perf_counter_ns() - begin) / 1e6)
        self._device.append(self._engines.engines[graph].last_device_ms)
        return found


class Recorder:
    """A call that keeps the inputs of some graphs. Graphs that do not affect them are not run; they return zeros.

    recorded: their names. engines: those of the graphs that must run (`GraphUse.after`). graphs: all of them, for the
    output shapes of those that are not run. `feeds`: by graph numpy arrays, in the order of the calls.
    """

    def __init__(self, recorded: Iterable[str], engines: Engines, graphs: Mapping[str, Graph]) -> None:
        self._engines, self._graphs = engines, graphs
        self.feeds: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in recorded}

    def __call__(
        self, graph: str, feeds: Mapping[str, Any], *, reuse: Hashable | None = None, stay: bool = False
    ) -> Outputs:
        if graph in self.feeds:
            self.feeds[graph].append({name: on_host(array) for name, array in feeds.items()})
        if graph in self._engines.engines:
            return self._engines(graph, feeds, stay=stay)
        return _zeros(self._graphs[graph])


class Replaying:
    """A call that returns given outputs for one graph, in their order, and runs the graphs of `engines`.

    All other graphs, those before the replayed one, return zeros.
    """

    def __init__(self, graph: str, outputs: list[Outputs], engines: Engines, graphs: Mapping[str, Graph]) -> None:
        self._graph, self._outputs, self._engines, self._graphs = graph, iter(outputs), engines, graphs

    def __call__(
        self, graph: str, feeds: Mapping[str, Any], *, reuse: Hashable | None = None, stay: bool = False
    ) -> Outputs:
        if graph == self._graph:
            return next(self._outputs)
        if graph in self._engines.engines:
            return self._engines(graph, feeds, stay=stay)
        return _zeros(self._graphs[graph])


def calls_of(of: Family, workload: Workload, graphs: Mapping[str, Graph]) -> dict[str, int]:
    """Returns how often each graph runs for one sample; none is run for it."""
    with Engines({}) as none:
        counting = Counting(Recorder((), none, graphs))
        of.predict_part().predict(counting, of.data_part().example(workload), workload, 0)
    return dict(counting.calls)


def _zeros(graph: Graph) -> Outputs:
    return {info.name: np.zeros(info.shape, info.dtype) for info in graph.outputs}


def on_host(array: Array) -> np.ndarray:
    """Returns the values of an array in host memory."""
    return array.numpy() if isinstance(array, DeviceArray) else np.asarray(array)
