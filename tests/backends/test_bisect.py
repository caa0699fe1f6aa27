"""Bisection finds the node at which two executions part: broken graphs of a small DUSt3R, faulty engines."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from backends.base import BackendError, Engine, Precision
from backends.bisect import Difference, first_difference, quantizes
from backends.exchange import describe_onnx, export
from backends.reference import OnnxRuntimeEngine
from pqk.models import build_model

CONFIG = {
    "head_type": "linear",
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 32,
    "dec_depth": 2,
    "dec_num_heads": 2,
}
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Encoder and decoder of a random DUSt3R for 48x64 images (3x4 tokens), attention far from uniform."""
    model = build_model("dust3r", CONFIG, generator=torch.Generator().manual_seed(1)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")
        for name, spec in model.graphs(48, 64).items()
    }


def feeds_of(graph, count=1):
    generator = np.random.default_rng(5)
    return [{t.name: generator.standard_normal(t.shape).astype(t.dtype) for t in graph.inputs} for _ in range(count)]


def changed(graph, path, edit):
    """A copy of the graph with `edit(onnx graph)` applied."""
    model = onnx.load(str(graph.path))
    edit(model.graph)
    onnx.save_model(model, str(path))
    return describe_onnx(path)


def node_of(graph, name):
    return next(node for node in graph.node if node.name == name)


def weight_of(graph, name):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def replace(tensor, array):
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def compare(graph, broken, tolerance=1e-4, limit=LIMIT, run_a=OnnxRuntimeEngine, run_b=OnnxRuntimeEngine, count=1):
    return first_difference(graph, run_a, broken, run_b, feeds_of(graph, count), tolerance, limit)


def check_culprit(found):
    assert isinstance(found, Difference)
    assert found.proven and not found.fused
    assert max(found.inputs.values()) <= found.tolerance < found.output_error
    assert found.nodes == (found.node,)
    assert found.node in found.sentence()


def test_a_transposed_weight(graphs, tmp_path):
    """The square output projection of the second decoder's second block."""
    name = "/dec_blocks2.1/attn/proj/MatMul"

    def transpose(graph):
        tensor = weight_of(graph, node_of(graph, name).input[1])
        array = onnx.numpy_helper.to_array(tensor)
        assert array.shape[0] == array.shape[1]
        replace(tensor, array.T)

    found = compare(graphs["decoder"], changed(graphs["decoder"], tmp_path / "broken.onnx", transpose))
    check_culprit(found)
    assert (found.node, found.op_type) == (name, "MatMul")
    assert len(found.constants) == 1


def scale_of(graph, block):
    """The Mul by a scalar that feeds the scores of a block's cross-attention."""
    makers = {name: node for node in graph.node for name in node.output}
    softmax = next(n for n in graph.node if n.op_type == "Softmax" and n.name.startswith(f"/{block}/cross_attn/"))
    node = makers[makers[softmax.input[0]].input[0]]
    assert node.op_type == "Mul"
    return node


def test_a_dropped_attention_scale(graphs, tmp_path):
    """The scale of the queries becomes one: the node stays and does nothing."""

    def drop(graph):
        node = scale_of(graph, "dec_blocks.1")
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.0), "one"))
        node.input[1] = "one"

    broken = changed(graphs["decoder"], tmp_path / "broken.onnx", drop)
    found = compare(graphs["decoder"], broken)
    check_culprit(found)
    assert found.node == scale_of(onnx.load(str(graphs["decoder"].path)).graph, "dec_blocks.1").name


def test_a_removed_node_is_named(graphs, tmp_path):
    """The scale is missing altogether: what reads it reads the unscaled queries."""

    def remove(graph):
        node = scale_of(graph, "dec_blocks.0")
        for other in graph.node:
            for index, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[index] = node.input[0]
        graph.node.remove(node)

    broken = changed(graphs["decoder"], tmp_path / "broken.onnx", remove)
    found = compare(graphs["decoder"], broken)
    assert found.node == scale_of(onnx.load(str(graphs["decoder"].path)).graph, "dec_blocks.0").name
    assert found.proven and not found.fused
    assert len(found.nodes) == 2


def test_a_wrong_rope_table(graphs, tmp_path):
    """The sine table without its sign: the first rotation of the encoder multiplies by it."""
    original = onnx.load(str(graphs["encoder"].path)).graph
    # Sines start at zero, cosines at one.
    multiply = next(
        node
        for node in original.node
        if node.op_type == "Mul" and (table := table_of(original, node)) is not None and table.min() < -0.5
        if np.allclose(table[0], 0)
    )

    def unsign(graph):
        node = node_of(graph, multiply.name)
        table = table_of(graph, node)
        name = next(n for n in node.input if n in constants_of(graph))
        if name in {tensor.name for tensor in graph.initializer}:
            replace(weight_of(graph, name), np.abs(table))
        else:
            maker = next(n for n in graph.node if name in n.output)
            replace(maker.attribute[0].t, np.abs(table))

    found = compare(graphs["encoder"], changed(graphs["encoder"], tmp_path / "broken.onnx", unsign), count=2)
    check_culprit(found)
    assert (found.node, found.op_type) == (multiply.name, "Mul")
    assert len(found.constants) == 1


def constants_of(graph):
    found = {tensor.name: tensor for tensor in graph.initializer}
    return found | {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}


def table_of(graph, node):
    """The rotary table that a node multiplies by: (tokens, head width)."""
    known = constants_of(graph)
    tables = [onnx.numpy_helper.to_array(known[name]) for name in node.input if name in known]
    return tables[0] if tables and tables[0].shape == (12, 16) else None


def test_equal_graphs_agree(graphs):
    assert compare(graphs["decoder"], graphs["decoder"]) is None


def test_two_runtimes_agree_on_the_float_graph(graphs):
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine

    def openvino(graph):
        return OpenVINOEngine(graph, Precision.F32)

    assert compare(graphs["decoder"], graphs["decoder"], run_b=openvino) is None


def test_another_runtime_finds_the_same_node(graphs, tmp_path):
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine

    def transpose(graph):
        tensor = weight_of(graph, node_of(graph, "/enc_blocks.1/attn/proj/MatMul").input[1])
        replace(tensor, onnx.numpy_helper.to_array(tensor).T)

    broken = changed(graphs["encoder"], tmp_path / "broken.onnx", transpose)
    found = compare(graphs["encoder"], broken, run_b=lambda graph: OpenVINOEngine(graph, Precision.F32))
    check_culprit(found)
    assert found.node == "/enc_blocks.1/attn/proj/MatMul"


QUANTIZE = """
import sys
import numpy as np
from onnxruntime import quantization

class Reader(quantization.CalibrationDataReader):
    items = iter([{"image": image} for image in np.load(sys.argv[2]).values()])

    def get_next(self):
        return next(self.items, None)

settings = {"op_types_to_quantize": ["MatMul", "Conv"], "per_channel": True, "reduce_range": True}
quantization.quantize_static(sys.argv[1], sys.argv[3], Reader(), **settings)
"""


def test_a_wrong_weight_of_a_quantized_graph(graphs, tmp_path):
    """A Q/DQ graph on two runtimes; some of its parts hold no quantized node and run in f32."""
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine

    path, fed = tmp_path / "q.onnx", tmp_path / "feeds.npz"
    np.savez(fed, *(feeds["image"] for feeds in feeds_of(graphs["encoder"], 2)))
    # in a process of its own: ModelOpt, once it has run in this one, leaves ONNX Runtime's quantizer changed
    subprocess.run([sys.executable, "-c", QUANTIZE, graphs["encoder"].path, fed, path], check=True, capture_output=True)
    whole = describe_onnx(path)
    name = "/enc_blocks.1/mlp/fc2/MatMul"

    def spoil(graph):
        makers = {output: node for node in graph.node for output in node.output}
        tensor = weight_of(graph, makers[node_of(graph, name).input[1]].input[0])
        array = onnx.numpy_helper.to_array(tensor)
        assert array.dtype == np.int8
        replace(tensor, -array)

    precisions = set()

    def openvino(graph):
        precisions.add(precision := Precision.INT8 if quantizes(graph) else Precision.F32)
        return OpenVINOEngine(graph, precision, {"rest": "f32"} if precision is Precision.INT8 else None)

    found = compare(whole, changed(whole, tmp_path / "broken.onnx", spoil), tolerance=0.1, run_b=openvino)
    check_culprit(found)
    assert found.node == name
    assert len(found.constants) == 1
    assert precisions == {Precision.INT8, Precision.F32}


class Faulty(Engine):
    """ONNX Runtime with outputs changed by a fault."""

    def __init__(self, graph, fault):
        self.inner, self.fault = OnnxRuntimeEngine(graph), fault
        self.graph, self.inputs, self.outputs = graph, graph.inputs, graph.outputs

    def _infer(self, feeds):
        return self.fault(self.graph, self.inner.infer(feeds))

    def kernels(self):
        return []


def test_a_fault_that_vanishes_when_looked_at_is_reported_as_fused(graphs):
    """The runtime is wrong at the second block's output, but only while nothing inside the block is visible."""
    inside = {"/enc_blocks.1/attn/MatMul", "/enc_blocks.1/attn/Softmax", "/enc_blocks.1/mlp/fc1/MatMul"}
    model = onnx.load(str(graphs["encoder"].path)).graph
    hidden = {name for node in model.node if node.name.startswith("/enc_blocks.1/") for name in node.output}

    def fault(graph, outputs):
        cut = {node.name for node in onnx.load(str(graph.path)).graph.node}
        if inside <= cut and not hidden & set(outputs):
            return {name: array * np.float32(1.1) if name == "tokens" else array for name, array in outputs.items()}
        return outputs

    found = compare(graphs["encoder"], graphs["encoder"], run_b=lambda graph: Faulty(graph, fault))
    assert found.fused
    assert found.proven
    assert inside <= set(found.nodes)
    assert not [name for name in found.nodes if not name.startswith(("/enc_blocks.1/", "/enc_norm/"))]


def test_errors_that_build_up_are_not_blamed_on_one_node(graphs):
    """Side b runs with rounded tensors: each node adds a little, none is wrong alone."""

    def fault(graph, outputs):
        depth = len(onnx.load(str(graph.path)).graph.node)
        return {name: array * np.float32(1 + 1e-5 * depth) for name, array in outputs.items()}

    depth = len(onnx.load(str(graphs["encoder"].path)).graph.node)
    found = compare(
        graphs["encoder"], graphs["encoder"], tolerance=0.5e-5 * depth, run_b=lambda graph: Faulty(graph, fault)
    )
    assert not found.proven
    assert "builds up" in found.sentence()


def test_memory_is_bounded(graphs, tmp_path):
    """No engine shows more than the limit allows, and a small limit finds the same node."""
    name = "/dec_blocks.1/mlp/fc2/MatMul"

    def spoil(graph):
        tensor = weight_of(graph, node_of(graph, name).input[1])
        replace(tensor, onnx.numpy_helper.to_array(tensor) * 1.5)

    broken = changed(graphs["decoder"], tmp_path / "broken.onnx", spoil)
    shown = []

    def watched(graph):
        shown.append([4 * int(np.prod(t.shape)) for t in graph.outputs])
        return OnnxRuntimeEngine(graph)

    limit = 60_000
    found = compare(graphs["decoder"], broken, limit=limit, run_a=watched)
    assert found.node == name
    assert max(len(sizes) for sizes in shown) > 1
    assert all(3 * sum(sizes) <= limit or len(sizes) == 1 for sizes in shown)


def test_external_weights_are_linked_not_copied(graphs, tmp_path):
    """Weights in a file of their own: temporary graphs refer to the same bytes, and nothing is left behind."""
    model = onnx.load(str(graphs["decoder"].path))
    sides = []
    for side in ("right", "wrong"):
        folder = tmp_path / side
        folder.mkdir()
        if side == "wrong":
            tensor = weight_of(model.graph, node_of(model.graph, "/dec_blocks.0/cross_attn/projk/MatMul").input[1])
            replace(tensor, onnx.numpy_helper.to_array(tensor) * 2)
        path = folder / "decoder.onnx"
        onnx.save_model(model, str(path), save_as_external_data=True, location="decoder.onnx.data", size_threshold=256)
        model = onnx.load(str(path))
        sides.append(describe_onnx(path))
    inodes = {side.path.with_name("decoder.onnx.data").stat().st_ino for side in sides}
    seen = set()

    def watched(graph):
        data = graph.path.with_name("decoder.onnx.data").stat()
        seen.add(data.st_ino)
        assert 2 * graph.path.stat().st_size < data.st_size
        return OnnxRuntimeEngine(graph)

    found = compare(sides[0], sides[1], run_a=watched, run_b=watched)
    check_culprit(found)
    assert found.node == "/dec_blocks.0/cross_attn/projk/MatMul"
    assert list(found.constants.values()) == [pytest.approx(1.0)]
    assert seen == inodes
    assert sorted(p.name for p in (tmp_path / "right").iterdir()) == ["decoder.onnx", "decoder.onnx.data"]


def test_weights_are_written_once_and_held_by_no_cut(graphs, tmp_path):
    """Weights inside the ONNX file move to a temporary file of their own; two runtimes of one graph share it."""
    graph = graphs["decoder"]
    folders, inodes = set(), set()

    def look(cut):
        data = cut.path.with_name(f"{cut.path.name}.data").stat()
        folders.add(cut.path.parent)
        inodes.add(data.st_ino)
        assert cut.path.stat().st_size < data.st_size / 2
        return cut

    def run_a(cut):
        return OnnxRuntimeEngine(look(cut))

    def run_b(cut):
        return Faulty(look(cut), lambda _, out: {name: array * np.float32(1.01) for name, array in out.items()})

    found = first_difference(graph, run_a, graph, run_b, feeds_of(graph), 1e-4, LIMIT, tmp_path)
    assert found is not None
    assert len(folders) == len(inodes) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_compared(graphs, tmp_path):
    with pytest.raises(BackendError, match="no feeds"):
        first_difference(graphs["encoder"], OnnxRuntimeEngine, graphs["encoder"], OnnxRuntimeEngine, [], 1e-4, LIMIT)
    ir = dataclasses.replace(graphs["encoder"], path=tmp_path / "encoder.xml")
    with pytest.raises(BackendError, match="no ONNX graph"):
        compare(graphs["encoder"], ir)
    with pytest.raises(BackendError, match="no float output of the same name"):
        first_difference(graphs["encoder"], OnnxRuntimeEngine, graphs["decoder"], OnnxRuntimeEngine, [{}], 1e-4, LIMIT)


def test_a_fault_that_is_hidden_on_one_way_is_found_on_the_other(tmp_path):
    """The second factor takes the first one's fault back, 40 nodes follow; but the sum reads the faulty tensor too."""

    def build(path, first, second):
        make = onnx.helper.make_node
        nodes = [make("Mul", ["x", "first"], ["t"], "fault"), make("Mul", ["t", "second"], ["u0"], "cure")]
        nodes += [make("Add", [f"u{k}", "one"], [f"u{k + 1}"], f"add{k}") for k in range(40)]
        nodes += [make("Add", ["u40", "t"], ["y"], "sum")]
        value = onnx.helper.make_tensor_value_info
        constants = {"first": first, "second": second, "one": 1.0}
        graph = onnx.helper.make_graph(
            nodes,
            "toy",
            [value("x", onnx.TensorProto.FLOAT, [4])],
            [value("y", onnx.TensorProto.FLOAT, [4])],
            [onnx.numpy_helper.from_array(np.float32(v), name) for name, v in constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
        onnx.save_model(model, str(path))
        return describe_onnx(path)

    found = compare(build(tmp_path / "a.onnx", 2.0, 3.0), build(tmp_path / "b.onnx", 4.0, 1.5))
    check_culprit(found)
    assert found.node == "fault"
    assert found.constants == {"first": pytest.approx(1.0)}
