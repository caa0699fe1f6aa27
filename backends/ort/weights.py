"""Packs the weights of a graph for ONNX Runtime's MatMulNBits, activations stay float: `compress_weights`.

The operator's CPU kernels read packed integers and multiply in float32 (`accuracy_level` 1: "input fp32, accumulator
fp32"; 4 would round the inputs to int8 in each call). With 4 bits a kernel turns a panel of weights into floats while
it multiplies; with 8 bits and float inputs the runtime has no such kernel: it dequantizes the whole matrix in each
call.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backends.base import BackendError, Graph, first_line
from backends.onnx_graph import OnnxGraph
from backends.ort.graph import loaded
from backends.qdq import tidy, write_graph
from backends.quantspec import NothingLeft

if TYPE_CHECKING:
    import onnx

GROUPS = (16, 32, 64, 128, 256)
"""Weights that may share a scale, along the input channels: powers of two, as the operator's kernels take them."""

FLOAT_INPUTS = 1
"""`accuracy_level` of kernels that take and sum float32; contrib_ops/cpu/quantization/matmul_nbits.cc names them."""

PACKED = "MatMulNBits"
_PRODUCT = "/product"


@dataclass(frozen=True)
class WeightSpec:
    """Settings of a compression. group: weights that share a scale, along the input channels."""

    bits: int = 4
    symmetric: bool = True
    group: int = 64

    def check(self) -> None:
        """Raises BackendError for settings that MatMulNBits cannot follow."""
        if self.bits not in (4, 8):
            raise BackendError(f"ONNX Runtime packs weights to 4 or 8 bits here, not {self.bits}")
        if self.group not in GROUPS:
            raise BackendError(
                f"MatMulNBits shares a scale among {', '.join(map(str, GROUPS))} weights, not {self.group}"
            )


def compress_weights(graph: Graph, spec: WeightSpec, target: Path) -> Graph:
    """Writes the graph with packed integer weights as ONNX to `target` (.onnx) and returns it.

    Every product with a constant matrix is packed; convolutions stay in float, as the runtime has no such kernel for
    them. Where the input channels are no multiple of the group, the last one is filled up with zeros. Raises
    BackendError for settings that MatMulNBits cannot follow, NothingLeft for a graph without weights of its kind.
    """
    spec.check()
    model = loaded(graph)
    _plain_products(model)
    tidy(model)  # exporters store a shared weight once for each of its products
    model = _packed(model, spec, graph.path.name)
    if not any(node.op_type == PACKED for node in model.graph.node):
        raise NothingLeft(f"{graph.path.name} holds no weight that MatMulNBits takes")
    _drop_unread(model)
    _list_shapes(model, OnnxGraph(graph.path).shapes)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}.", dir=target.parent) as folder:
        return write_graph(model, target.stem, Path(folder), target.parent, shapes=True)


def _packed(model: onnx.ModelProto, spec: WeightSpec, name: str) -> onnx.ModelProto:
    """Runs the quantizer on a model in memory; it logs every node."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logger = logging.getLogger(MatMulNBitsQuantizer.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quantizer = MatMulNBitsQuantizer(
            model, bits=spec.bits, block_size=spec.group, is_symmetric=spec.symmetric, accuracy_level=FLOAT_INPUTS
        )
        quantizer.process()
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot pack the weights of {name}: {first_line(error)}") from error
    finally:
        logger.setLevel(level)
    made: onnx.ModelProto = quantizer.model.model
    return made


def _plain_products(model: onnx.ModelProto) -> None:
    """Makes MatMul, and Add for the bias, of every Gemm with a constant weight: MatMulNBits replaces MatMul alone."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[tuple[str, bool, float], str] = {}  # a weight that several products share stays one
    nodes = []
    for node in graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Gemm" or node.input[1] not in constants or settings.get("transA", 0):
            nodes.append(node)
            continue
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if bias is not None and settings.get("beta", 1.0) != 1.0:
            nodes.append(node)
            continue
        turned, scale = bool(settings.get("transB", 0)), float(settings.get("alpha", 1.0))
        key = (node.input[1], turned, scale)
        if key not in made:
            weight = numpy_helper.to_array(constants[node.input[1]])
            weight = np.ascontiguousarray(weight.T if turned else weight)
            made[key] = node.input[1] if not turned and scale == 1.0 else f"{node.input[1]}/of_product_{len(made)}"
            if made[key] != node.input[1]:
                graph.initializer.append(numpy_helper.from_array(weight * np.float32(scale), made[key]))
        product = node.output[0] if bias is None else f"{node.output[0]}{_PRODUCT}"
        nodes.append(helper.make_node("MatMul", [node.input[0], made[key]], [product], node.name))
        if bias is not None:
            nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], f"{node.name}/bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def _drop_unread(model: onnx.ModelProto) -> None:
    """Drops constants that nobody reads, and what the quantizer stored twice: a weight that several products share."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept: Mapping[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer if t.name in read}
    tensors = list(kept.values())
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)


def _list_shapes(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Lists the shapes of what packed products make: ONNX's inference does not know the operator."""
    from onnx import TensorProto, helper

    del model.graph.value_info[:]
    for node in model.graph.node:
        shape = shapes.get(node.output[0].removesuffix(_PRODUCT)) if node.op_type == PACKED else None
        if shape is not None:
            model.graph.value_info.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, shape))
