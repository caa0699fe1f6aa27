"""Puts nodes of a quantized IR back to float: the `Surgery` of OpenVINO.

A node reads its activations from before their FakeQuantize and takes its weights from the float graph; other nodes that
read the same quantized tensor keep reading it. The two quantizers leave different traces:

- NNCF's IR is the float graph, read through the same passes, with changes: nodes are matched by name, the scale of
  SmoothQuant before a FakeQuantize is passed by too, and the bias behind a node loses its correction.
- INC's IR comes from the torch program, whose modules and matmuls are named and laid out otherwise than in the ONNX
  file. It changes nothing but weights and activations, so only weights are looked up: the float constant that rounds to
  the stored integers, as it is or transposed. Where a FakeQuantize begins at 0, OpenVINO's reader has merged a ReLU
  into it, which comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from backends.base import BackendError, Feeds, Graph
from backends.openvino.engine import read_model, write_ir
from backends.openvino.flops import CONVOLUTIONS, MATMULS, MOVES, live_operations
from backends.openvino.keep import name_nodes
from backends.openvino.passes import fold_constants, share_constants
from backends.rank import check_names, other_model

if TYPE_CHECKING:
    import openvino as ov

_HEAVY = MATMULS | CONVOLUTIONS
# Operations that quantizers move across: they are neither quantized themselves nor do they stop the way to a consumer.
_PASSING = MOVES | {"Interpolate", "Pad"}
_HALF_STEP = 0.502  # of an integer's step: how far a value may lie from what it was rounded to


class IRSurgery:
    """See `backends.base.Surgery`. Memory holds the float graph's weights, and one changed model at a time."""

    sources: ClassVar[tuple[str, ...]] = ("backends.openvino.rank",)

    def __init__(self, quantized: Graph, plain: Graph) -> None:
        self._graph, self._plain = quantized, plain
        self._original = _read_float(plain)
        self.nodes = tuple(_quantized(read_model(quantized.path)))

    def infer_plain(self, feeds: Sequence[Feeds]) -> list[Feeds]:
        return _run(self._original, feeds, self._plain)

    def infer(self, floats: Iterable[str], feeds: Sequence[Feeds]) -> list[Feeds]:
        return _run(self._with(floats), feeds, self._graph)

    def write(self, floats: Iterable[str], target: Path) -> Graph:
        model = self._with(floats)
        share_constants(model)
        return write_ir(model, target.with_name(f"{target.name}.xml"))

    def _with(self, floats: Iterable[str]) -> ov.Model:
        names = list(floats)
        check_names(names, self.nodes, self._graph.path.name)
        model = read_model(self._graph.path)
        if model.has_rt_info(["nncf"]):
            _restore(model, self._original, names)
        else:
            _restore_by_value(model, self._original, names)
        return model


def _read_float(graph: Graph) -> ov.Model:
    """Returns the float graph as the quantizer reads it, so that automatic names are the same."""
    model = read_model(graph.path)
    if any(op.get_type_name() == "FakeQuantize" for op in model.get_ops()):
        raise BackendError(f"{graph.path.name} is quantized: the float graph is wanted")
    fold_constants(model)
    name_nodes(model)
    return model


def _run(model: ov.Model, feeds: Sequence[Feeds], graph: Graph) -> list[Feeds]:
    """Returns the outputs of `model` for each item, what is not quantized in f32."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    try:
        compiled = ov.Core().compile_model(model, "CPU", {**settings, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
        request = compiled.create_infer_request()
        results = []
        for feed in feeds:
            request.infer({name: np.ascontiguousarray(array) for name, array in feed.items()}, share_inputs=True)
            tensors = [request.get_output_tensor(index).data for index in range(len(graph.outputs))]
            pairs = zip(graph.outputs, tensors, strict=True)
            results.append({info.name: np.array(array, dtype=np.float32) for info, array in pairs})
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot run {graph.path.name}: {str(error).strip().splitlines()[-1]}") from error
    return results


def _quantized(model: ov.Model) -> dict[str, ov.Node]:
    """Returns the nodes that read a FakeQuantize: matmuls and convolutions also through moves, others directly."""
    found = {}
    for op in live_operations(model):
        kind = op.get_type_name()
        if kind in _PASSING or kind == "FakeQuantize":
            continue
        sources = [value.get_node() for value in op.input_values()]
        if any(_reads_quantized(node, through=kind in _HEAVY) for node in sources):
            found[op.get_friendly_name()] = op
    return found


def _reads_quantized(node: ov.Node, through: bool) -> bool:
    if node.get_type_name() == "FakeQuantize":
        return True
    if not through or node.get_type_name() not in _PASSING:
        return False
    return any(_reads_quantized(value.get_node(), through) for value in node.input_values())


def _restore(model: ov.Model, original: ov.Model, names: Iterable[str]) -> None:
    """Lets the nodes `names` of the int8 `model` compute in float, as in `original`."""
    ours = {op.get_friendly_name(): op for op in model.get_ops()}
    theirs = {op.get_friendly_name(): op for op in original.get_ops()}
    live = {op.get_friendly_name() for op in live_operations(original)}
    for name in names:
        node, float_node = ours[name], theirs.get(name)
        if float_node is None or float_node.get_type_name() != node.get_type_name():
            raise other_model(node.get_type_name(), name)
        for index, (port, value) in enumerate(zip(node.inputs(), float_node.input_values(), strict=True)):
            source = value.get_node()
            if source.get_friendly_name() in live or source.get_type_name() == "Parameter":
                port.replace_source_output(_unquantized(node.input_value(index), theirs))
            elif index == 1 or node.get_type_name() == "MatMul":
                port.replace_source_output(_constant(source, float_node).output(0))
        _restore_bias(node, theirs)


def _restore_by_value(model: ov.Model, original: ov.Model, names: Iterable[str]) -> None:
    """Does what `_restore` does, for a model whose nodes are not those of `original` but whose weights are."""
    ours = {op.get_friendly_name(): op for op in model.get_ops()}
    live = {op.get_friendly_name() for op in live_operations(model)}
    weights = [op for op in original.get_ops() if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) > 1]
    for name in names:
        for port in ours[name].inputs():
            value = port.get_source_output()
            if value.get_node().get_friendly_name() in live:
                port.replace_source_output(_unquantized(value, None))
            elif value.get_node().get_type_name() == "Multiply":
                port.replace_source_output(_rounded_from(value.get_node(), weights, name).output(0))


def _rounded_from(dequantized: ov.Node, weights: Sequence[ov.Node], reader: str) -> ov.Node:
    """Returns a copy of the float weight that rounds to the stored integers of Multiply(Convert(integers), scale)."""
    import openvino.opset13 as ops

    convert, scale = (value.get_node() for value in dequantized.input_values())
    integers = convert.input_value(0).get_node() if convert.get_type_name() == "Convert" else convert
    if {integers.get_type_name(), scale.get_type_name()} != {"Constant"}:
        raise BackendError(f"{reader!r}: its weights are no scaled integers")
    stored, step = integers.get_data(), scale.get_data()
    steps = np.broadcast_to(step, stored.shape)

    def rounds(weight: np.ndarray, rows: slice) -> bool:
        apart = np.abs(weight[rows] - stored[rows] * steps[rows])
        return bool((apart <= _HALF_STEP * steps[rows]).all())

    for node in weights:
        weight = node.get_data()
        for turned in (weight, weight.T) if weight.ndim == 2 else (weight,):
            # The first row tells nearly all others apart.
            if turned.shape == stored.shape and rounds(turned, slice(1)) and rounds(turned, slice(None)):
                made = ops.constant(np.ascontiguousarray(turned))
                made.set_friendly_name(node.get_friendly_name())
                return made
    raise BackendError(f"the float graph has no weight that rounds to that of {reader!r}: it is of another model")


def _unquantized(value: ov.Output, theirs: Mapping[str, ov.Node] | None) -> ov.Output:
    """Returns the tensor from before its quantization, FakeQuantize and scales that are not in `theirs` skipped.

    Moves between are made anew, as others may read the quantized ones. `theirs` None: a graph of INC.
    """
    import openvino.opset13 as ops
    from openvino.utils.node_factory import NodeFactory

    node = value.get_node()
    kind = node.get_type_name()
    scale = theirs is not None and kind == "Multiply" and node.get_friendly_name() not in theirs
    if kind == "FakeQuantize" or scale:
        source = _unquantized(node.input_value(0), theirs)
        merged = theirs is None and not node.input_value(1).get_node().get_data().any()
        return ops.relu(source).output(0) if merged else source
    if kind not in _PASSING:
        return value
    before = list(node.input_values())
    after = [_unquantized(source, theirs) for source in before]
    if all(_same(a, b) for a, b in zip(before, after, strict=True)):
        return value
    factory = NodeFactory(node.get_type_info().version_id)
    made = factory.create(kind, after, node.get_attributes())
    made.set_friendly_name(f"{node.get_friendly_name()}/float")
    return made.output(value.get_index())


def _same(a: ov.Output, b: ov.Output) -> bool:
    return a.get_node().get_name() == b.get_node().get_name() and a.get_index() == b.get_index()


def _constant(source: ov.Node, reader: ov.Node) -> ov.Node:
    """Returns a copy of a float constant, for another model."""
    import openvino.opset13 as ops

    if source.get_type_name() != "Constant":
        raise BackendError(f"{reader.get_friendly_name()!r}: its weights are computed by {source.get_type_name()}")
    made = ops.constant(source.get_data())
    made.set_friendly_name(source.get_friendly_name())
    return made


def _restore_bias(node: ov.Node, theirs: Mapping[str, ov.Node]) -> None:
    """Undoes NNCF's bias correction: the bias behind `node` is that of the float graph, or goes if there is none."""
    users = list(node.output(0).get_target_inputs())
    if len(users) != 1:
        return
    add = users[0].get_node()
    if add.get_type_name() != "Add":
        return
    float_add = theirs.get(add.get_friendly_name())
    if float_add is None:
        for reader in add.output(0).get_target_inputs():
            reader.replace_source_output(node.output(0))
        return
    for port, value in zip(add.inputs(), float_add.input_values(), strict=True):
        source = value.get_node()
        if source.get_type_name() == "Constant" and source.get_element_type().is_real():
            port.replace_source_output(_constant(source, float_add).output(0))
