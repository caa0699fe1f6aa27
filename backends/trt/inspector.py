"""Reads what a TensorRT engine executed: the JSON of its inspector (detailed verbosity) as kernels.

Three forms are read. Of a layer's tensors each has

- TensorRT 10 and before: `Format/Datatype`, "Half" or "Thirty-two wide channel vectorized row major Int8 format",
- TensorRT 11: `Format` and `DataType` apart (and `I/O Tensors` in place of `Bindings` beside the layers; NVIDIA's
  migration guide, "IEngineInspector JSON Output"),
- TensorRT-RTX 1.7: `Format` and `Datatype`, and `I/O Tensors` (the strings of its library).

An engine that was built with names alone lists them as plain strings. What these do not show is 'unknown'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from backends.base import Kernel
from backends.onnx_graph import CONVOLUTIONS, MATMULS, OnnxGraph

_TYPES = {
    **dict.fromkeys(("float", "fp32", "float32"), "f32"),
    **dict.fromkeys(("half", "fp16", "float16"), "f16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp8", "fp8e4m3", "float8e4m3fn", "e4m3"), "fp8"),
    **{name: name for name in ("int8", "uint8", "int4", "fp4", "int32", "int64", "bool")},
}
_INDICES = ("int32", "int64", "bool")  # masks, shapes and positions: no operands of a product
# cuDNN's and TensorRT's kernels are named <types of A and C>_<type of the product><type of the sum>_<type of the rest>,
# such as sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n or sm80_xmma_fprop_implicit_gemm_i8f16_i8i32_f32_nhwckrsc_nhwc.
_NAMED = re.compile(r"xmma_.*?_(?:[a-z]+[0-9]+)+?_(tf32|bf16|f16|f32|i8|e4m3)(?:i32|f32|f16|bf16)_(?:f32|f16|bf16|i8)_")
_PRODUCTS = {"i8": "int8", "e4m3": "fp8"}
_METADATA = re.compile(r"\[ONNX Layer: (.+?)\](?=\s*(?:[\x1e\x1f]|\[ONNX Layer: |$))", re.DOTALL)
_HEAVY = re.compile(r"conv|gemm|matrix_?multiply|matmul|fullyconnected|correlation|mha", re.IGNORECASE)
_MOVERS = re.compile(r"reformat|shuffle|constant|noop|signal|wait|copy|slice|concat|quantize|^cast$", re.IGNORECASE)


def layer_kernels(inspected: str, times: Mapping[str, float], graph: OnnxGraph, tf32: bool = False) -> list[Kernel]:
    """Returns the kernels of the inspector's JSON. times: microseconds by layer name. tf32: it may round to TF32.

    A layer's `Metadata` names its ONNX nodes. A node's FLOPs go to the layer that names it and multiplies; where
    several layers could have done the work in different precisions, and where none names it, they go to a kernel of
    precision 'unknown'. A layer's precision is what the name of its kernel says of the product, else the type of its
    first input that is no mask or index, in which a product reads its operands. In an int8 kernel a node that the graph
    keeps in float is 'unknown': fused attention may do one of its products in float.
    """
    layers = _layers(inspected)
    work = {n.name: n for n in graph.work() if n.op_type in MATMULS | CONVOLUTIONS}
    names = [tuple(dict.fromkeys(_METADATA.findall(str(layer.get("Metadata") or "")))) for layer in layers]
    precisions = [_precision(layer, tf32) for layer in layers]
    owner = {name: found for name in work if (found := _owner(name, layers, names, precisions)) is not None}
    kernels: list[Kernel] = []
    for k, layer in enumerate(layers):
        title, tactic = _title(layer, k), str(layer.get("TacticName") or layer.get("LayerType") or "unknown")
        groups: dict[str, list[str]] = {precisions[k]: []}
        for name in (n for n in names[k] if owner.get(n) == k):
            doubtful = precisions[k] in ("int8", "fp8") and graph.precision(work[name]) not in ("int8", "fp8")
            groups.setdefault("unknown" if doubtful else precisions[k], []).append(name)
        for ran, mine in groups.items():
            first = ran == precisions[k]
            others = tuple(n for n in names[k] if owner.get(n) != k) if first else ()
            flops = sum(graph.flops(work[name]) for name in mine)
            time = times.get(title, 0.0) if first else 0.0
            kind = str(layer.get("LayerType") or "unknown")
            kernels.append(Kernel(title, kind, tactic, ran, time, flops, (*mine, *others)))
    missing = tuple(name for name in work if name not in owner)
    if missing:
        total = sum(graph.flops(work[name]) for name in missing)
        kernels.append(Kernel("(not attributed)", "unknown", "unknown", "unknown", 0.0, total, missing))
    return kernels


def _layers(inspected: str) -> list[Mapping[str, Any]]:
    """Returns the layers as objects; one that the inspector names only has its name alone. Empty for other text."""
    try:
        found = json.loads(inspected)
    except ValueError:
        return []
    listed = found.get("Layers") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        return []
    return [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in listed]


def _title(layer: Mapping[str, Any], position: int) -> str:
    return str(layer.get("Name") or f"layer {position}")


def _owner(
    node: str, layers: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], precisions: Sequence[str]
) -> int | None:
    """Returns the layer that did an ONNX node's work; None where none did, or several of different precisions may."""
    able = [k for k, mine in enumerate(names) if node in mine and not _MOVERS.search(_kind(layers[k]))]
    heavy = [
        k for k in able if _HEAVY.search(_kind(layers[k])) or _HEAVY.search(str(layers[k].get("TacticName") or ""))
    ]
    able = heavy or able
    return able[0] if len({precisions[k] for k in able}) == 1 else None


def _kind(layer: Mapping[str, Any]) -> str:
    return str(layer.get("ParameterType") or layer.get("LayerType") or "")


def _precision(layer: Mapping[str, Any], tf32: bool) -> str:
    named = _NAMED.search(str(layer.get("TacticName") or ""))
    if named:
        return _PRODUCTS.get(named[1], named[1])
    ports = layer.get("Inputs") or layer.get("Outputs")
    types = [_type(port) for port in ports] if isinstance(ports, list) else []
    found = next((kind for kind in types if kind not in _INDICES), types[0] if types else "unknown")
    # Where TF32 is allowed, a product of f32 operands may be either: only the name of the kernel tells.
    multiplies = _HEAVY.search(_kind(layer)) or _HEAVY.search(str(layer.get("TacticName") or ""))
    return "unknown" if tf32 and found == "f32" and multiplies else found


def _type(port: Any) -> str:
    """Returns the type of a tensor of a layer, when its fields name exactly one."""
    if not isinstance(port, dict):
        return "unknown"
    texts = [str(v) for key, v in port.items() if key.lower() in ("format/datatype", "datatype", "format")]
    words = {word.lower() for text in texts for word in re.findall(r"[A-Za-z0-9]+", text)}
    found = {_TYPES[word] for word in words if word in _TYPES}
    return found.pop() if len(found) == 1 else "unknown"
