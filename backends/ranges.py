"""Measures ranges of activations: runs the float graph over the calibration items and reduces tensors inside it.

The tools' own calibration does the same with all graph optimisations off, for every tensor that they may quantize.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from backends.base import BackendError, Feeds, Graph, TensorInfo
from backends.calibration import not_finite
from backends.reference import OnnxRuntimeEngine


def tensor_ranges(
    path: Path, inputs: Sequence[TensorInfo], tensors: Sequence[str], items: Iterable[Feeds]
) -> dict[str, tuple[float, float]]:
    """Returns the least and the largest value of each tensor over all items. Only one item is in memory at a time.

    Writes `<stem>.ranges.onnx` beside `path`, so that external weights are found. Raises BackendError for a tensor that
    the graph does not compute, and for an item that gives NaN or inf in one of the tensors.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    known = {name for node in graph.node for name in node.output} | {t.name for t in inputs}
    missing = sorted(set(tensors) - known)
    if missing:
        raise BackendError(f"{path.name} computes no tensor {missing[0]!r}, so it has no range")
    del graph.output[:]
    # Reductions read the tensor where it is; of Abs there would be a copy. Least and largest values pass over NaN, sums
    # do not.
    names = []
    for k, tensor in enumerate(tensors):
        for kind in ("ReduceMin", "ReduceMax", "ReduceSum"):
            names.append(f"range.{kind}.{k}")
            graph.node.append(onnx.helper.make_node(kind, [tensor], [names[-1]], names[-1], keepdims=0))
            graph.output.append(onnx.helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, []))
    reduced = path.with_name(f"{path.stem}.ranges.onnx")
    onnx.save(model, str(reduced))
    del model
    outputs = tuple(TensorInfo(name, (), "float32") for name in names)
    least, largest = (np.full(len(tensors), x, np.float32) for x in (np.inf, -np.inf))
    try:
        with OnnxRuntimeEngine(Graph(reduced, tuple(inputs), outputs, "")) as engine:
            for index, item in enumerate(items):
                found = engine.infer(item)
                reductions = np.array([found[name] for name in names], np.float32).reshape(-1, 3)
                broken = ~np.isfinite(reductions).all(axis=1)
                if broken.any():
                    raise not_finite(tensors[int(broken.argmax())], index)
                least, largest = np.minimum(least, reductions[:, 0]), np.maximum(largest, reductions[:, 1])
    finally:
        reduced.unlink()
    return dict(zip(tensors, zip(least.tolist(), largest.tolist(), strict=True), strict=True))
