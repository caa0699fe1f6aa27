"""Two small ONNX graphs that stand for an encoder and a decoder, with as many weights as a test asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from backends.base import Graph, Precision
from backends.exchange import describe_onnx
from pqk.engines.variant import Variant

SIDE = 32
PIXELS = 3 * SIDE * SIDE
Shapes = dict[str, tuple[int, ...]]


def toy_variant(folder: Path, name: str, backend: str = "reference", width: int = 16, terms: int = 1) -> Variant:
    """Tokens are the image times PIXELS x `width` weights, points are sums of tokens.

    The weights are the sum of `terms` stored matrices, which a compiler adds up once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image, tokens = (1, 3, SIDE, SIDE), (1, 1, width)
    random = np.random.default_rng(0)
    stored = {f"w{k}": random.standard_normal((PIXELS, width), dtype=np.float32) for k in range(terms)}
    encode = [
        helper.make_node("Reshape", ["image", "row"], ["flat"], "/reshape"),
        helper.make_node("Sum", list(stored), ["w"], "/sum"),
        helper.make_node("MatMul", ["flat", "w"], ["tokens"], "/matmul"),
    ]
    decode = [helper.make_node("Add", ["tokens_1", "tokens_2"], ["pts3d_1"], "/add")]
    encoder = _graph(
        folder / "encoder.onnx",
        encode,
        {"image": image},
        {"tokens": tokens},
        {"row": np.array([1, 1, PIXELS]), **stored},
    )
    decoder = _graph(folder / "decoder.onnx", decode, {"tokens_1": tokens, "tokens_2": tokens}, {"pts3d_1": tokens}, {})
    return Variant(name, backend, Precision.F32, {"encoder": encoder, "decoder": decoder})


def _graph(
    path: Path, nodes: list[onnx.NodeProto], inputs: Shapes, outputs: Shapes, weights: dict[str, np.ndarray]
) -> Graph:
    def ports(shapes: Shapes) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, path.stem, ports(inputs), ports(outputs), stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return describe_onnx(path)
