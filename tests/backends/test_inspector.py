"""The JSON of TensorRT's inspector, in the three forms that its versions write, read into kernels.

The samples in `inspector/` were written for these tests; no engine made them. Their form is the documented one:
`tensorrt10`: Developer Guide 10, "Engine Inspector" (`tensorrt10-context`: with an execution context set, which spells
the formats out); `tensorrt11`: "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x"; `tensorrt-rtx17`: keys
and texts that stand in libtensorrt_rtx.so 1.7.1; `names-only`: ProfilingVerbosity LAYER_NAMES_ONLY; `dynamic-shapes`:
what 10 says of formats that are not known yet. Names of kernels are names that NVIDIA's libraries hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from contract_toys import network, write_graph

from backends.base import Kernel, executed_precision
from backends.onnx_graph import OnnxGraph
from backends.trt.engine import layer_kernels

SAMPLES = Path(__file__).parent / "inspector"
NET = network()
FC1, FC2 = 2.0 * 8 * 64 * 128, 2.0 * 8 * 128 * 32


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> OnnxGraph:
    return OnnxGraph(write_graph(NET, tmp_path_factory.mktemp("i") / "q.onnx", quantized=True).path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> OnnxGraph:
    return OnnxGraph(write_graph(NET, tmp_path_factory.mktemp("i") / "f.onnx", quantized=False).path)


def read(name: str, graph: OnnxGraph, **times: float) -> dict[str, Kernel]:
    return {k.name: k for k in layer_kernels((SAMPLES / f"{name}.json").read_text(), times, graph)}


@pytest.mark.parametrize("name", ["tensorrt10", "tensorrt10-context", "tensorrt11", "tensorrt-rtx17"])
def test_every_form_gives_the_same_kernels(name: str, quantized: OnnxGraph) -> None:
    found = read(name, quantized, **{"/fc1_myl0_1": 7.5})
    assert [(k.precision, k.flops) for k in found.values()] == [("f32", 0), ("f32", 0), ("int8", FC1), ("int8", FC2)]
    assert executed_precision(found.values()) == {"int8": 1.0}
    assert {k.matched for k in found.values()} == {"name"}
    first = found["/fc1_myl0_1"]
    assert (first.type, first.time_us, first.originals) == ("gemm", 7.5, ("/fc1", "/bias1", "/relu"))
    assert first.implementation.startswith("sm80_xmma_gemm_i8i8_i8i32_f32")


@pytest.mark.parametrize("name", ["names-only", "dynamic-shapes"])
def test_what_the_engine_does_not_tell_is_unknown(name: str, quantized: OnnxGraph) -> None:
    found = read(name, quantized, **{"/fc1_myl0_1": 7.5})
    assert executed_precision(found.values()) == {"unknown": 1.0}
    assert sum(k.flops for k in found.values()) == FC1 + FC2
    assert found["/fc1_myl0_1"].time_us == 7.5


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"Layers": 3}', '{"Layers": [null, {}]}', '{"Bindings": []}'])
def test_other_texts_leave_all_work_unknown(text: str, quantized: OnnxGraph) -> None:
    kernels = layer_kernels(text, {}, quantized)
    assert executed_precision(kernels) == {"unknown": 1.0}
    assert sum(k.flops for k in kernels) == FC1 + FC2


def gemm(node: str, *types: str, tactic: str = "", name: str = "g", kind: str = "gemm", **more: Any) -> dict[str, Any]:
    ports = [{"Name": f"in{k}", "Format/Datatype": text} for k, text in enumerate(types)]
    out = [{"Name": "out", "Format/Datatype": "Float"}]
    about = {"TacticName": tactic, "Metadata": f"[ONNX Layer: {node}]", **more}
    return {"Name": name, "LayerType": kind, "Inputs": ports, "Outputs": out, **about}


def precision_of(graph: OnnxGraph, *layers: dict[str, Any], tf32: bool = False) -> dict[str, float]:
    return executed_precision(layer_kernels(json.dumps({"Layers": layers}), {}, graph, tf32=tf32))


SPOKEN = [
    ("Half", "f16"),
    ("Float", "f32"),
    ("BFloat16", "bf16"),
    ("Row major linear BF16 format (kLINEAR)", "bf16"),
    ("FP8", "fp8"),
    ("Row major linear FP8 format (kLINEAR)", "fp8"),
    ("Four wide channel vectorized row major INT8 format (kCHW4)", "int8"),
    ("UInt8", "uint8"),
    ("Int4", "int4"),
    ("Unlisted DataType 17", "unknown"),
    ("N/A due to dynamic shapes", "unknown"),
    ("", "unknown"),
]


@pytest.mark.parametrize(("text", "precision"), SPOKEN)
def test_words_for_types(text: str, precision: str, quantized: OnnxGraph) -> None:
    found = precision_of(quantized, gemm("/fc1", text))
    assert found[precision] == pytest.approx(FC1 / (FC1 + FC2) if precision != "unknown" else 1.0)


KERNELS = [
    ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x16_stage4", "tf32"),
    ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize128x128x8_stage3", "f32"),
    ("sm80_xmma_fprop_implicit_gemm_i8f16_i8i32_f32_nhwckrsc_nhwc_tilesize64x64x64", "int8"),
    ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32", "int8"),
    ("sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x64", "fp8"),
    ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "bf16"),
    ("sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16_f16f16_f16_nhwckrsc", "f16"),
]


@pytest.mark.parametrize(("tactic", "precision"), KERNELS)
def test_the_kernel_that_ran_says_in_what_it_multiplies(tactic: str, precision: str, quantized: OnnxGraph) -> None:
    assert precision in precision_of(quantized, gemm("/fc1", "N/A due to dynamic shapes", tactic=tactic))


def test_where_tf32_is_allowed_only_the_kernel_tells(plain: OnnxGraph) -> None:
    layers = [gemm("/fc1", "Float", tactic="fc1_0x51ab"), gemm("/fc2", "Float", tactic="fc2_0x51ab", name="h")]
    assert precision_of(plain, *layers) == {"f32": 1.0}
    assert precision_of(plain, *layers, tf32=True) == {"unknown": 1.0}
    layers = [gemm(f"/fc{k}", "Float", tactic=KERNELS[k - 1][0], name=f"g{k}") for k in (1, 2)]
    assert set(precision_of(plain, *layers, tf32=True)) == {"tf32", "f32"}


def test_operands_are_read_past_masks_and_indices(plain: OnnxGraph) -> None:
    assert precision_of(plain, gemm("/fc1", "Bool", "Int32", "Half"), gemm("/fc2", "Half", name="h")) == {"f16": 1.0}


def test_a_float_node_in_an_int8_kernel_is_unknown(plain: OnnxGraph, quantized: OnnxGraph) -> None:
    both = "[ONNX Layer: /fc1]\x1f[ONNX Layer: /fc2]"
    layer = gemm("", "Int8", tactic="_gemm_mha_v2_0x12", kind="kgen", Metadata=both)
    assert precision_of(quantized, layer) == {"int8": 1.0}
    kernels = layer_kernels(json.dumps({"Layers": [layer]}), {"g": 3.0}, plain)
    assert executed_precision(kernels) == {"unknown": 1.0}
    assert sum(k.time_us for k in kernels) == 3.0


def test_work_that_two_kernels_may_have_done_is_unknown_unless_they_agree(quantized: OnnxGraph) -> None:
    agreeing = [gemm("/fc1", "Int8", name=n, kind="kgen", tactic="x") for n in "ab"]
    assert precision_of(quantized, *agreeing)["int8"] == pytest.approx(FC1 / (FC1 + FC2))
    differing = [agreeing[0], gemm("/fc1", "Float", name="b", kind="kgen", tactic="x")]
    assert precision_of(quantized, *differing) == {"unknown": 1.0}
    weighted = [agreeing[0], gemm("/fc1", "Half", name="b")]  # the one that multiplies did it
    assert precision_of(quantized, *weighted)["f16"] == pytest.approx(FC1 / (FC1 + FC2))
    moved = gemm("/fc1", "Float", kind="Reformat")  # one that only moves did not
    assert precision_of(quantized, moved) == {"unknown": 1.0}


def test_names_of_nodes_may_hold_brackets(tmp_path: Path) -> None:
    model = onnx.load(str(write_graph(NET, tmp_path / "n.onnx", quantized=False).path))
    names = {"/fc1": "blocks[0]/fc1", "/fc2": "blocks[1]/fc2 [2]"}
    for node in model.graph.node:
        node.name = names.get(node.name, node.name)
    onnx.save(model, str(tmp_path / "n.onnx"))
    for separator in ("\x1e", "\x1f", ""):
        metadata = separator.join(f"[ONNX Layer: {name}]" for name in names.values())
        layer = gemm("", "Half", Metadata=metadata)
        assert precision_of(OnnxGraph(tmp_path / "n.onnx"), layer) == {"f16": 1.0}
