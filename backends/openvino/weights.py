"""Compresses the weights of a graph with NNCF, activations stay float: `compress_weights`.

OpenVINO's CPU kernels read the packed integers and multiply in float. Engines here run with dynamic quantization of
activations off (see `engine`), so what is timed is weight-only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Feeds, Graph
from backends.calibration import CalibrationItems
from backends.openvino.engine import read_model, write_ir
from backends.openvino.nncf import _quiet
from backends.openvino.passes import fold_constants
from backends.quantspec import NothingLeft

if TYPE_CHECKING:
    import openvino as ov

METHODS: Mapping[str, Mapping[str, Any]] = {
    "nearest": {},
    "awq": {"awq": True},
    "scale_estimation": {"scale_estimation": True},
    "gptq": {"gptq": True},
}
"""Methods that choose the integers, and what they are called by NNCF; all but nearest read calibration feeds, and
change only int4 weights."""

PACKED = ("i4", "u4", "i8", "u8")
"""Element types of packed weights."""


@dataclass(frozen=True)
class WeightSpec:
    """Settings of a compression. group: weights that share a scale, along the input channels; -1: a channel."""

    bits: int = 8
    symmetric: bool = True
    group: int = -1
    method: str = "nearest"
    samples: int = 16

    def check(self) -> None:
        """Raises BackendError for settings that NNCF cannot follow."""
        if self.bits not in (4, 8):
            raise BackendError(f"NNCF compresses weights to 4 or 8 bits, not {self.bits}")
        if self.bits == 8 and (self.group != -1 or self.method != "nearest"):
            raise BackendError("NNCF compresses weights to 8 bits by output channel and to the nearest, nothing else")
        if self.method not in METHODS:
            raise BackendError(f"method {self.method!r} is not one of {', '.join(METHODS)}")


def compress_weights(graph: Graph, spec: WeightSpec, target: Path, feeds: Iterable[Feeds] | None = None) -> Graph:
    """Writes the graph with packed integer weights as IR to `target` (.xml) and returns it.

    feeds: calibration items, a collection; needed by every method but 'nearest'. Every weight of a matrix product is
    compressed, the last layers too; where the input channels are no multiple of the group, NNCF takes the largest
    smaller power of two that divides them. Raises BackendError for settings that NNCF cannot follow, NothingLeft for
    a graph without weights of its kind.
    """
    import nncf

    spec.check()
    model = read_model(graph.path)
    fold_constants(model)
    _transpose(model)
    kind = f"INT{spec.bits}_{'SYM' if spec.symmetric else 'ASYM'}"
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode[kind]}
    if spec.bits == 4:
        adjusted = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        options |= {
            "group_size": spec.group,
            "ratio": 1.0,
            "all_layers": True,
            "backup_mode": nncf.BackupMode.INT8_SYM if spec.symmetric else nncf.BackupMode.INT8_ASYM,
            "advanced_parameters": adjusted,
            **METHODS[spec.method],
        }
        if spec.method != "nearest":
            items = CalibrationItems(feeds or [], graph.inputs, spec.samples)
            options |= {"dataset": nncf.Dataset(items), "subset_size": spec.samples}
    with _quiet(progress=False):
        try:
            compressed = nncf.compress_weights(model, **options)
        except (nncf.ValidationError, nncf.InternalError, nncf.ParameterNotSupportedError, RuntimeError) as error:
            raise BackendError(f"NNCF cannot compress the weights of {graph.path.name}: {error}") from error
    if not any(op.get_element_type().get_type_name() in PACKED for op in compressed.get_ops()):
        raise NothingLeft(f"{graph.path.name} holds no weight that NNCF compresses")
    return write_ir(compressed, target)


def _transpose(model: ov.Model) -> None:
    """Stores the weights of products as (outputs, inputs), as torch does: NNCF's GPTQ takes no other order."""
    import openvino.opset13 as ops

    made: dict[str, ov.Node] = {}  # a weight that several products share stays one
    for op in model.get_ordered_ops():
        if op.get_type_name() != "MatMul" or op.get_attributes()["transpose_b"]:
            continue
        weight = op.input_value(1).get_node()
        if weight.get_type_name() != "Constant" or len(weight.get_output_shape(0)) != 2:
            continue
        turned = made.get(weight.get_name())
        if turned is None:
            turned = made[weight.get_name()] = ops.constant(np.ascontiguousarray(weight.get_data().T))
            turned.set_friendly_name(weight.get_friendly_name())
        product = ops.matmul(op.input_value(0), turned, op.get_attributes()["transpose_a"], True)
        product.set_friendly_name(op.get_friendly_name())
        op.output(0).replace(product.output(0))
