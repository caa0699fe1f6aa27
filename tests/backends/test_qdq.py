"""Q/DQ graphs whose weights are brought to 7 bits, for runtimes whose int8 sums saturate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from backend_toys import error, image, quantized
from onnx import numpy_helper

from backends.base import Graph, QuantSpec, Source
from backends.ort.quantizer import ORTQuantizer
from backends.qdq import HALF, with_half_range
from backends.reference import OnnxRuntimeEngine

FULL = QuantSpec(calibration_samples=3, weight_range="full")


def stored(graph: Graph) -> dict[str, np.ndarray]:
    """The stored integers behind every DequantizeLinear."""
    model = onnx.load(str(graph.path))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {name: values for name, values in constants.items() if name in read}


def test_weights_and_biases_are_halved_and_mean_the_same(source: Source, tmp_path: Path) -> None:
    full = quantized(ORTQuantizer(), FULL, source, tmp_path / "full")
    (tmp_path / "half").mkdir()
    half = with_half_range(full, tmp_path / "half")
    assert half is not None
    before, after = stored(full), stored(half)
    assert before.keys() == after.keys() and {q.dtype.name for q in before.values()} == {"int8", "int32"}
    for name, q in before.items():
        assert np.array_equal(after[name], np.rint(q / 2)), name
    assert max(np.abs(q.astype(int)).max() for q in after.values() if q.dtype == np.int8) == HALF
    feeds = {tensor.name: image(50).numpy() for tensor in full.inputs}
    found = {}
    for which, graph in (("f32", source.graph), ("half", half)):
        with OnnxRuntimeEngine(graph) as engine:
            found[which] = engine.infer(feeds)
    assert all(error(found["half"][name], found["f32"][name]) < 0.05 for name in found["f32"])


def test_half_weights_stay_as_they_are(source: Source, tmp_path: Path) -> None:
    half = quantized(ORTQuantizer(), dataclasses.replace(FULL, weight_range="half"), source, tmp_path)
    assert with_half_range(half, tmp_path) is None
