"""ONNX Runtime's MatMulNBits: packed weights, inputs that stay float, every Gemm a product that can be packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from backends.base import BackendError, Graph, Precision
from backends.exchange import describe_onnx, export
from backends.ort.engine import ORTEngine
from backends.ort.weights import FLOAT_INPUTS, GROUPS, PACKED, WeightSpec, compress_weights

ROWS, WIDTH = 24, 72  # 72: no multiple of any group


class Toy(torch.nn.Module):
    """A convolution, a product of three axes, two of two axes (Gemm), one weight used twice, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(ROWS, ROWS, 1)
        self.tokens = torch.nn.Linear(WIDTH, WIDTH)
        self.flat = torch.nn.Linear(WIDTH, 40)
        self.again = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(self.conv(x)).relu()
        x = x + torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x
        return self.flat(self.again(self.again(x[0]).relu()))


def exported(path: Path) -> Graph:
    torch.manual_seed(0)
    return export(Toy(), {"x": torch.randn(1, ROWS, WIDTH)}, ["y"], path)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return exported(tmp_path_factory.mktemp("ort") / "toy.onnx")


def ran(graph: Graph, seed: int = 1) -> np.ndarray:
    feeds = {"x": np.random.default_rng(seed).standard_normal((1, ROWS, WIDTH)).astype(np.float32)}
    with ORTEngine(graph, Precision.F32, {"threads": 1}) as engine:
        return engine.infer(feeds)["y"]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def packed_nodes(graph: Graph) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(str(graph.path)).graph.node if node.op_type == PACKED]


def dequantized(graph: Graph, path: Path) -> Graph:
    """Writes the graph with plain products of the weights that the packed integers, scales and zero points mean."""
    model = onnx.load(str(graph.path))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type != PACKED:
            nodes.append(node)
            continue
        about = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        bits, rows, outputs = about["bits"], about["K"], about["N"]
        codes = numbers(constants[node.input[1]].reshape(outputs, -1), bits).reshape(outputs, -1, about["block_size"])
        scales = constants[node.input[2]].reshape(outputs, -1, 1)
        zeros: float | np.ndarray = 2.0 ** (bits - 1)
        if len(node.input) > 3:
            zeros = numbers(constants[node.input[3]].reshape(outputs, -1), bits)[:, : scales.shape[1], None]
        weight = ((codes - zeros) * scales).reshape(outputs, -1)[:, :rows].T.astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), f"{node.name}/weight"))
        nodes.append(helper.make_node("MatMul", [node.input[0], f"{node.name}/weight"], node.output, node.name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))
    return describe_onnx(path)


def numbers(packed: np.ndarray, bits: int) -> np.ndarray:
    """Returns the codes of each row; of two in a byte the lower half is the first."""
    if bits == 8:
        return packed.astype(np.float64)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.float64)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [*((4, group) for group in GROUPS), (8, 32), (8, 256)])
def test_the_engine_multiplies_float_inputs_with_what_the_integers_mean(
    graph: Graph, tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    made = compress_weights(graph, WeightSpec(bits, symmetric, group), tmp_path / "packed.onnx")
    nodes = packed_nodes(made)
    assert len(nodes) == 4  # tokens, flat, and both uses of again
    for node in nodes:
        about = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (about["bits"], about["block_size"], about["accuracy_level"]) == (bits, group, FLOAT_INPUTS)
    assert apart(ran(made), ran(dequantized(made, tmp_path / "plain.onnx"))) < 1e-5
    error = apart(ran(made), ran(graph))
    assert 1e-4 < error < (0.03 if bits == 8 else 0.4), error


def test_level_4_rounds_the_inputs_which_the_comparison_sees(graph: Graph, tmp_path: Path) -> None:
    made = compress_weights(graph, WeightSpec(4, True, 32), tmp_path / "packed.onnx")
    model = onnx.load(str(made.path))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4
    onnx.save(model, str(tmp_path / "rounded.onnx"))
    rounded = ran(describe_onnx(tmp_path / "rounded.onnx"))
    assert apart(rounded, ran(dequantized(made, tmp_path / "plain.onnx"))) > 1e-3


def test_a_shared_weight_is_stored_once_and_the_same_input_gives_the_same_bytes(graph: Graph, tmp_path: Path) -> None:
    made = compress_weights(graph, WeightSpec(4, True, 32), tmp_path / "a" / "packed.onnx")
    names = [tensor.name for tensor in onnx.load(str(made.path)).graph.initializer]
    assert len(names) == len(set(names))
    assert len({node.input[1] for node in packed_nodes(made)}) == 3
    assert made.size_bytes < 0.5 * graph.size_bytes
    assert made.sha256 == compress_weights(graph, WeightSpec(4, True, 32), tmp_path / "b" / "packed.onnx").sha256


def test_the_profile_names_the_packed_kernels(graph: Graph, tmp_path: Path) -> None:
    made = compress_weights(graph, WeightSpec(4, True, 32), tmp_path / "packed.onnx")
    with ORTEngine(made, Precision.F32, {"threads": 1}) as engine:
        kernels = engine.kernels()
    assert sum(kernel.type == PACKED for kernel in kernels) == 4
    assert not any(kernel.precision == "int8" for kernel in kernels)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (WeightSpec(2), "packs weights to 4 or 8 bits here, not 2"),
        (WeightSpec(4, group=48), "shares a scale among 16, 32, 64, 128, 256 weights, not 48"),
    ],
)
def test_what_the_operator_cannot_follow_is_refused(graph: Graph, tmp_path: Path, spec: WeightSpec, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        compress_weights(graph, spec, tmp_path / "packed.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_without_matrices_is_refused(tmp_path: Path) -> None:
    conv = export(torch.nn.Conv1d(ROWS, 8, 1), {"x": torch.randn(1, ROWS, WIDTH)}, ["y"], tmp_path / "conv.onnx")
    with pytest.raises(BackendError, match=r"conv\.onnx holds no weight that MatMulNBits takes"):
        compress_weights(conv, WeightSpec(), tmp_path / "packed.onnx")
