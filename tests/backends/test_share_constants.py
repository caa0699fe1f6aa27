"""Export: a buffer that a module uses many times is stored once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from backends.exchange import _share_constants, export
from backends.reference import OnnxRuntimeEngine

USES = 6


class Tables(nn.Module):
    """Uses one plain tensor (a constant for the tracing exporter) in every layer, and another one once."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(64, 64, generator=generator)
        self.other = torch.randn(64, 64, generator=generator)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(USES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x * self.table))
        return x + self.other


def large(path: Path) -> list[np.ndarray]:
    """Every tensor of 64x64 in the file, wherever it is kept."""
    graph = onnx.load(str(path)).graph
    held = [node.attribute[0].t for node in graph.node if node.op_type == "Constant"]
    return [a for a in map(numpy_helper.to_array, [*held, *graph.initializer]) if a.shape == (64, 64)]


def test_a_buffer_is_exported_once(tmp_path: Path) -> None:
    module, x = Tables().eval(), torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    graph = export(module, {"x": x}, ["y"], tmp_path / "tables.onnx")  # checked against torch in there
    arrays = large(graph.path)
    assert len(arrays) == USES + 2
    assert sum(np.array_equal(array, module.table.numpy()) for array in arrays) == 1
    assert sum(np.array_equal(array, module.other.numpy()) for array in arrays) == 1
    assert graph.size_bytes < (USES + 2) * 64 * 64 * 4 + 8000
    with OnnxRuntimeEngine(graph) as engine, torch.no_grad():
        np.testing.assert_allclose(engine.infer({"x": x.numpy()})["y"], module(x).numpy(), atol=1e-5)


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name + "_value"))


def model_of(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [512])
    named = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [512]) for name in outputs]
    return helper.make_model(helper.make_graph(nodes, "g", [x], named), opset_imports=[helper.make_opsetid("", 18)])


def infer(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    onnx.checker.check_model(model)
    model.ir_version = 9
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


VALUES = np.arange(512, dtype=np.float32)


@pytest.mark.parametrize("outputs", [["y"], ["y", "b"]])
def test_outputs_keep_their_names(outputs: list[str]) -> None:
    """A constant that is an output of the graph stays, though an equal one came before."""
    nodes = [constant("a", VALUES), constant("b", VALUES), constant("c", VALUES)]
    nodes += [helper.make_node("Sum", ["x", "a", "b", "c"], ["y"])]
    model = model_of(nodes, outputs)
    before = infer(model, VALUES)
    _share_constants(model.graph)
    after = infer(model, VALUES)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    held = [n for n in model.graph.node if n.op_type == "Constant"]
    assert len(held) + len(model.graph.initializer) == len(outputs)


def test_small_and_different_constants_stay() -> None:
    nodes = [constant("a", VALUES), constant("b", VALUES + 1), constant("s", np.ones(1, np.float32))]
    nodes += [constant("t", np.ones(1, np.float32)), helper.make_node("Sum", ["x", "a", "b", "s", "t"], ["y"])]
    model = model_of(nodes, ["y"])
    before = infer(model, VALUES)
    _share_constants(model.graph)
    assert [n.output[0] for n in model.graph.node if n.op_type == "Constant"] == ["s", "t"]
    assert [t.name for t in model.graph.initializer] == ["a", "b"]
    assert np.array_equal(infer(model, VALUES)[0], before[0])


def test_a_graph_with_branches_is_left_alone() -> None:
    """A branch may name a constant of the outer graph, so none is renamed there."""

    def branch(name: str, used: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [512])
        return helper.make_graph([helper.make_node("Add", ["x", used], [name])], name + "_branch", [], [out])

    nodes = [constant("a", VALUES), constant("b", VALUES), constant("flag", np.array(False))]
    nodes += [helper.make_node("If", ["flag"], ["y"], then_branch=branch("p", "a"), else_branch=branch("q", "b"))]
    model = model_of(nodes, ["y"])
    _share_constants(model.graph)
    assert np.array_equal(infer(model, VALUES)[0], 2 * VALUES)
