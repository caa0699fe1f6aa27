"""Trains quantized modules with NNCF: a torch module that computes as its int8 engine will, and that engine's IR.

NNCF chooses where values are rounded and calibrates the ranges, on the torch module, as it does for a graph after
training. Its quantizers then make way for `FakeQuantizer`s: these round exactly as the exported graph does, learn their
steps, run on every device without building an extension first, and keep weights to half their range where that is
asked (NNCF has this for OpenVINO graphs only). NNCF still runs them: they are its hooks.

The trained module is written as ONNX with Q/DQ pairs, so that every node has the name that post-training quantization
knows it by, and that file becomes an IR with int8 weights.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from backends.base import BackendError, Feeds, Graph, QuantSpec, Source
from backends.calibration import CalibrationItems, check_finite
from backends.cpu import half_range
from backends.exchange import export
from backends.keep import GROUPS
from backends.openvino.engine import read_model, write_ir
from backends.openvino.flops import CONVOLUTIONS, MATMULS, is_quantized
from backends.openvino.keep import kept_nodes, name_nodes
from backends.openvino.matching import attention_where_allowed, quick_matching
from backends.openvino.nncf_settings import Report, advanced_parameters, check_spec, preset
from backends.openvino.passes import fold_constants, share_constants, split_tables
from backends.quantspec import check_left, lost_channels, module_of, nothing_left
from backends.quiet import quiet

if TYPE_CHECKING:
    import openvino as ov

_HALF = 63
"""Largest magnitude of a weight that keeps to 7 of its 8 bits."""
_PACE = 10
"""How many times the learning rate a step may change by, relative to itself: Adam moves weights by a larger share."""
# Operations with work for int8 kernels, as NNCF names them, and the ONNX nodes that each becomes, in order.
_HEAVY = {
    "linear": ("MatMul", "Gemm"),
    "matmul": ("MatMul",),
    "bmm": ("MatMul",),
    "conv1d": ("Conv",),
    "conv2d": ("Conv",),
    "conv3d": ("Conv",),
    "conv_transpose1d": ("ConvTranspose",),
    "conv_transpose2d": ("ConvTranspose",),
    "conv_transpose3d": ("ConvTranspose",),
    "scaled_dot_product_attention": ("MatMul",),
}


class _Round(torch.autograd.Function):
    """Rounding whose gradient passes straight through inside the range, and the gradient of a quantizer's `stretch`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: torch.Tensor, stretch: torch.Tensor, grid: FakeQuantizer) -> Any:
        if grid.axis is None:
            y, inside = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
                x, step, grid.zero, torch.ones_like(step), grid.low, grid.high
            )
        else:
            y, inside = torch.ops.aten.fake_quantize_per_channel_affine_cachemask(
                x, step, grid.zero, grid.axis, grid.low, grid.high
            )
        ctx.save_for_backward(x, y, inside)
        ctx.axis = grid.axis
        ctx.factor = 1 / math.sqrt(x.numel() / step.numel() * grid.high)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, y, inside = ctx.saved_tensors
        through = grads[0] * inside
        # dy/dstep = round(x/step) - x/step inside the range, its end outside of it; times step: y - x, and y.
        moved = grads[0] * y - through * x
        others = [axis for axis in range(x.dim()) if axis != ctx.axis]
        by_step = moved.sum().reshape(1) if ctx.axis is None else moved.sum(others)
        return through, None, _PACE * ctx.factor * by_step, None


class FakeQuantizer(nn.Module):
    """x -> step * (clamp(round(x / step) + zero, low, high) - zero), for a tensor or for each slice along an axis.

    The step is the calibrated `start`, of shape (1,) or (slices,), times e to _PACE times the learned `stretch`: so one
    learning rate fits every range, and weight decay pulls towards calibration. Gradients are those of LSQ (Esser et
    al., ICLR 2020, sections 2.1 and 2.2), with its factor 1/sqrt(N * high) for the N values that share a step.
    Computed in float32, whatever the input's type.
    """

    start: torch.Tensor
    zero: torch.Tensor

    def __init__(self, start: torch.Tensor, zero: torch.Tensor, low: int, high: int, axis: int | None) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("zero", zero)
        self.stretch = nn.Parameter(torch.zeros_like(start))
        self.low, self.high, self.axis = low, high, axis

    def step(self) -> torch.Tensor:
        """Returns the present step, without gradient."""
        return self.start * (_PACE * self.stretch.detach()).exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _Round.apply(x.float(), self.step(), self.stretch, self).to(x.dtype)


class _Fixed(nn.Module):
    """A trained FakeQuantizer in the operations that exporters know, over the whole range of 8 bits."""

    step: torch.Tensor
    zero: torch.Tensor

    def __init__(self, trained: FakeQuantizer) -> None:
        super().__init__()
        self.register_buffer("step", trained.step())
        self.register_buffer("zero", trained.zero)
        self.low, self.high = (0, 255) if trained.low == 0 else (-128, 127)
        self.axis = trained.axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, self.low, self.high)
        return torch.fake_quantize_per_channel_affine(x, self.step, self.zero, self.axis, self.low, self.high)


def prepare(source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> tuple[nn.Module, Report]:
    """Returns a trainable copy of `source.module` that rounds as its engine will, its ranges calibrated, and a report.

    The module takes and returns what `source.module` does, at any batch and size that this runs at; all its parameters
    are trainable. `calibration` as for `NNCFQuantizer.quantize`. Biases are trained, so `bias_correction` does not
    apply. The same input gives the same module.
    Raises BackendError for a spec that NNCF cannot follow, a source without module or ONNX graph, a keep pattern
    without a match, a keep-list that leaves nothing, and a calibration set that is empty, too small, does not fit or
    gives NaN or inf inside.
    """
    import nncf
    from nncf.torch.function_hook.wrapper import get_hook_storage

    module, names = _check(source, spec), list(source.example)
    example = tuple(torch.as_tensor(value) for value in source.example.values())
    kept, ignored = _ignored(module, example, source, spec)
    weighted = [(name, part) for name, part in module.named_modules() if _has_matrix(part)]
    items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)

    def inputs(feeds: Feeds) -> Any:
        tensors = tuple(torch.from_numpy(feeds[name]) for name in names)
        return tensors if len(tensors) > 1 else tensors[0]

    # biases are trained, and the range of weights is halved below
    plain = dataclasses.replace(spec, bias_correction="none", weight_range="full")
    with quiet(), quick_matching(), attention_where_allowed(spec.keep):
        try:
            prepared: nn.Module = nncf.quantize(
                module,
                nncf.Dataset(items, inputs),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=preset(spec),
                target_device=nncf.TargetDevice.CPU,
                subset_size=spec.calibration_samples,
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
                advanced_parameters=advanced_parameters(plain),
            )
        except (nncf.ValidationError, nncf.InternalError, RuntimeError) as error:
            check_finite(module, weighted, names, items)  # is it an item that it cannot take?
            raise BackendError(f"NNCF cannot quantize the module {source.name!r}: {error}") from error
    half = half_range(spec.weight_range)
    storage, made = get_hook_storage(prepared), dict[int, FakeQuantizer]()
    for name, quantizer in list(storage.named_hooks(remove_duplicate=False)):
        if id(quantizer) not in made:
            made[id(quantizer)] = _learner(quantizer, half and name.startswith("pre_hooks."))
        storage.set_submodule(name, made[id(quantizer)])
    if not made:
        raise nothing_left(source.name, spec.keep)
    if not all(bool(torch.isfinite(quantizer.start).all()) for quantizer in made.values()):
        check_finite(module, weighted, names, items)
        raise BackendError(f"NNCF measured a range of the module {source.name!r} that is not finite")
    _one_per_weight(prepared, example)
    notes = lost_channels("NNCF", _weight_steps(prepared, example))
    report = Report(items.passes, items.used, tuple(sorted(kept)), half, tuple(notes))
    return prepared.requires_grad_(True), report


def finish(module: nn.Module, source: Source, spec: QuantSpec) -> Graph:
    """Writes the trained `module` as `<spec.output_dir>/<source.name>.xml` and `.bin` with int8 weights; returns it.

    `module` comes from `prepare` with the same source and spec; it is left as it is. Its learned steps become the
    engine's. The engine's outputs are those of the module up to values that fall on the other side of a rounding
    limit, because sums are added in another order: for one layer nothing, through a whole network a mean difference of
    about the quantization error itself.
    Raises BackendError when the module cannot be exported, or when the keep-list is not honoured.
    """
    from openvino._offline_transformations import compress_quantize_weights_transformation

    example = {name: torch.as_tensor(value) for name, value in source.example.items()}
    spec.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}.qat.", dir=spec.output_dir) as folder, quiet():
        fixed = _fixed(module, tuple(example.values()))
        # the file is compared with the trained module by the caller's engine: roundings flip, so no tolerance fits here
        graph = export(
            fixed,
            example,
            source.output_names,
            Path(folder) / f"{source.name}.onnx",
            exporter="torchscript",
            tolerance=math.inf,
        )
        model = read_model(graph.path)
        weights = _fuse(model)
        _fold(model, weights)
        compress_quantize_weights_transformation(model)
        model.set_friendly_name(source.name)
        split_tables(model)
        share_constants(model)
        name_nodes(model)
        _check_kept(model, spec.keep)
        return write_ir(model, spec.output_dir / f"{source.name}.xml")


def fake_quantizers(module: nn.Module) -> dict[str, FakeQuantizer]:
    """Returns the quantizers of a prepared module by the names of its hooks; a shared one under each of them."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    hooks = get_hook_storage(module).named_hooks(remove_duplicate=False)
    return {name: hook for name, hook in hooks if isinstance(hook, FakeQuantizer)}


def _check(source: Source, spec: QuantSpec) -> nn.Module:
    module = module_of(source, "quantization-aware training")
    check_spec(spec, source, "NNCF")
    if spec.smooth_quant_alpha is not None:
        raise BackendError("quantization-aware training learns its ranges without SmoothQuant: set its alpha to null")
    return module


def _ignored(
    module: nn.Module, example: tuple[torch.Tensor, ...], source: Source, spec: QuantSpec
) -> tuple[set[str], list[str]]:
    """Returns the graph's nodes that the keep-list protects, and NNCF's names of the operations to leave in float.

    Both toolchains see the heavy operations in the order in which they run, so that the n-th is the same in both.
    """
    if source.graph.format != "onnx":
        raise BackendError(f"the keep-list is read from an ONNX graph, not from {source.graph.path.name}")
    model = read_model(source.graph.path)
    fold_constants(model)
    name_nodes(model)
    kept = set(kept_nodes(model, spec.keep))
    heavy = _heavy_onnx(source.graph.path)
    if set(spec.keep) - set(GROUPS) and not all(name.startswith("/") for name, _, _ in heavy):
        raise BackendError(
            f"{source.name}: keep patterns need node names of the tracing exporter ('/block/fc1/MatMul') for "
            "quantization-aware training; keep groups, or export the graph with it"
        )
    nodes = iter(heavy)
    ignored, able = [], []
    for name, kind in _heavy_torch(module, example, source.name):
        twins = [next(nodes, ("", "", ""))]
        if kind == "scaled_dot_product_attention":
            twins.append(next(nodes, ("", "", "")))
        if any(onnx_kind not in _HEAVY[kind] for _, onnx_kind, _ in twins):
            raise BackendError(f"{source.name}: {name} of the module is {twins[0][0] or 'nothing'} in its graph")
        known = [node for name, _, output in twins for node in (name, output) if node]
        if any(node in kept or any(other.startswith(f"{node}/") for other in kept) for node in known):
            ignored.append(name)
        able.append(name)
    check_left(source.name, able, ignored, spec.keep)
    return kept, ignored


def _heavy_onnx(path: Path) -> list[tuple[str, str, str]]:
    """Returns name and type of each heavy node in order, and the graph's output that OpenVINO names it after, or ''."""
    import onnx

    kinds = {kind for kinds in _HEAVY.values() for kind in kinds}
    graph = onnx.load(str(path), load_external_data=False).graph
    outputs = {value.name for value in graph.output}
    heavy = [node for node in graph.node if node.op_type in kinds]
    return [(n.name, n.op_type, n.output[0] if n.output[0] in outputs else "") for n in heavy]


def _heavy_torch(module: nn.Module, example: tuple[torch.Tensor, ...], of: str) -> list[tuple[str, str]]:
    import nncf
    from nncf.torch.function_hook import wrap_model
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    try:
        with quiet(), torch.no_grad():
            wrapped = wrap_model(copy.deepcopy(module)).eval()
            graph = build_nncf_graph(wrapped, example if len(example) > 1 else example[0])
    except (ValueError, RuntimeError, nncf.InternalError) as error:  # e.g. a cat of weights in a tuple, not a list
        raise BackendError(f"{of}: NNCF cannot trace the module: {error}") from error
    nodes = sorted(graph.get_all_nodes(), key=lambda node: node.node_id)
    return [(node.node_name, node.node_type) for node in nodes if node.node_type in _HEAVY]


def _learner(quantizer: Any, half: bool) -> FakeQuantizer:
    """NNCF's quantizer as a FakeQuantizer of the same range; `half`: with steps twice as wide, 7 bits reach as far."""
    low, high = (limit.detach().float() for limit in quantizer.get_input_low_input_high())
    least, largest = int(quantizer.level_low), int(quantizer.level_high)
    if half:
        least, largest = -_HALF, _HALF
    step = (high - low) / (largest - least)
    axis = None if step.numel() == 1 else next(i for i, size in enumerate(step.shape) if size > 1)
    step = step.flatten()
    zero = torch.zeros_like(step) if least < 0 else -torch.round(low.flatten() / step)
    return FakeQuantizer(step, zero.to(torch.int32), least, largest, axis)


def _weights(module: nn.Module, example: tuple[torch.Tensor, ...]) -> dict[str, nn.Parameter]:
    """Returns the parameter that each quantizer rounds, by the quantizer's name; none for those of activations."""
    found: dict[str, nn.Parameter] = {}
    quantizers = fake_quantizers(module)

    def watch(name: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(args[0], nn.Parameter):
                found[name] = args[0]

        return look

    handles = [quantizer.register_forward_pre_hook(watch(name)) for name, quantizer in quantizers.items()]
    try:
        with torch.no_grad():
            module(*(value.to(next(module.parameters()).device) for value in example))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


def _weight_steps(module: nn.Module, example: tuple[torch.Tensor, ...]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields per quantized weight its name, and per output channel its magnitude, also in steps of its quantizer."""
    quantizers, names = fake_quantizers(module), {id(p): name for name, p in module.named_parameters()}
    for name, weight in _weights(module, example).items():
        step, axis = quantizers[name].step(), quantizers[name].axis or 0
        magnitudes = weight.detach().transpose(0, axis).flatten(1).abs().amax(1)
        yield names.get(id(weight), name), magnitudes.numpy(), (magnitudes / step).numpy()


def _one_per_weight(module: nn.Module, example: tuple[torch.Tensor, ...]) -> None:
    """Lets both quantizers of a weight that is used twice be the first, or they would learn different steps."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    storage, quantizers, first = get_hook_storage(module), fake_quantizers(module), dict[int, FakeQuantizer]()
    for name, weight in _weights(module, example).items():
        storage.set_submodule(name, first.setdefault(id(weight), quantizers[name]))


def _fixed(module: nn.Module, example: tuple[torch.Tensor, ...]) -> nn.Module:
    """Returns a copy on the CPU, its weights rounded, its quantizers in operations that exporters know."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    fixed = copy.deepcopy(module).cpu().eval()
    quantizers = fake_quantizers(fixed)
    with torch.no_grad():
        rounded = {id(weight): (weight, quantizers[name]) for name, weight in _weights(fixed, example).items()}
        for weight, quantizer in rounded.values():
            weight.copy_(quantizer(weight.detach()))
    storage, made = get_hook_storage(fixed), dict[int, _Fixed]()
    for name, quantizer in quantizers.items():
        storage.set_submodule(name, made.setdefault(id(quantizer), _Fixed(quantizer)))
    return fixed


def _fuse(model: ov.Model) -> list[ov.Node]:
    """Writes every QuantizeLinear with its DequantizeLinear as one FakeQuantize; returns those of weights.

    The reader makes FakeQuantize to the integers, two Converts, Subtract and Multiply of the pair.
    """
    import openvino.opset13 as ops

    weights = []
    for old in model.get_ordered_ops():
        if old.get_type_name() != "FakeQuantize":
            continue
        last = old
        for kind in ("Convert", "Convert", "Subtract", "Multiply"):
            users = [port.get_node() for port in last.output(0).get_target_inputs()]
            if len(users) != 1 or users[0].get_type_name() != kind:
                raise BackendError(f"OpenVINO reads {old.get_friendly_name()!r} in a way that is not known here")
            last = users[0]
        value, low, high = old.input_value(0), old.input_value(1), old.input_value(2)
        new = ops.fake_quantize(value, low, high, low, high, int(old.get_attributes()["levels"]))
        new.set_friendly_name(last.get_friendly_name().removesuffix("/DequantizeLinear") + "/FakeQuantize")
        for target in last.output(0).get_target_inputs():
            target.replace_source_output(new.output(0))
        if value.get_node().get_type_name() == "Constant":
            weights.append(new)
    return weights


def _fold(model: ov.Model, weights: list[ov.Node]) -> None:
    """Runs `fold_constants` with inputs in place of the quantized weights, which it would turn into floats."""
    import openvino.opset13 as ops

    inputs = []
    for weight in weights:
        given = ops.parameter(list(weight.get_output_shape(0)), weight.get_output_element_type(0))
        for target in weight.output(0).get_target_inputs():
            target.replace_source_output(given.output(0))
        inputs.append(given)
    model.add_parameters(inputs)
    fold_constants(model)
    for given, weight in zip(inputs, weights, strict=True):
        for target in given.output(0).get_target_inputs():
            target.replace_source_output(weight.output(0))
        model.remove_parameter(given)


def _check_kept(model: ov.Model, keep: tuple[str, ...]) -> None:
    """Raises BackendError when a kept matmul or convolution would run in int8: the keep-list is a promise."""
    kept = kept_nodes(model, keep)
    for op in model.get_ops():
        name = op.get_friendly_name()
        if name in kept and op.get_type_name() in MATMULS | CONVOLUTIONS and is_quantized(op):
            raise BackendError(f"NNCF quantized {name!r} of the module, which the keep-list protects")
