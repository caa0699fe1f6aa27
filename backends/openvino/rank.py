"""Which quantized nodes cause how much of an int8 graph's error: one node, or one group, goes back to float at a time.

A node goes back to float by surgery on the IR that NNCF wrote: it reads its activations from before their
FakeQuantize (and before the scale of SmoothQuant), takes its weights from the float graph, and the bias behind it
loses NNCF's correction. Other nodes that read the same quantized tensor keep reading it. Nodes are matched by name:
the float graph is read through the same passes as the quantizer reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Feeds, Graph, nearest
from backends.openvino.engine import read_model, write_ir
from backends.openvino.flops import CONVOLUTIONS, MATMULS, live_operations
from backends.openvino.nncf import name_nodes
from backends.openvino.passes import fold_constants, share_constants

if TYPE_CHECKING:
    import openvino as ov

After = Callable[[list[Feeds]], list[Feeds]]
Progress = Callable[[int, int, str], None]
_HEAVY = MATMULS | CONVOLUTIONS
# Operations that quantizers move across: they are neither quantized themselves nor do they stop the way to a consumer.
_PASSING = {"Reshape", "Transpose", "Concat", "Split", "VariadicSplit", "Gather", "Slice", "StridedSlice", "Squeeze"}
_PASSING |= {"Unsqueeze", "MaxPool", "Relu", "Broadcast", "Convert", "Interpolate", "Pad"}


@dataclass(frozen=True)
class NodeShare:
    """What a node (or a group of nodes) costs: `share` of the int8 error is gone when it alone computes in float.

    share = (error_all - error_without) / error_all. Errors are those of `mean_error`. Roundings flip when anything
    changes, so a node without influence shows a small share of either sign, and shares need not add up to 1.
    """

    name: str
    nodes: tuple[str, ...]
    share: float
    error_all: float
    error_without: float


def quantized_nodes(int8_ir: Graph) -> list[str]:
    """Names of the nodes that compute on quantized activations, in topological order."""
    return list(_quantized(read_model(int8_ir.path)))


def node_groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Nodes by the part of the model they belong to, in order of their first node.

    The part is the name up to its first numbered block ('/dec_blocks.7/attn/proj/MatMul' -> 'dec_blocks.7'), else its
    first component ('/downstream_head1/dpt/head.0/Conv' -> 'downstream_head1'). A name without components belongs to
    the node before it; where no name has any, as other exporters write them, runs of about sqrt(count) are groups.
    """
    scoped = [name for name in names if "/" in name.strip("/")]
    groups: dict[str, list[str]] = {}
    if scoped:
        part = _part(scoped[0])
        for name in names:
            part = _part(name) if "/" in name.strip("/") else part
            groups.setdefault(part, []).append(name)
    else:
        size = math.isqrt(max(len(names) - 1, 0)) + 1
        for k in range(0, len(names), size):
            run = names[k : k + size]
            groups[f"{run[0]} .. {run[-1]}"] = list(run)
    return {name: tuple(members) for name, members in groups.items()}


def _part(name: str) -> str:
    parts = name.strip("/").split("/")
    end = next((i for i, part in enumerate(parts[:-1]) if re.search(r"(block|layer|stage)s?\d*\.\d+$", part)), 0)
    return "/".join(parts[: end + 1])


def rank_nodes(
    float_graph: Graph,
    int8_ir: Graph,
    feeds: Sequence[Feeds],
    reference: Sequence[Feeds] | None = None,
    names: Iterable[str] | Mapping[str, Sequence[str]] | None = None,
    after: After | None = None,
    progress: Progress | None = None,
) -> list[NodeShare]:
    """Shares of the int8 error, the largest first.

    feeds: inputs of the graph, one or two suffice. reference: what the outputs are compared with, one item for each
    item that is compared; by default the float graph's outputs in f32. names: nodes, or groups of nodes by name; by
    default every quantized node. after: computes what is compared from the outputs of all feeds (for an encoder, the
    decoder's outputs), so that errors of several graphs share one scale. progress: called with done, total and name
    before each measurement.
    Everything unquantized computes in f32. Memory holds one model with one set of changes at a time, and no
    activations but the outputs. Raises BackendError for an unknown name, no feeds, or graphs that do not belong
    together.
    """
    if not feeds:
        raise BackendError("there is nothing to rank on: no feeds")
    original = _read_float(float_graph)
    if reference is None:
        reference = _compared(_run(original, feeds, float_graph), after)
    known = _quantized(read_model(int8_ir.path))
    groups = _as_groups(names, list(known))
    _check_names([name for members in groups.values() for name in members], known, int8_ir)

    def error(floats: Sequence[str]) -> float:
        model = read_model(int8_ir.path)
        _restore(model, original, floats)
        return mean_error(_compared(_run(model, feeds, int8_ir), after), reference)

    total = len(groups) + 1
    if progress:
        progress(0, total, "all nodes in int8")
    error_all = error(())
    shares = []
    for done, (name, members) in enumerate(groups.items(), 1):
        if progress:
            progress(done, total, name)
        without = error(members)
        share = (error_all - without) / error_all if error_all else 0.0
        shares.append(NodeShare(name, tuple(members), share, error_all, without))
    return sorted(shares, key=lambda item: -item.share)


def rank_by_groups(
    float_graph: Graph,
    int8_ir: Graph,
    feeds: Sequence[Feeds],
    reference: Sequence[Feeds] | None = None,
    detail: int = 3,
    least: float = 0.02,
    after: After | None = None,
    progress: Progress | None = None,
) -> tuple[list[NodeShare], list[NodeShare]]:
    """Shares of the groups of `node_groups`, then of the single nodes of the `detail` worst groups; both sorted.

    Groups with a share below `least` are not looked into. The other arguments are those of `rank_nodes`.
    """
    if reference is None:
        reference = _compared(_run(_read_float(float_graph), feeds, float_graph), after)
    groups = node_groups(quantized_nodes(int8_ir))
    ranked = rank_nodes(float_graph, int8_ir, feeds, reference, groups, after, progress)
    chosen = [name for group in ranked[:detail] if group.share >= least for name in group.nodes]
    if not chosen:
        return ranked, []
    return ranked, rank_nodes(float_graph, int8_ir, feeds, reference, chosen, after, progress)


def with_float_nodes(int8_ir: Graph, float_graph: Graph, names: Iterable[str], out: Path) -> Graph:
    """Write the int8 graph with the nodes `names` back in float to `out` (`.xml`), and return that graph.

    Raises BackendError for a name that is no quantized node, or graphs that do not belong together.
    """
    names = list(names)
    model = read_model(int8_ir.path)
    _check_names(names, _quantized(model), int8_ir)
    _restore(model, _read_float(float_graph), names)
    share_constants(model)
    return write_ir(model, out)


def mean_error(got: Sequence[Feeds], want: Sequence[Feeds]) -> float:
    """Mean over all outputs and items of mean|got - want| / mean|want|; infinite when a value is not finite."""
    if len(got) != len(want):
        raise BackendError(f"{len(got)} results cannot be compared with {len(want)}")
    errors = []
    for ours, theirs in zip(got, want, strict=True):
        for name, reference in theirs.items():
            scale = float(np.mean(np.abs(reference), dtype=np.float64))
            apart = float(np.mean(np.abs(ours[name] - reference), dtype=np.float64))
            errors.append((apart / scale if scale else math.inf) if apart else 0.0)
    found = float(np.mean(errors))
    return found if math.isfinite(found) else math.inf


def _as_groups(names: Iterable[str] | Mapping[str, Sequence[str]] | None, known: list[str]) -> dict[str, list[str]]:
    if isinstance(names, Mapping):
        return {name: list(members) for name, members in names.items()}
    return {name: [name] for name in (known if names is None else names)}


def _check_names(names: Iterable[str], known: Mapping[str, Any], graph: Graph) -> None:
    for name in names:
        if name not in known:
            raise BackendError(f"{graph.path.name} has no quantized node {name!r}{nearest(name, known)}")


def _read_float(graph: Graph) -> ov.Model:
    """The float graph as the quantizer reads it, so that automatic names are the same."""
    model = read_model(graph.path)
    if any(op.get_type_name() == "FakeQuantize" for op in model.get_ops()):
        raise BackendError(f"{graph.path.name} is quantized: the float graph is wanted")
    fold_constants(model)
    name_nodes(model)
    return model


def _compared(outputs: list[Feeds], after: After | None) -> list[Feeds]:
    return after(outputs) if after else outputs


def _run(model: ov.Model, feeds: Sequence[Feeds], graph: Graph) -> list[Feeds]:
    """Outputs of `model` for each item, what is not quantized in f32."""
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
    """Nodes that read a FakeQuantize: matmuls and convolutions also through moves, any other kind directly."""
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
    """Let the nodes `names` of the int8 `model` compute in float, as in `original`."""
    ours = {op.get_friendly_name(): op for op in model.get_ops()}
    theirs = {op.get_friendly_name(): op for op in original.get_ops()}
    live = {op.get_friendly_name() for op in live_operations(original)}
    for name in names:
        node, float_node = ours[name], theirs.get(name)
        if float_node is None or float_node.get_type_name() != node.get_type_name():
            raise BackendError(f"the float graph has no {node.get_type_name()} {name!r}: it is of another model")
        for index, (port, value) in enumerate(zip(node.inputs(), float_node.input_values(), strict=True)):
            source = value.get_node()
            if source.get_friendly_name() in live or source.get_type_name() == "Parameter":
                port.replace_source_output(_unquantized(node.input_value(index), theirs))
            elif index == 1 or node.get_type_name() == "MatMul":
                port.replace_source_output(_constant(source, float_node).output(0))
        _restore_bias(node, theirs)


def _unquantized(value: ov.Output, theirs: Mapping[str, ov.Node]) -> ov.Output:
    """The same tensor from before its quantization: FakeQuantize and what NNCF inserted are passed by.

    Moves between are made anew, as others may read the quantized ones.
    """
    from openvino.utils.node_factory import NodeFactory

    node = value.get_node()
    kind = node.get_type_name()
    if kind == "FakeQuantize" or (kind == "Multiply" and node.get_friendly_name() not in theirs):
        return _unquantized(node.input_value(0), theirs)
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
    """A copy of a float constant, for another model."""
    import openvino.opset13 as ops

    if source.get_type_name() != "Constant":
        raise BackendError(f"{reader.get_friendly_name()!r}: its weights are computed by {source.get_type_name()}")
    made = ops.constant(source.get_data())
    made.set_friendly_name(source.get_friendly_name())
    return made


def _restore_bias(node: ov.Node, theirs: Mapping[str, ov.Node]) -> None:
    """Take NNCF's bias correction back: the bias behind `node` is that of the float graph, or goes if there is none."""
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
