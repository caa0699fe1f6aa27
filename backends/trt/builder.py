"""Builds TensorRT plans: ONNX -> strongly typed network -> plan file with a manifest; also float graphs of 16 bits.

TensorRT-RTX builds plans without a CUDA device; TensorRT itself needs one. Neither quantizes by itself: int8 and fp8
are what the Q/DQ nodes of the graph say. Two builds of one graph differ in their bytes, so a cached plan is found by
what made it and trusted by the sha256 in its manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.base import BackendError, Graph, Precision, first_line, sha256_files
from backends.files import write_whole
from backends.trt.cuda import devices

OPTIONS: dict[str, Any] = {
    "target": None,  # compute capability such as '8.9'; None: the device that is here, else 8.9 ahead of time
    "workspace_mb": 4096,  # most device memory that a layer may use for its work
    "optimization_level": None,  # 0 (quick build) to 5 (quick engine); None: the builder's default
    "timing_cache": True,  # keep measured tactics in `cache_dir`; TensorRT-RTX measures none ahead of time
    "cache_dir": None,  # folder of plans; None: build anew
}
AHEAD_OF_TIME_TARGET = "8.9"
PACKAGES = ("tensorrt", "tensorrt_rtx_bindings", "tensorrt_rtx")
_SUPPORTED = (
    "supported are int8 and fp8 Q/DQ with zero point 0, per tensor on activations and per tensor or per output channel "
    "on weights, int4 weights in blocks, and float operators up to opset 21"
)
# What every call reports on a machine without a driver, beside the reason that matters.
_NO_DRIVER = re.compile(r"\[?checkMacros|cudaError 35|CUDA initialization failure|Unable to determine GPU memory")


def package() -> str | None:
    """Returns the TensorRT package that can build here: `tensorrt` only with a CUDA device, else a TensorRT-RTX one."""
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    if not devices():
        found = [name for name in found if name != "tensorrt"]
    return found[0] if found else None


def load() -> Any:
    """Imports TensorRT. Raises BackendError when there is none, or when its libraries do not load."""
    name = package()
    if name is None:
        raise BackendError("no TensorRT package that can build here is installed")
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"the package {name} cannot be loaded: {error}") from error
    if not hasattr(module, "Builder"):
        raise BackendError(f"the package {name} holds no TensorRT: its libraries are missing")
    return module


def flavour(module: Any) -> str:
    """Returns 'TensorRT-RTX' or 'TensorRT'."""
    return "TensorRT-RTX" if "rtx" in module.__name__ else "TensorRT"


def make_logger(module: Any) -> Any:
    """Returns a TensorRT logger that prints nothing; `errors` holds the messages of the current call, in order."""

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR) and not _NO_DRIVER.search(message):
                self.errors.append(message)

    return Logger()


def check_options(options: Mapping[str, Any]) -> None:
    """Raises BackendError for a value out of its range."""
    workspace, level, target = options["workspace_mb"], options["optimization_level"], options["target"]
    if isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 1:
        raise BackendError(f"option 'workspace_mb' must be a whole number from 1, got {workspace!r}")
    if level is not None and (isinstance(level, bool) or level not in range(6)):
        raise BackendError(f"option 'optimization_level' must be 0 to 5 or null, got {level!r}")
    if target is not None and not (isinstance(target, str) and re.fullmatch(r"\d+\.\d", target)):
        raise BackendError(f"option 'target' must be a compute capability such as '8.9', or null, got {target!r}")


def build_plan(graph: Graph, options: Mapping[str, Any], folder: Path, tf32: bool = False) -> Path:
    """Builds (or finds) `<folder>/<stem>-<key>.plan` and its `.json` manifest; returns the plan's path.

    `tf32`: products of 32-bit floats may be rounded to TF32, which TensorRT allows by default and f32 is not.
    The key is made of the graph's sha256, the options and TensorRT's version. The graph is parsed from its file, so its
    weights may lie beside it and exceed 2 GB. Raises BackendError that names the node and the reason when the graph is
    refused, and when the target is not one that this TensorRT builds for.
    """
    module = load()
    target = _target(module, options["target"])
    made_of = {
        "graph_sha256": graph.sha256 or sha256_files(graph.files()),
        "tensorrt": flavour(module),
        "version": module.__version__,
        "target": target,
        "workspace_mb": options["workspace_mb"],
        "optimization_level": options["optimization_level"],
        "tf32": tf32,
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    plan = folder / f"{graph.path.stem}-{key}.plan"
    with contextlib.suppress(BackendError, KeyError):
        if read_manifest(plan)["plan_sha256"] == sha256_files([plan]):
            return plan
    start = time.monotonic()
    timing = folder / f"timing-{target}-{module.__version__}.cache" if options["timing_cache"] else None
    blob = _serialize(module, graph, made_of, timing)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(plan, memoryview(blob))
    manifest = {
        **made_of,
        "graph": graph.path.name,
        "plan_sha256": sha256_files([plan]),
        "size_bytes": plan.stat().st_size,
        "seconds": round(time.monotonic() - start, 3),
    }
    write_whole(plan.with_suffix(".json"), (json.dumps(manifest, indent=2) + "\n").encode())
    return plan


def read_manifest(plan: Path) -> dict[str, Any]:
    """Returns a plan's manifest. Raises BackendError when the plan or its manifest is missing or damaged."""
    try:
        manifest = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendError(f"{plan} has no readable manifest {plan.with_suffix('.json').name} beside it") from error
    if not plan.is_file() or not isinstance(manifest, dict):
        raise BackendError(f"there is no plan {plan}, or its manifest is damaged")
    return manifest


def half_graph(graph: Graph, precision: Precision, folder: Path) -> Graph:
    """Writes `graph` with f16 or bf16 arithmetic into `folder`; its inputs and outputs stay float32.

    Converted by ModelOpt's AutoCast, every operator. Raises BackendError for a graph that it cannot convert; it needs
    the whole graph in one protobuf, so 2 GB is its limit.
    """
    import onnx

    from backends.exchange import describe_onnx
    from backends.quiet import quiet

    if graph.path.with_name(graph.path.name + ".data").exists():
        raise BackendError(f"{graph.path.name} keeps its weights outside, and is too large to be converted to 16 bits")
    target = folder / f"{graph.path.stem}-{precision}.onnx"
    with quiet():
        from modelopt.onnx.autocast.convert import convert_to_f16

        try:
            kind = {Precision.F16: "fp16", Precision.BF16: "bf16"}[precision]
            model = convert_to_f16(onnx.load(str(graph.path)), low_precision_type=kind, keep_io_types=True)
        except Exception as error:
            raise BackendError(f"{graph.path.name} cannot be converted to {precision}: {first_line(error)}") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(target, model.SerializeToString(deterministic=True))
    return describe_onnx(target)


def _target(module: Any, asked: str | None) -> str:
    here = devices()
    target = asked or (here[0].capability if here else AHEAD_OF_TIME_TARGET)
    if flavour(module) == "TensorRT":
        if target != here[0].capability:
            raise BackendError(f"TensorRT builds for the device that is here ({here[0].capability}), not for {target}")
        return target
    known = [name for name in dir(module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    if f"SM{target.replace('.', '')}" not in known:
        names = sorted(f"{name[2:-1]}.{name[-1]}" for name in known)
        raise BackendError(f"TensorRT-RTX {module.__version__} does not build for {target}; it knows {names}")
    return target


def _serialize(module: Any, graph: Graph, made_of: Mapping[str, Any], timing: Path | None) -> Any:
    logger = make_logger(module)
    title = f"{made_of['tensorrt']} {made_of['version']}"
    try:
        builder = module.Builder(logger)
    except TypeError as error:  # the binding's way to say that there is no builder
        raise BackendError(f"{title} cannot start: {_last(logger.errors)}") from error
    # TensorRT 10 needs the flag; 11 and RTX build no other kind of network, with it or without.
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph.path)):
        raise BackendError(_refused(title, graph, parser, logger.errors))
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    flag = module.BuilderFlag.TF32  # set by default
    config.set_flag(flag) if made_of["tf32"] else config.clear_flag(flag)
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, made_of["workspace_mb"] << 20)
    if made_of["optimization_level"] is not None:
        config.builder_optimization_level = made_of["optimization_level"]
    if made_of["tensorrt"] == "TensorRT-RTX":
        config.num_compute_capabilities = 1
        capability = getattr(module.ComputeCapability, f"SM{made_of['target'].replace('.', '')}")
        config.set_compute_capability(capability, 0)
        timing = None
    if timing is not None:
        cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise BackendError(f"{title} cannot build {graph.path.name}: {_last(logger.errors)}; {_SUPPORTED}")
    if timing is not None:
        timing.parent.mkdir(parents=True, exist_ok=True)
        write_whole(timing, memoryview(config.get_timing_cache().serialize()))
    return blob


def _refused(title: str, graph: Graph, parser: Any, errors: list[str]) -> str:
    if not parser.num_errors:
        return f"{title} cannot read {graph.path}: {_last(errors)}"
    found = parser.get_error(0)
    lines = [line.strip() for line in found.desc().splitlines()]
    reason = next((s for s in lines if s and not _NO_DRIVER.search(s) and not s.startswith("Invalid Node")), lines[0])
    if not found.node_name() and not found.node_operator():
        return f"{title} cannot read {graph.path}: {reason}"
    node = f"node {found.node_name()!r} ({found.node_operator()})"
    return f"{title} refuses {node} of {graph.path.name}: {reason}; {_SUPPORTED}"


def _last(errors: list[str]) -> str:
    return errors[0].strip().splitlines()[0] if errors else "it gives no reason"
