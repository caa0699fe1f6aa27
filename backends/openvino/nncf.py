"""Post-training quantization with NNCF: an ONNX or IR graph and calibration feeds -> an IR with int8 weights.

NNCF runs the float graph over the calibration set at f32, with all cores: once for SmoothQuant (when an alpha is
given) and once for the ranges, which fast bias correction shares; it reduces each activation to its statistics inside
the graph, so memory holds one item at a time. Full bias correction adds inferences of sub-graphs over a fifth of the
items.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends.base import BackendError, Feeds, Graph, Kernel, QuantSpec, Source, nearest
from backends.calibration import CalibrationItems
from backends.openvino.cpu import half_range, weight_range_notes
from backends.openvino.engine import OpenVINOEngine, read_model, write_ir
from backends.openvino.flops import CONVOLUTIONS, MATMULS, live_operations
from backends.openvino.passes import fold_constants, share_constants, split_tables
from backends.openvino.statistics import watched, weight_magnitudes
from backends.quantspec import check_common, check_left, lost_channels, nothing_left

if TYPE_CHECKING:
    import openvino as ov
    import torch

GROUPS = ("LayerNorm", "Softmax", "AttentionScales")
BIAS_CORRECTIONS = ("none", "fast", "full")
_NORMS = {"MVN", "ReduceMean", "SquaredDifference", "Power", "Sqrt"}
_SOFTMAX = {"Softmax", "LogSoftmax", "ScaledDotProductAttention"}
_SCALES = {"Multiply", "Divide"}
# Between queries and scores, and between scores and Softmax, stand only these: scale, mask, moves, rounding.
_BETWEEN = _SCALES | {"Add", "Subtract", "Transpose", "Reshape", "FakeQuantize", "Select", "Unsqueeze", "Squeeze"}


@dataclass
class Report:
    """What the last `quantize` did: passes over the calibration set, items of a pass, kept nodes, and whether the
    weights were held to half their range."""

    passes: int = 0
    items: int = 0
    kept: tuple[str, ...] = ()
    half_range: bool = False
    notes: tuple[str, ...] = ()


class NNCFQuantizer:
    """NNCF post-training quantization for OpenVINO. `report` tells what the last call consumed and kept."""

    name = "nncf"
    starts_from = "graph"
    sources: tuple[str, ...] = ("backends.openvino.nncf",)  # and what it imports

    def __init__(self, progress: bool = False) -> None:
        """`progress`: show NNCF's progress bars."""
        self.progress = progress
        self.report = Report()

    def notes(self) -> list[str]:
        """Sentences on the last `quantize` that belong beside its results."""
        return [*weight_range_notes(self.report.half_range), *self.report.notes]

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph:
        """Write `<spec.output_dir>/<source.name>.xml` and `.bin` (int8 weights) and return that graph.

        `calibration` is iterated several times (see the module), so it must be a collection or an object whose
        `__iter__` starts anew, not a generator; items are made, used and dropped one by one. Only the first
        `spec.calibration_samples` items are used. The same input gives the same bytes.
        Raises BackendError for a spec that NNCF cannot follow, a keep pattern without a match, a keep-list that leaves
        nothing, an empty calibration set, too few items, and an item that does not fit the graph's inputs or gives NaN
        or inf inside; nothing is written then.
        """
        import nncf

        check_spec(spec, source, "NNCF")
        _check_corrections(spec)
        model = read_model(source.graph.path)
        fold_constants(model)
        name_nodes(model)
        kept = kept_nodes(model, spec.keep)
        heavy = [op for op in live_operations(model) if op.get_type_name() in MATMULS | CONVOLUTIONS]
        check_left(source.name, (op.get_friendly_name() for op in heavy), kept, spec.keep)
        before = weight_magnitudes(model)
        items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)
        with _quiet(self.progress), watched(items):
            try:
                quantized = nncf.quantize(
                    model,
                    nncf.Dataset(items),
                    model_type=nncf.ModelType.TRANSFORMER,
                    preset=preset(spec),
                    subset_size=spec.calibration_samples,
                    fast_bias_correction=spec.bias_correction != "full",
                    ignored_scope=nncf.IgnoredScope(names=sorted(kept), validate=False),
                    advanced_parameters=advanced_parameters(spec),
                )
            except (nncf.ValidationError, nncf.InternalError, RuntimeError) as error:
                raise BackendError(f"NNCF cannot quantize {source.graph.path.name}: {error}") from error
        del model
        if not any(op.get_type_name() == "FakeQuantize" for op in quantized.get_ops()):
            raise nothing_left(source.name, spec.keep)
        split_tables(quantized)
        share_constants(quantized)
        name_nodes(quantized)
        after = weight_magnitudes(quantized)
        notes = lost_channels("NNCF", ((name, before[name], after[name]) for name in after if name in before))
        self.report = Report(items.passes, items.used, tuple(sorted(kept)), half_range(spec.weight_range), tuple(notes))
        return write_ir(quantized, spec.output_dir / f"{source.name}.xml")

    def prepare(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> torch.nn.Module:
        """A trainable copy of `source.module` that rounds as the int8 engine will: see `qat.prepare`."""
        from backends.openvino import qat

        module, self.report = qat.prepare(source, spec, calibration)
        return module

    def finish(self, module: torch.nn.Module, source: Source, spec: QuantSpec) -> Graph:
        """The IR with int8 weights of a module that was prepared and trained: see `qat.finish`."""
        from backends.openvino import qat

        return qat.finish(module, source, spec)


def kept_nodes(model: ov.Model, keep: Sequence[str]) -> dict[str, str]:
    """Names and types of the nodes that a keep-list protects. An entry is a group or a regex searched in node names.

    Groups: LayerNorm (normalisation and its scale and shift), Softmax (also inside ScaledDotProductAttention),
    AttentionScales (the score matmul QK^T and its scaling). A group may be absent from a model.
    Raises BackendError for a regex that is invalid or matches no node.
    """
    nodes = live_operations(model)
    by_name = {op.get_friendly_name(): op for op in nodes}
    found: dict[str, str] = {}
    for entry in keep:
        if entry in GROUPS:
            chosen = _group(entry, nodes)
        else:
            try:
                pattern = re.compile(entry)
            except re.error as error:
                raise BackendError(f"keep entry {entry!r} is not a valid regular expression: {error}") from error
            chosen = [op for name, op in by_name.items() if pattern.search(name)]
            if not chosen:
                hint = nearest(entry, [*GROUPS, *by_name])
                raise BackendError(f"keep entry {entry!r} matches no node{hint}; groups are {list(GROUPS)}")
        found.update((op.get_friendly_name(), op.get_type_name()) for op in chosen)
    return found


def _group(group: str, nodes: list[ov.Node]) -> list[ov.Node]:
    if group == "LayerNorm":
        norms = [op for op in nodes if op.get_type_name() in _NORMS]
        for norm in [op for op in norms if op.get_type_name() == "MVN"]:
            norms += _affine(norm)
        return norms
    if group == "Softmax":
        return [op for op in nodes if op.get_type_name() in _SOFTMAX]
    live = {op.get_friendly_name() for op in nodes}
    found = [op for op in nodes if op.get_type_name() == "ScaledDotProductAttention"]
    for softmax in [op for op in nodes if op.get_type_name() in ("Softmax", "LogSoftmax")]:
        above = _walk_up(softmax.input_value(0).get_node(), live)
        for score in [op for op in above if op.get_type_name() == "MatMul"]:
            operands = [value.get_node() for value in score.input_values()]
            if all(op.get_friendly_name() in live for op in operands):
                found.append(score)
                for operand in operands:
                    above += _walk_up(operand, live)
        found += [op for op in above if op.get_type_name() in _SCALES]
    return found


def _affine(norm: ov.Node) -> list[ov.Node]:
    """The Multiply and the Add by constants that directly follow a normalisation."""
    found: list[ov.Node] = []
    last = norm
    for kind in ("Multiply", "Add"):
        users = [port.get_node() for port in last.output(0).get_target_inputs()]
        if len(users) != 1 or users[0].get_type_name() != kind:
            break
        last = users[0]
        found.append(last)
    return found


def _walk_up(node: ov.Node, live: set[str]) -> list[ov.Node]:
    """`node` and what feeds it, through scales, masks and moves; the first other node ends the walk.

    A Multiply or Divide counts only as a scale, by one number: rotary embeddings multiply by tables.
    """
    found: list[ov.Node] = []
    while node.get_friendly_name() in live:
        kind = node.get_type_name()
        feeding = [value.get_node() for value in node.input_values()]
        alive = [op for op in feeding if op.get_friendly_name() in live]
        if kind in _SCALES and (len(alive) != 1 or not _scalar_beside(node, alive[0])):
            break
        found.append(node)
        if kind not in _BETWEEN or not alive:
            break
        node = alive[0]
    return found


def _scalar_beside(node: ov.Node, alive: ov.Node) -> bool:
    others = [v for v in node.input_values() if v.get_node().get_friendly_name() != alive.get_friendly_name()]
    return all(v.get_partial_shape().is_static and _elements(v) == 1 for v in others)


def _elements(value: Any) -> int:
    count = 1
    for size in value.get_shape():
        count *= size
    return count


def check_keep(engine: OpenVINOEngine, keep: Sequence[str], kernels: Sequence[Kernel] | None = None) -> list[Kernel]:
    """Executed int8 kernels that hold a kept node: empty when the keep-list was honoured by the engine.

    `kernels` spares a second profile when they are already known. Elementwise nodes, Softmax and normalisations
    fused into a matmul, a convolution or a Subgraph are computed there in float, whatever the kernel's name says:
    for those only matmuls, convolutions and attention count. Kernels of any other type count with all their nodes.
    """
    kept = kept_nodes(read_model(engine.graph.path), keep)
    heavy = {name for name, kind in kept.items() if kind in MATMULS | CONVOLUTIONS}
    fusing = {"Subgraph", "FullyConnected", "MatMul", "Convolution", "Deconvolution"}
    offending = []
    for kernel in engine.kernels() if kernels is None else kernels:
        names = heavy if kernel.type in fusing else kept.keys()
        if kernel.precision == "int8" and not names.isdisjoint(kernel.originals):
            offending.append(kernel)
    return offending


def name_nodes(model: ov.Model) -> None:
    """Replace automatic names such as `MVN_45`, which count all nodes a process ever made, by `MVN.<position>`."""
    taken = {op.get_friendly_name() for op in model.get_ops()}
    for index, op in enumerate(model.get_ordered_ops()):
        name, kind = op.get_friendly_name(), op.get_type_name()
        # A folded constant keeps the name of the operation it replaces.
        automatic = r"[A-Za-z0-9]+_\d+" if kind == "Constant" else rf"{re.escape(kind)}_\d+"
        if re.fullmatch(automatic, name) and kind not in ("Parameter", "Result"):
            new = f"{kind}.{index}"
            while new in taken:
                new += "+"
            taken.add(new)
            op.set_friendly_name(new)


def check_spec(spec: QuantSpec, source: Source, tool: str) -> None:
    """Raises BackendError for what no quantizer of OpenVINO follows; `tool` is who cannot."""
    if (spec.bits_w, spec.bits_a) != (8, 8):
        raise BackendError(f"{tool} quantizes to 8-bit weights and activations here, not W{spec.bits_w}A{spec.bits_a}")
    if spec.weights not in ("per_channel", "per_tensor"):
        raise BackendError(f"weights must be 'per_channel' or 'per_tensor', got {spec.weights!r}")
    if spec.activations != "per_tensor":
        raise BackendError(f"activations must be 'per_tensor' for OpenVINO, got {spec.activations!r}")
    check_common(spec, source)


def _check_corrections(spec: QuantSpec) -> None:
    if spec.bias_correction not in BIAS_CORRECTIONS:
        hint = nearest(spec.bias_correction, BIAS_CORRECTIONS)
        raise BackendError(
            f"bias_correction must be one of {list(BIAS_CORRECTIONS)}, got {spec.bias_correction!r}{hint}"
        )
    alpha = spec.smooth_quant_alpha
    if alpha is not None and not 0 <= alpha <= 1:
        raise BackendError(f"smooth_quant_alpha must lie in [0, 1] or be null, got {alpha}")


def preset(spec: QuantSpec) -> Any:
    """NNCF's name of symmetric activations (PERFORMANCE) or asymmetric ones (MIXED)."""
    import nncf

    presets = nncf.QuantizationPreset
    return presets.PERFORMANCE if spec.symmetric_activations else presets.MIXED


def advanced_parameters(spec: QuantSpec) -> Any:
    """What a spec asks of NNCF beyond the arguments of `nncf.quantize`."""
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
        QuantizationParameters,
    )

    # A negative alpha is NNCF's way to say: off.
    alpha = -1.0 if spec.smooth_quant_alpha is None else spec.smooth_quant_alpha
    return AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.ENABLE if half_range(spec.weight_range) else OverflowFix.DISABLE,
        disable_bias_correction=spec.bias_correction == "none",
        smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=alpha, convolution=-1.0),
        weights_quantization_params=QuantizationParameters(per_channel=spec.weights == "per_channel"),
        activations_quantization_params=QuantizationParameters(per_channel=False),
    )


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """NNCF logs and draws progress bars on stdout, where a command prints its result.

    Its own `set_log_level` would change the handlers of the whole process, so the level of its logger is set here.
    """
    import nncf  # noqa: F401  (it sets up its logger when it is imported)
    import rich

    console, logger = rich.get_console(), logging.getLogger("nncf")
    before = console.quiet, logger.level
    console.quiet = not progress
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        console.quiet = before[0]
        logger.setLevel(before[1])
