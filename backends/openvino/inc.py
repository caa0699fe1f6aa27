"""Quantizes torch modules with Intel Neural Compressor: module and calibration feeds -> IR with int8 weights.

The way is INC's static quantization of exported programs (PT2E): export, observe, convert, export again, read into
OpenVINO. Where its defaults cost quality or speed, the observers are changed between `prepare` and `convert`, the one
place where each of them can be reached by name:

- Only linear layers and convolutions keep observers. INC also quantizes the residual beside a convolution and products
  of two tensors, which OpenVINO adds and multiplies in float: that can only lose digits.
- Ranges are the mean over the calibration items of each item's least and largest value, as NNCF's are. INC's observer
  averages with weight 0.01 instead, so that the first item decides.
- Values that are never negative get the unsigned range 0..255 with zero point 0: one bit more behind each ReLU
  (without, an output of a 3D model was off by 1.3 % instead of 1.1 %).
- Weights take -127..127, or -63..63 where int8 sums saturate (`weight_range`). INC has no setting for that.

Attention and transposed convolutions stay in float: INC does not quantize them. Calibration runs in torch at f32, once
over the set; an observer holds two numbers, so memory holds one item at a time.
"""

from __future__ import annotations

import contextlib
import operator
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from backends.base import BackendError, Feeds, Graph, QuantSpec, Source, TensorInfo, Unavailable, first_line
from backends.calibration import CalibrationItems, not_finite
from backends.cpu import half_range, weight_range_notes
from backends.exchange import eval_mode
from backends.keep import GROUPS, matching
from backends.openvino.engine import write_ir
from backends.openvino.flops import CONVOLUTIONS, MATMULS, from_fake_quantize
from backends.openvino.keep import kept_nodes, name_nodes
from backends.openvino.nncf_settings import Report, check_spec
from backends.openvino.passes import flatten_tables, share_constants, split_tables
from backends.quantspec import check_left, check_settings, lost_channels, module_of, nothing_left
from backends.quiet import quiet

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov
    import torch

REMEDY = 'pip install -e ".[openvino,inc]"'
_LARGEST = {False: 127, True: 63}  # by whether weights keep to half their range

# Operations that a keep-list can name: ATen name -> its name once OpenVINO's reader has decomposed the program, and the
# name of the node, which is that of an ONNX export, so that one keep-list fits every quantizer.
_NAMED = {
    "linear": ("linear", "MatMul"),
    "conv1d": ("convolution", "Conv"),
    "conv2d": ("convolution", "Conv"),
    "conv3d": ("convolution", "Conv"),
    "conv_transpose1d": ("convolution", "ConvTranspose"),
    "conv_transpose2d": ("convolution", "ConvTranspose"),
    "conv_transpose3d": ("convolution", "ConvTranspose"),
    "layer_norm": ("native_layer_norm", "LayerNormalization"),
    "gelu": ("gelu", "Gelu"),
    "scaled_dot_product_attention": ("scaled_dot_product_attention", "Attention"),
}
_QUANTIZED = ("linear", "conv1d", "conv2d")


class INCQuantizer:
    """Intel Neural Compressor post-training quantization for OpenVINO. `report` describes the last call."""

    name = "inc"
    starts_from = "module"
    sources: tuple[str, ...] = ("backends.openvino.inc",)  # and what it imports
    needs = ("neural_compressor", "torchao")
    remedy = REMEDY
    # INC has no bias correction, and its SmoothQuant needs Intel Extension for PyTorch, which is no longer made.
    follows: Mapping[str, tuple[Any, ...]] = {"smooth_quant_alpha": (None,), "bias_correction": ("none",)}

    def __init__(self) -> None:
        self.report = Report()

    def notes(self) -> list[str]:
        """Returns notes on the last `quantize` for its results."""
        return [*weight_range_notes(self.report.half_range), *self.report.notes]

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph:
        """Writes `<spec.output_dir>/<source.name>.xml` and `.bin` (int8 weights) and returns that graph.

        `source.module` is quantized; its inputs, outputs and their names are those of `source.graph`. `calibration` is
        iterated once, items are used and dropped one by one, and only the first `spec.calibration_samples` of them.
        The module is left as it was. The same input gives the same bytes.
        Raises Unavailable without INC, and BackendError for a spec that it cannot follow, a keep pattern without a
        match, a keep-list that leaves nothing, a module that cannot be exported, and a calibration set that is empty,
        too small, does not fit the inputs or gives NaN or inf inside; nothing is written then.
        """
        import torch

        module = module_of(source, "Intel Neural Compressor")
        check_settings(self, spec)
        check_spec(spec, source, "Intel Neural Compressor")
        items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)
        half = half_range(spec.weight_range)
        names = list(source.example)
        example = tuple(torch.as_tensor(value) for value in source.example.values())
        with eval_mode(module), quiet(), torch.no_grad():
            prepared = _prepare(module, example, spec)
            named = _named(prepared)
            # Patterns alone: nothing of the groups is quantized by INC.
            patterns = (entry for entry in spec.keep if entry not in GROUPS)
            kept = {name for entry in patterns for name in matching(entry, named.values())}
            able = (name for node, name in named.items() if _aten(node) in _QUANTIZED)
            check_left(source.name, able, kept, spec.keep)
            _strip(prepared, {node for node, name in named.items() if name in kept})
            _observe(prepared, names, items, named)
            _set_ranges(prepared, _LARGEST[half], spec.symmetric_activations)
            notes = lost_channels("Intel Neural Compressor", _weight_steps(prepared, named))
            model = _convert(prepared, example, list(named.items()))
        model.set_friendly_name(source.name)
        _fit(model, names, source)
        flatten_tables(model)
        split_tables(model)
        share_constants(model)
        name_nodes(model)
        _check_kept(model, spec.keep)
        if not any(op.get_type_name() == "FakeQuantize" for op in model.get_ops()):
            raise nothing_left(source.name, spec.keep)
        self.report = Report(items.passes, items.used, tuple(sorted(kept)), half, tuple(notes))
        return write_ir(model, spec.output_dir / f"{source.name}.xml")


def _prepare(module: torch.nn.Module, example: tuple[torch.Tensor, ...], spec: QuantSpec) -> torch.fx.GraphModule:
    """Returns the module as an fx graph with INC's observers. Raises Unavailable or BackendError."""
    import torch

    try:
        import torchao  # noqa: F401  (INC asks for it too late to say so clearly)

        with _own_logs():
            from neural_compressor.torch.quantization import StaticQuantConfig, prepare
    except ImportError as error:
        raise Unavailable(f"quantizer 'inc' cannot run: {error}; {REMEDY}") from error
    config = StaticQuantConfig(
        w_granularity=spec.weights,
        act_sym=spec.symmetric_activations,
        act_dtype="int8" if spec.symmetric_activations else "uint8",
    )
    try:
        # As INC's own `export`, which tries strict mode first: the same graph, traced three times as slowly.
        exported: Any = torch.export.export(module.eval(), example, strict=False).module()
        exported._exported, exported.dynamic_shapes = True, None  # INC asks for both
        return prepare(exported, config)
    except Exception as error:
        raise BackendError(
            f"Intel Neural Compressor cannot export {type(module).__name__}: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def _own_logs() -> Iterator[None]:
    """Sends INC's log to a temporary folder while INC is imported: it makes ~/.habana_logs, or fails without HOME.

    A folder that the user names in HABANA_LOGS is left to INC.
    """
    if "HABANA_LOGS" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="pqk-inc-") as folder:
        os.environ["HABANA_LOGS"] = folder
        try:
            yield
        finally:
            del os.environ["HABANA_LOGS"]


def _aten(node: torch.fx.Node) -> str:
    """Returns 'linear' for a call of `aten.linear.default`; '' for nodes that call no ATen operation."""
    parts = str(node.target).split(".")
    return parts[1] if node.op == "call_function" and parts[0] == "aten" else ""


def _named(prepared: torch.fx.GraphModule) -> dict[torch.fx.Node, str]:
    """Names the nodes that a keep-list can name, in order, as an ONNX export does (`/blocks.0/fc1/MatMul`)."""
    found: dict[torch.fx.Node, str] = {}
    for node in prepared.graph.nodes:
        if _aten(node) not in _NAMED:
            continue
        scope, last = "", ""
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            if path:
                scope += "/" + path.removeprefix(last + ".")
                last = path
        name = first = f"{scope}/{_NAMED[_aten(node)][1]}"
        count = 0
        while name in found.values():  # a module that is called again
            count += 1
            name = f"{first}_{count}"
        found[node] = name
    return found


def _is_observer(node: torch.fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith("activation_post_process")


def _strip(prepared: torch.fx.GraphModule, kept: set[torch.fx.Node]) -> None:
    """Takes out every observer that does not feed a linear layer or a convolution outside the keep-list."""
    for node in prepared.graph.nodes:
        if _aten(node) in _QUANTIZED and node not in kept:
            continue
        for feeding in node.all_input_nodes:
            if _is_observer(feeding):
                node.replace_input_with(feeding, feeding.args[0])
    for node in reversed(prepared.graph.nodes):
        if _is_observer(node) and not node.users:
            prepared.graph.erase_node(node)
    prepared.recompile()


def _observers(prepared: torch.fx.GraphModule) -> list[tuple[str, Any, str]]:
    """Returns the name of every observer, the observer, and the name of its weight; '' for activations."""
    found: dict[str, str] = {}
    for node in prepared.graph.nodes:
        if _is_observer(node):
            found.setdefault(str(node.target), str(node.args[0].target) if node.args[0].op == "get_attr" else "")
    return [(name, prepared.get_submodule(name), weight) for name, weight in found.items()]


def _readers(prepared: torch.fx.GraphModule, named: Mapping[torch.fx.Node, str]) -> dict[str, str]:
    """Returns the first linear layer or convolution that reads an observed tensor, by the observer's name."""
    found: dict[str, str] = {}
    for node, name in named.items():
        for feeding in node.all_input_nodes:
            if _is_observer(feeding):
                found.setdefault(str(feeding.target), name)
    return found


def _weight_steps(
    prepared: torch.fx.GraphModule, named: Mapping[torch.fx.Node, str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields per quantized weight its layer's name, and per output channel its magnitude, also in steps."""
    readers = _readers(prepared, named)
    for name, observer, weight in _observers(prepared):
        if weight:
            magnitudes = operator.attrgetter(weight)(prepared).detach().abs().flatten(1).amax(1)
            steps = magnitudes / observer.calculate_qparams()[0]
            yield readers.get(name, weight), magnitudes.numpy(), steps.numpy()


def _observe(
    prepared: torch.fx.GraphModule, names: list[str], items: CalibrationItems, named: Mapping[torch.fx.Node, str]
) -> None:
    """Runs the calibration set. With weight 1/k for item k, the observers' moving average is the mean.

    Observers of weights look once and are taken out while the set runs: each item would show them the same again. Those
    of activations see their axes in the order of memory, so that a least or largest value is found without a copy.
    """
    import torch

    class InOrder(torch.nn.Module):
        def __init__(self, observer: Any, reader: str) -> None:
            super().__init__()
            self.observer, self.reader = observer, reader

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.observer(x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)))
            if not torch.isfinite(self.observer.min_val + self.observer.max_val):  # NaN is least and largest in torch
                raise not_finite(f"input of {self.reader}", items.index)
            return x

    observers, readers = _observers(prepared), _readers(prepared, named)
    for name, observer, weight in observers:
        if weight:
            observer(operator.attrgetter(weight)(prepared))
        in_place = torch.nn.Identity() if weight else InOrder(observer, readers.get(name, name))
        prepared.set_submodule(name, in_place)
    with _channels_last(prepared):
        for count, feeds in enumerate(items, 1):
            for _, observer, weight in observers:
                if not weight:
                    observer.averaging_constant = 1 / count
            prepared(*(torch.from_numpy(feeds[name]) for name in names))
    for name, observer, _ in observers:
        prepared.set_submodule(name, observer)


@contextlib.contextmanager
def _channels_last(prepared: torch.fx.GraphModule) -> Iterator[None]:
    """Stores weights of 2D convolutions with channels last: a convolution head runs a quarter faster on a CPU.

    The parameters are put back as they were; they belong to the caller's module.
    """
    import torch

    before = {name: value for name, value in prepared.named_parameters() if value.dim() == 4}

    def put(name: str, value: torch.nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(prepared.get_submodule(owner), leaf, value)

    for name, value in before.items():
        put(name, torch.nn.Parameter(value.detach().to(memory_format=torch.channels_last), requires_grad=False))
    try:
        yield
    finally:
        for name, value in before.items():
            put(name, value)


def _set_ranges(prepared: torch.fx.GraphModule, largest: int, symmetric: bool) -> None:
    """Sets weights to -largest..largest, and symmetric activations that are never negative to 0..255, zero point 0."""
    import torch

    for _, observer, weight in _observers(prepared):
        if weight:
            observer.quant_min, observer.quant_max = -largest, largest
            # A step is at least this: by default 1.2e-7, of which a channel of very small weights would be made zero.
            observer.eps.fill_(torch.finfo(torch.float32).tiny)
        elif symmetric and observer.min_val >= 0:
            observer.dtype, observer.qscheme = torch.uint8, torch.per_tensor_affine
            observer.quant_min, observer.quant_max = 0, 255


def _convert(
    prepared: torch.fx.GraphModule, example: tuple[torch.Tensor, ...], named: list[tuple[torch.fx.Node, str]]
) -> ov.Model:
    """Returns the calibrated graph as an OpenVINO model with int8 weights, its nodes named by `named`."""
    import openvino as ov
    import torch
    from neural_compressor.torch.quantization import convert
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    wanted: dict[str, list[str]] = {}
    for node, name in named:
        wanted.setdefault(_NAMED[_aten(node)][0], []).append(name)
    try:
        program = torch.export.export(convert(prepared), example)
        decoder = TorchFXPythonDecoder.from_exported_program(program, dynamic_shapes=False)
        model = ov.convert_model(decoder)
    except Exception as error:
        raise BackendError(f"the graph of Intel Neural Compressor cannot be converted: {first_line(error)}") from error
    # Both graphs hold the same operations in the same order; module names are lost in the second.
    found: dict[str, list[str]] = {}
    for node in decoder.pt_module.graph.nodes:
        found.setdefault(_aten(node), []).append(node.name)
    renamed: dict[str, str] = {}
    for kind, new in wanted.items():
        if len(found.get(kind, [])) == len(new):
            renamed.update(zip(found[kind], new, strict=True))
    _rename(model, renamed)
    return model


def _rename(model: ov.Model, renamed: dict[str, str]) -> None:
    """Gives `linear_3/aten.linear.default/MatMul` the name of its linear layer; others of `linear_3` follow it."""
    main = MATMULS | CONVOLUTIONS | {"MVN", "Gelu"}
    for op in model.get_ordered_ops():
        origin, _, rest = op.get_friendly_name().partition("/")
        kind = rest.rpartition("/")[2]
        if origin in renamed:
            name = renamed[origin]
            op.set_friendly_name(name if op.get_type_name() in main else f"{name.rpartition('/')[0]}/{kind}")
        elif rest:
            op.set_friendly_name(f"{origin}/{kind}")
        for port in op.outputs():
            port.get_tensor().set_names(set())  # no one asks for tensors inside


def _fit(model: ov.Model, names: list[str], source: Source) -> None:
    """Names the inputs and outputs. Raises BackendError when shapes or types are not those of the source's graph."""
    outputs = {t.name: t for t in source.graph.outputs}
    inputs = {t.name: t for t in source.graph.inputs}
    for ports, infos in (
        (model.inputs, [inputs[name] for name in names]),
        (model.outputs, [outputs[name] for name in source.output_names]),
    ):
        if len(ports) != len(infos):
            raise BackendError(f"{source.name}: the module has {len(ports)} outputs or inputs, its graph {len(infos)}")
        for port, info in zip(ports, infos, strict=True):
            _fit_port(port, info, source.name)
    for node, name in zip(model.get_parameters(), names, strict=True):
        node.set_friendly_name(name)
    for node, name in zip(model.get_results(), source.output_names, strict=True):
        node.set_friendly_name(f"{name}/sink_port_0")  # as the ONNX reader does


def _fit_port(port: Any, info: TensorInfo, graph: str) -> None:
    import numpy as np

    shape, dtype = str(port.get_partial_shape()), np.dtype(port.get_element_type().to_dtype()).name
    if port.get_partial_shape().is_dynamic or tuple(port.get_shape()) != info.shape or dtype != info.dtype:
        raise BackendError(
            f"{graph}: {info.name!r} is {dtype}{shape} in the module, {info.dtype}{list(info.shape)} in its graph"
        )
    port.get_tensor().set_names({info.name})


def _check_kept(model: ov.Model, keep: tuple[str, ...]) -> None:
    """Raises BackendError when a kept matmul or convolution has a quantized operand: the keep-list is a promise."""
    kept = kept_nodes(model, keep)
    for op in model.get_ops():
        name = op.get_friendly_name()
        if op.get_type_name() not in MATMULS | CONVOLUTIONS or name not in kept:
            continue
        if any(from_fake_quantize(value.get_node()) for value in op.input_values()[:2]):
            raise BackendError(f"Intel Neural Compressor quantized {name!r}, which the keep-list protects")
