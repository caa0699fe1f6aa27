"""Applies a keep-list to OpenVINO models: finds the protected nodes, and checks that an engine ran them in float."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from backends import keep as keep_list
from backends.base import Kernel
from backends.openvino.engine import OpenVINOEngine, read_model
from backends.openvino.flops import CONVOLUTIONS, MATMULS, live_operations

if TYPE_CHECKING:
    import openvino as ov


def kept_nodes(model: ov.Model, keep: Iterable[str]) -> dict[str, str]:
    """Returns names and types of the nodes that a keep-list protects; see `backends.keep.kept`, also for errors."""
    operations = live_operations(model)
    live = {op.get_friendly_name() for op in operations}
    inputs = {op.get_friendly_name() for op in model.get_parameters()}
    nodes = []
    for op in operations:
        makers: list[str] = []
        sizes: list[int] = []
        for value in op.input_values():
            name = value.get_node().get_friendly_name()
            if name in live or name in inputs:
                makers.append(name if name in live else "")
            else:
                sizes.append(math.prod(value.get_shape()) if value.get_partial_shape().is_static else 0)
        nodes.append(keep_list.Node(op.get_friendly_name(), op.get_type_name(), tuple(makers), tuple(sizes)))
    return keep_list.kept(nodes, keep)


def check_keep(engine: OpenVINOEngine, keep: Sequence[str], kernels: Sequence[Kernel] | None = None) -> list[Kernel]:
    """Returns the executed int8 kernels that hold a kept node: none when the engine honoured the keep-list.

    kernels: those of `engine` where they are known already, which saves a second profile. Elementwise nodes, Softmax
    and normalisations that are fused into a matmul, a convolution or a Subgraph are computed there in float, whatever
    the kernel's name says: of such kernels only matmuls, convolutions and attention count. Kernels of any other type
    count with all their nodes.
    """
    kept = kept_nodes(read_model(engine.graph.path), keep)
    heavy = {name for name, kind in kept.items() if kind in MATMULS | CONVOLUTIONS}
    fusing = {"Subgraph", "FullyConnected", "MatMul", "Convolution", "Deconvolution"}
    offending = []
    for kernel in engine.kernels() if kernels is None else kernels:
        names = heavy if kernel.type in fusing else kept.keys()
        if kernel.precision == "int8" and not names.isdisjoint(kernel.originals):
            offending.append(kernel)
    return offending


def name_nodes(model: ov.Model) -> None:
    """Replaces automatic names such as `MVN_45`, which count all nodes a process ever made, by `MVN.<position>`."""
    taken = {op.get_friendly_name() for op in model.get_ops()}
    for index, op in enumerate(model.get_ordered_ops()):
        name, kind = op.get_friendly_name(), op.get_type_name()
        # A folded constant keeps the name of the operation it replaces.
        automatic = r"[A-Za-z0-9]+_\d+" if kind == "Constant" else rf"{re.escape(kind)}_\d+"
        if re.fullmatch(automatic, name) and kind not in ("Parameter", "Result"):
            new = f"{kind}.{index}"
            while new in taken:
                new += "+"
            taken.add(new)
            op.set_friendly_name(new)
