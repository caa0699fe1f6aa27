"""Compiles graphs for the CPU with OpenVINO at a precision that is read back, runs them, and reports their kernels."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from backends.base import (
    BackendError,
    Engine,
    Feeds,
    Graph,
    Kernel,
    Precision,
    TensorInfo,
    check_threads,
    known_options,
    sha256_files,
)
from backends.files import write_whole
from backends.openvino.flops import Node, Work, executed_kernels, nodes_of, planned_flops, works
from backends.openvino.linear import as_convolutions

OPTIONS: dict[str, Any] = {
    "threads": None,  # None: all cores that the process may use
    "rest": "best",  # float precision of what an int8 graph leaves unquantized: best, bf16 or f32
    "cache_dir": None,  # folder of compiled models; None: no cache
    "perf_count": False,  # count kernels while the engine runs (kernels() compiles its own engine otherwise)
    "as_convolutions": (),  # names of MatMuls that run as 1x1 convolutions, see backends.openvino.linear
    "snippets": True,  # False: no fused subgraphs, should a runtime version compute one wrongly
}
_PROFILED_RUNS = 3


def describe_ir(path: Path | str) -> Graph:
    """Returns names, static shapes and dtypes of an OpenVINO IR (`.xml` with `.bin` beside it)."""
    path = Path(path)
    model = read_model(path)
    inputs, outputs = _ports(model.inputs, path), _ports(model.outputs, path)
    return Graph(path, inputs, outputs, sha256_files(Graph(path, inputs, outputs, "").files()))


def read_model(path: Path) -> Any:
    """Returns the ov.Model of an ONNX or IR file. Raises BackendError when it cannot be read."""
    import openvino as ov

    if not path.is_file():
        raise BackendError(f"there is no graph file {path}")
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot read {path}: {str(error).strip().splitlines()[-1]}") from error


def write_ir(model: Any, target: Path) -> Graph:
    """Writes an ov.Model as IR with its weights as they are (not halved to f16), both files whole or not at all.

    Raises BackendError when the target is not named `.xml`, or cannot be written.
    """
    import openvino as ov

    if target.suffix != ".xml":
        raise BackendError(f"an OpenVINO graph is saved as .xml, got {target.name!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        made = Path(folder) / target.name
        try:
            ov.save_model(model, made, compress_to_fp16=False)
        except RuntimeError as error:  # an iostream error: the runtime keeps the reason to itself
            full = shutil.disk_usage(folder).free < 1_000_000
            reason = "the disk is full" if full else str(error).strip().splitlines()[-1]
            raise BackendError(f"cannot write {target}: {reason}") from error
        made.write_bytes(re.sub(rb">\s+<", b"><", made.read_bytes()))  # a third of the file is indentation
        made.with_suffix(".bin").replace(target.with_suffix(".bin"))
        made.replace(target)
    return describe_ir(target)


def best_float() -> Precision:
    """Returns bf16 where the CPU multiplies in bf16, else f32."""
    import openvino as ov

    return Precision.BF16 if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else Precision.F32


class OpenVINOEngine(Engine):
    """A compiled model with one stream and one request, tuned for latency.

    The asked precision is always given to the runtime and read back from the compiled model: its default on a bf16
    machine is bf16, silently. INT8 means: the graph's FakeQuantize nodes run in int8, the rest in `rest`.
    """

    def __init__(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> None:
        """Raises BackendError for an unknown option, a precision that graph or CPU lacks, or a failed compile."""
        self.graph = graph
        self.precision = precision
        self.options = known_options(options, OPTIONS, "openvino")
        check_threads(self.options["threads"])
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.rest = self._rest()
        model = self._read()
        _check_quantized(model, graph, precision)
        self._compiled: Any = self._compile(model, perf_count=bool(self.options["perf_count"]))
        self._request: Any = self._compiled.create_infer_request()
        counts = self.options["perf_count"]
        self._profiled: Any = self._compiled if counts else None  # the same model, compiled to count times
        self._counter: Any = self._request if counts else None  # its request
        self._counted = 0  # runs that it counted
        self._executed: tuple[str, ...] = ()  # its nodes that take time

    def _read(self) -> Any:
        model = read_model(self.graph.path)
        as_convolutions(model, set(self.options["as_convolutions"]))
        return model

    def _rest(self) -> Precision:
        best = best_float()
        rest = self.options["rest"]
        if rest not in ("best", Precision.BF16, Precision.F32):
            raise BackendError(f"option 'rest' must be 'best', 'bf16' or 'f32', got {rest!r}")
        asked = best if rest == "best" else Precision(rest)
        hint = asked if self.precision == Precision.INT8 else self.precision
        if hint not in (Precision.F32, Precision.BF16):
            raise BackendError(f"OpenVINO on this CPU runs floats in f32 or bf16, not {hint}")
        if hint == Precision.BF16 and best != Precision.BF16:
            raise BackendError("this CPU has no bf16 arithmetic: ask for f32")
        return hint

    def _settings(self, perf_count: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": str(self.rest),
            "EXECUTION_MODE_HINT": "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "PERF_COUNT": perf_count,
            # Otherwise weight-only graphs get their activations quantized on the fly.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if self.options["threads"]:
            settings["INFERENCE_NUM_THREADS"] = int(self.options["threads"])
        if self.options["cache_dir"] and not perf_count:  # a model from the cache has lost the names of what was fused
            # A folder per model, so that its files are not mixed with those of another model.
            about = f"{self.graph.sha256} {sorted(settings.items())} {list(self.options['as_convolutions'])}"
            key = sha256(about.encode()).hexdigest()[:16]
            settings["CACHE_DIR"] = str(Path(self.options["cache_dir"]) / key)
        if not self.options["snippets"]:
            settings["SNIPPETS_MODE"] = "DISABLE"
        return settings

    def _compile(self, model: Any, perf_count: bool) -> Any:
        import openvino as ov

        settings = self._settings(perf_count)
        cache = Path(settings["CACHE_DIR"]) if "CACHE_DIR" in settings else None
        if cache:
            _drop_untrusted(cache)
        try:
            try:
                compiled = ov.Core().compile_model(model, "CPU", settings)
            except RuntimeError:  # another process may have deleted the folder while this one used it
                if cache is None:
                    raise
                cache = None
                del settings["CACHE_DIR"]
                compiled = ov.Core().compile_model(model, "CPU", settings)
            if cache:
                _seal(cache)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise BackendError(f"OpenVINO cannot compile {self.graph.path.name}: {reason}") from error
        taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if taken != self.rest:
            raise BackendError(f"{self.graph.path.name}: asked OpenVINO for {self.rest}, it compiled {taken}")
        return compiled

    def _infer(self, feeds: Feeds) -> Feeds:
        if self._request is None:
            raise BackendError("this engine is closed")
        # Inputs are read in place; outputs live in the request, so they are copied out.
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        self._request.infer(arrays, share_inputs=True, share_outputs=True)
        if self.options["perf_count"]:
            self._count_run()
        found = {}
        for index, info in enumerate(self.outputs):
            array = self._request.get_output_tensor(index).data
            found[info.name] = np.array(array, dtype=np.float32 if array.dtype.kind == "f" else array.dtype)
        return found

    @property
    def loaded_from_cache(self) -> bool:
        """Returns whether the compiled model came from `cache_dir`."""
        return bool(self._compiled.get_property("LOADED_FROM_CACHE"))

    @property
    def threads(self) -> int:
        """Threads that the compiled model uses."""
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS"))

    def kernels(self) -> list[Kernel]:
        """Returns executed nodes with their precision, mean time (microseconds) and FLOPs.

        An engine that counts while it runs (`perf_count`) has the times of its runs so far. Others, and one that has
        not run, time a few runs on zeros: the first call compiles the model a second time, and `close` frees it. The
        first run of a compiled model is slow: who compares times leaves the first call out.
        """
        if self.options["perf_count"] and self._counted:
            totals = self._totals()
            spent = {name: totals[name] / self._counted for name in self._executed}
        else:
            found = self.node_times({t.name: np.zeros(t.shape, t.dtype) for t in self.inputs}, _PROFILED_RUNS)
            spent = {name: max(0.0, microseconds) for name, microseconds in found.items()}
        nodes, todo = self._described
        return executed_kernels(nodes, spent, todo, str(self.rest))

    @cached_property
    def _described(self) -> tuple[list[Node], list[Work]]:
        """Returns the nodes that are executed, and the work of the source model; who profiles asks in each round."""
        return nodes_of(self.runtime_model()), works(self._read())

    def node_times(self, feeds: Feeds, runs: int) -> dict[str, float]:
        """Runs the model and returns the mean microseconds of these runs by node; compiles as `kernels` does.

        The runtime tells the mean of all runs since it compiled, cut to whole microseconds, and calls what rounds to 0
        not executed. So what it told before these runs is taken off: run n of an engine is known to n microseconds, and
        a light node may come out below 0, which evens out in sums. The nodes are those that the first run executed.
        """
        if self._counter is None:
            self._counter = self._counting().create_infer_request()
        before = self._totals()
        for _ in range(runs):
            self._counter.infer(feeds, share_inputs=True, share_outputs=True)
            self._count_run()
        after = self._totals()
        return {name: (after[name] - before[name]) / runs for name in self._executed}

    def _count_run(self) -> None:
        self._counted += 1
        if not self._executed:
            self._executed = tuple(name for name, spent in self._totals().items() if spent)

    def _totals(self) -> Counter[str]:
        """Returns the microseconds of all counted runs by node."""
        totals: Counter[str] = Counter()
        for node in self._counter.profiling_info if self._counted else ():
            totals[node.node_name] += node.real_time // timedelta(microseconds=1) * self._counted
        return totals

    def runtime_model(self) -> Any:
        """Returns the ov.Model of the nodes that are executed; compiles as `kernels` does."""
        return self._counting().get_runtime_model()

    def _counting(self) -> Any:
        """Returns the model, compiled to count times."""
        if self._request is None:
            raise BackendError("this engine is closed")
        if self._profiled is None:
            self._profiled = self._compile(self._read(), perf_count=True)
        return self._profiled

    def planned_flops(self) -> float | None:
        return planned_flops(self._read())

    def save(self, path: Path | str) -> Graph:
        """Writes the engine's graph as IR at `path` (`.xml`), in full precision; `load` brings it back."""
        return write_ir(self._read(), Path(path))

    def write_form(self, path: Path) -> Graph | None:
        """Writes the graph as it runs, where that is another form than its file has, and returns it; else None."""
        return self.save(path) if self.options["as_convolutions"] else None

    @classmethod
    def load(cls, path: Path | str, precision: Precision, options: Mapping[str, Any] | None = None) -> Self:
        """Compiles an IR that `save` or a quantizer wrote."""
        return cls(describe_ir(path), precision, options)

    def close(self) -> None:
        self._request = None
        self._compiled = self._profiled = self._counter = None


_SEAL = "sha256.json"


def _drop_untrusted(folder: Path) -> None:
    """Empties a folder of compiled models unless every file is what `_seal` wrote down.

    The runtime does not look whether a compiled model is damaged: with a flipped byte it loads, and computes nonsense.
    """
    try:
        sealed = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        whole = sealed == _blobs(folder)
    except (OSError, ValueError):
        whole = False
    if not whole:
        shutil.rmtree(folder, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Writes down the sha256 of the compiled models in a folder. A cache that cannot be sealed is dropped next time."""
    with contextlib.suppress(OSError, BackendError):
        if not (folder / _SEAL).exists():
            write_whole(folder / _SEAL, json.dumps(_blobs(folder)).encode())


def _blobs(folder: Path) -> dict[str, str]:
    return {path.name: sha256_files([path]) for path in sorted(folder.glob("*.blob"))}


def _check_quantized(model: Any, graph: Graph, precision: Precision) -> None:
    quantized = any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    if precision == Precision.INT8 and not quantized and not graph.left_float:
        raise BackendError(f"{graph.path.name} holds no quantized operation: quantize it before compiling it as int8")
    if precision != Precision.INT8 and quantized:
        raise BackendError(f"{graph.path.name} is quantized and would run in int8: compile it as int8, not {precision}")


def _ports(ports: Any, path: Path) -> tuple[TensorInfo, ...]:
    found = []
    for port in ports:
        name = port.get_any_name()
        if not port.get_partial_shape().is_static:
            raise BackendError(f"{path}: the shape of {name!r} is dynamic ({port.get_partial_shape()})")
        found.append(TensorInfo(name, tuple(port.get_shape()), np.dtype(port.get_element_type().to_dtype()).name))
    return tuple(found)
