"""Runs the references that engines are checked against: torch eager and ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends import flops
from backends.base import (
    Availability,
    BackendError,
    Engine,
    Feeds,
    Graph,
    Kernel,
    Precision,
    Quantizer,
    TensorInfo,
    Unavailable,
    check_threads,
    known_options,
)

if TYPE_CHECKING:
    import torch

OPTIONS: dict[str, Any] = {"threads": None, "optimize": True, "fuse_qdq": True}
_REMEDY = 'pip install -e "."'


class TorchEngine(Engine):
    """A torch module run eagerly on the device its weights are on, in float32 or under bf16 autocast.

    `kernels()` is empty: eager torch chooses its kernels call by call and does not report what they computed in.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Sequence[TensorInfo],
        outputs: Sequence[TensorInfo],
        precision: Precision = Precision.F32,
    ) -> None:
        """Takes `inputs` in the order of the module's arguments, `outputs` in the order of what it returns."""
        if precision not in (Precision.F32, Precision.BF16):
            raise BackendError(f"torch eager runs in f32 or bf16, not {precision}")
        self.module: torch.nn.Module | None = module
        self.precision = precision
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def _infer(self, feeds: Feeds) -> Feeds:
        import torch

        if self.module is None:
            raise BackendError("this engine is closed")
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        tensors = [torch.from_numpy(np.ascontiguousarray(feeds[t.name])).to(device) for t in self.inputs]
        bf16 = self.precision == Precision.BF16
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            result = self.module(*tensors)
        results = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        if len(results) != len(self.outputs):
            raise BackendError(f"the module returned {len(results)} outputs, {len(self.outputs)} are named")
        return {t.name: r.float().cpu().numpy().copy() for t, r in zip(self.outputs, results, strict=True)}

    def kernels(self) -> list[Kernel]:
        return []

    def close(self) -> None:
        self.module = None


class OnnxRuntimeEngine(Engine):
    """An ONNX file in ONNX Runtime's CPU provider.

    Options: `threads` (None: all cores), `optimize` (graph level), `fuse_qdq`: False computes what Q/DQ nodes
    enclose in floats, as the nodes are defined, and not with this CPU's int8 kernels, whose sums may saturate.
    """

    def __init__(self, graph: Graph, options: Mapping[str, Any] | None = None) -> None:
        """Raises BackendError when the graph is not ONNX or the runtime refuses it."""
        if graph.format != "onnx":
            raise BackendError(f"ONNX Runtime reads ONNX files, {graph.path.name} is {graph.format}")
        self.graph = graph
        self.options = known_options(options, OPTIONS, "reference")
        check_threads(self.options["threads"])
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self._session: Any = self._start(profile_prefix=None)

    def _start(self, profile_prefix: Path | None) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        if self.options["threads"]:
            settings.intra_op_num_threads = int(self.options["threads"])
        levels = onnxruntime.GraphOptimizationLevel
        settings.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if self.options["optimize"] else levels.ORT_DISABLE_ALL
        )
        # Other work runs beside it on the same cores: a thread that waits must not spin there.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Otherwise weight-only graphs get their activations quantized on the fly.
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if not self.options["fuse_qdq"]:
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        if profile_prefix is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile_prefix)
        # It drops a Relu in front of every QuantizeLinear to fp8, as if that had no negative values.
        wrong = [] if self.options["fuse_qdq"] else ["ReluQuantRewrite"]
        try:
            return onnxruntime.InferenceSession(
                str(self.graph.path), settings, providers=["CPUExecutionProvider"], disabled_optimizers=wrong
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {self.graph.path.name}: {error}") from error

    def _run(self, session: Any, feeds: Feeds) -> Feeds:
        names = [t.name for t in self.outputs]
        return {n: _floats(a) for n, a in zip(names, session.run(names, dict(feeds)), strict=True)}

    def _infer(self, feeds: Feeds) -> Feeds:
        if self._session is None:
            raise BackendError("this engine is closed")
        return self._run(self._session, feeds)

    def kernels(self) -> list[Kernel]:
        """Profiles one run on zeros in a session of its own. Matmul and convolution nodes carry FLOPs as executed."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._start(Path(folder) / "run")
            self._run(session, {t.name: np.zeros(t.shape, t.dtype) for t in self.inputs})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        weights = _weight_shapes(self.graph.path)
        return [_kernel(e, weights) for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]

    def close(self) -> None:
        self._session = None


class ReferenceBackend:
    """ONNX Runtime behind the same contract as the toolchains; float32 only, quantizes nothing."""

    name = "reference"
    sources: tuple[str, ...] = ("backends.reference",)

    def availability(self) -> Availability:
        try:
            versions = {name: metadata.version(name) for name in ("torch", "onnx", "onnxruntime")}
            import onnxruntime
        except (ImportError, metadata.PackageNotFoundError) as error:
            return Availability(available=False, reason=f"a package is missing: {error}", remedy=_REMEDY)
        devices = ("CPU",) if "CPUExecutionProvider" in onnxruntime.get_available_providers() else ()
        return Availability(available=True, devices=devices, versions=versions)

    def quantizers(self) -> Mapping[str, Quantizer]:
        return {}

    def float_precisions(self) -> Sequence[Precision]:
        return [Precision.F32]

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine:
        """Compiles an ONNX graph; options as `OPTIONS`. INT8 is accepted: the file's Q/DQ nodes say what is int8."""
        found = self.availability()
        if not found.available:
            raise Unavailable(f"backend 'reference' cannot run: {found.reason}; {found.remedy}")
        if precision not in (Precision.F32, Precision.INT8):
            raise BackendError(f"backend 'reference' compiles f32 and int8 files, not {precision}")
        return OnnxRuntimeEngine(graph, options)

    def kept_in_int8(self, engine: Engine, keep: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
        """Raises BackendError: the reference quantizes nothing, so it has no keep-list to honour."""
        raise BackendError("backend 'reference' has no quantizer and therefore no keep-list")


def _floats(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _kernel(event: dict[str, Any], weights: Mapping[str, list[int]]) -> Kernel:
    """Returns the kernel of a node event of ONNX Runtime's profile; `weights`: weight shapes of the file's nodes."""
    args = event["args"]
    kind = args.get("op_name", "unknown")
    integer = kind.startswith("QLinear") or "Integer" in kind or kind == "QGemm"
    shapes_in = [next(iter(shape.values())) for shape in args.get("input_type_shape", [])]
    shapes_out = [next(iter(shape.values())) for shape in args.get("output_type_shape", [])]
    dtypes = {dtype for shape in args.get("output_type_shape", []) for dtype in shape}
    name = event["name"].removesuffix("_kernel_time")
    return Kernel(
        name=name,
        type=kind,
        implementation=args.get("provider", ""),
        precision="int8" if integer else {"float": "f32", "float16": "f16"}.get(min(dtypes, default=""), "other"),
        time_us=float(event["dur"]),
        flops=_flops(kind, shapes_in, shapes_out, weights.get(name)),
        originals=(name,),
    )


def _flops(kind: str, inputs: list[list[int]], outputs: list[list[int]], weight: list[int] | None) -> float:
    """Counts two FLOPs per multiply-add, of the shapes that ran: channels padded to the vector width count.

    The profile leaves out weights that were packed at load time, so the file's shapes replace them.
    """
    if not inputs or not outputs or len(inputs[0]) < 2 or not math.prod(outputs[0]):
        return 0.0
    if "MatMul" in kind or "Gemm" in kind:
        return flops.matmul(outputs[0], inputs[0][-1])
    if "Conv" not in kind:
        return 0.0
    kernel = next((shape for shape in inputs[1:] if len(shape) == len(inputs[0])), weight)
    if kernel is None:
        return 0.0
    return flops.convolution(inputs[0], outputs[0], kernel[1:], "Transpose" in kind)


def _weight_shapes(path: Path) -> dict[str, list[int]]:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    dims = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    return {node.name: dims[node.input[1]] for node in graph.node if len(node.input) > 1 and node.input[1] in dims}
