"""TensorRT: ModelOpt's Q/DQ graphs, plans built ahead of time, emulation, and what a CUDA device would report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from backend_toys import Calibration, error, image, linear_graph, magnitudes_seen, refused, toy_flops

import backends
from backends import registry
from backends.base import BackendError, Precision, QuantSpec, executed_precision, lowered_to
from backends.exchange import describe_onnx

pytest.importorskip("modelopt", reason="ModelOpt is not installed")
from backends.cpu import saturates
from backends.onnx_graph import OnnxGraph, kept_nodes
from backends.qdq import tidy
from backends.trt import builder
from backends.trt.cuda import provider
from backends.trt.engine import EmulatedEngine, check_plan, layer_kernels
from backends.trt.modelopt import ModelOptQuantizer, free_kept, store_weights
from backends.trt.ranges import largest_magnitudes

ITEMS = 4
SPEC = QuantSpec(calibration_samples=ITEMS, smooth_quant_alpha=None, bias_correction="none", weight_range="full")
FEEDS = {"image": image(99).numpy()}
FOUND = registry.get("trt").availability()
pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.reason)
emulated = pytest.mark.skipif(provider() is not None, reason="a CUDA device runs the engine here")


def quantize(source, folder, name="q", number_format="int8", calibration=None, **changes):
    quantizer = ModelOptQuantizer(number_format)
    spec = dataclasses.replace(SPEC, output_dir=folder, **changes)
    items = Calibration(ITEMS) if calibration is None else calibration
    return quantizer.quantize(dataclasses.replace(source, name=name), spec, items), quantizer


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def want(source):
    with registry.get("reference").compile(source.graph, Precision.F32) as engine:
        return engine.infer(FEEDS)


@emulated
def test_availability_without_a_device_says_what_it_can():
    found = registry.get("trt").availability()
    assert found.devices == ("CPU (emulated)",)
    assert "nothing is timed" in found.details["can"]
    assert {"cpu", "isa", "can"} <= set(found.details)
    assert "nvidia-modelopt" in found.versions


@emulated
def test_without_a_device_only_f32_is_scored_and_f16_is_still_built(tmp_path):
    backend = registry.get("trt")
    assert list(backend.baselines()) == [Precision.F32]
    assert Precision.F16 in backend.float_precisions()
    _, graph = linear_graph(tmp_path)
    with backend.compile(graph, Precision.F16) as engine:
        assert engine.size_bytes > 1000


@emulated
def test_int8_builds_a_plan_and_emulates_it(kept, want, tmp_path):
    graph, quantizer = kept
    backend = registry.get("trt")
    with backend.compile(graph, Precision.INT8, {"cache_dir": str(tmp_path)}) as engine:
        got, kernels = engine.infer(FEEDS), engine.kernels()
        assert isinstance(engine, EmulatedEngine)
        assert engine.measured == "emulated"
        assert engine.size_bytes == engine.plan.stat().st_size > 100_000
        assert backend.kept_in_int8(engine, SPEC.keep, kernels) == []
        planned = engine.planned_flops()
    assert all(1e-4 < error(got[name], want[name]) < 0.1 for name in want)
    assert executed_precision(kernels)["int8"] > 0.9
    assert planned == sum(kernel.flops for kernel in kernels if kernel.precision == "int8")
    assert sum(k.flops for k in kernels) == toy_flops()
    assert {k.time_us for k in kernels} == {0.0}
    assert quantizer.report.items == ITEMS
    assert any("saturate" in note for note in quantizer.notes()) == saturates()


def test_weights_are_int8_and_the_file_is_small(kept, source):
    parameters = sum(p.numel() for p in source.module.parameters())
    assert parameters < kept[0].size_bytes < 1.6 * parameters
    stored = {t.name: t for t in onnx.load(str(kept[0].path)).graph.initializer}
    integers = [onnx.numpy_helper.to_array(t) for t in stored.values() if t.data_type == onnx.TensorProto.INT8]
    large = [w for w in integers if w.ndim > 1]
    assert len(large) == 13
    assert all(np.abs(w.astype(int)).max() == 127 for w in large)


def test_half_range_keeps_weights_to_seven_bits_and_says_so(source, tmp_path, want):
    graph, quantizer = quantize(source, tmp_path, weight_range="half")
    tensors = onnx.load(str(graph.path)).graph.initializer
    weights = [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8]
    assert {np.abs(w.astype(int)).max() for w in weights if w.ndim > 1} == {64}
    assert quantizer.notes()[0].startswith("weights use 7 of their 8 bits")
    with registry.get("reference").compile(graph, Precision.INT8, {"fuse_qdq": False}) as engine:
        assert 1e-4 < error(engine.infer(FEEDS)["map"], want["map"]) < 0.1
    auto = quantize(source, tmp_path / "auto", weight_range="auto")[1]
    assert not auto.report.half_range


def test_kept_nodes_read_floats(kept, source):
    names = kept_nodes(OnnxGraph(source.graph.path), SPEC.keep)
    assert sorted(kept[1].report.kept) == sorted(names)
    kinds = sorted(names.values())
    assert [kinds.count(k) for k in ("LayerNormalization", "Softmax", "MatMul", "Mul")] == [5, 2, 2, 4]
    graph = OnnxGraph(kept[0].path)
    for node in graph.nodes:
        if node.name in names:
            makers = [graph.maker[i].op_type for i in node.input if i in graph.maker]
            assert "DequantizeLinear" not in makers, node.name


def test_the_keep_check_can_fail(source, tmp_path):
    graph, _ = quantize(source, tmp_path, keep=())
    backend = registry.get("trt")
    with backend.compile(graph, Precision.INT8, {"build": False}) as engine:
        kernels = engine.kernels()
        offending = backend.kept_in_int8(engine, ("AttentionScales", "LayerNorm"), kernels)
        assert {k.type for k in offending} == {"MatMul"}  # normalisations never read quantized tensors here
        with pytest.raises(BackendError, match="was not built"):
            _ = engine.size_bytes
    model = onnx.load(str(graph.path))
    free_kept(model, {"/blocks.0/fc1/MatMul"})
    onnx.save(model, str(tmp_path / "freed.onnx"))
    freed = OnnxGraph(tmp_path / "freed.onnx")
    precision = {n.name: freed.precision(n) for n in freed.work()}
    assert precision["/blocks.0/fc1/MatMul"] == "f32"
    assert precision["/blocks.1/fc1/MatMul"] == "int8"


def test_a_kept_pattern_stays_float(source, tmp_path):
    graph, quantizer = quantize(source, tmp_path, keep=("blocks.0/fc1/MatMul",))
    found = OnnxGraph(graph.path)
    precision = {n.name: found.precision(n) for n in found.work()}
    assert quantizer.report.kept == ("/blocks.0/fc1/MatMul",)
    assert (precision["/blocks.0/fc1/MatMul"], precision["/blocks.1/fc1/MatMul"]) == ("f32", "int8")


def test_ranges_are_those_of_the_whole_set(kept, source):
    """Every activation's scale holds the largest magnitude of all items, as a float session alone finds it."""
    graph = OnnxGraph(kept[0].path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(kept[0].path)).graph.initializer}
    pairs = {n.input[0]: float(stored[n.input[1]]) for n in graph.nodes if n.op_type == "QuantizeLinear"}
    assert len(pairs) > 10
    largest = magnitudes_seen(source, pairs, Calibration(ITEMS))
    for name, scale in pairs.items():
        assert scale == pytest.approx(largest[name] / 127, rel=1e-4), name


def test_only_matmuls_and_convolutions_read_quantized_tensors(kept):
    graph = OnnxGraph(kept[0].path)
    kinds = {n.op_type for n in graph.work() if graph.precision(n) == "int8"}
    assert kinds == {"MatMul", "Conv", "ConvTranspose"}


def test_a_tensor_without_a_range_is_named(source, tmp_path):
    with pytest.raises(BackendError, match="computes no tensor 'ghost'"):
        largest_magnitudes(source.graph.path, source.graph.inputs, ["ghost"], Calibration(1))


def test_int4_keeps_what_it_is_told_to(source, tmp_path):
    graph, quantizer = quantize(source, tmp_path, bits_w=4, bits_a=16, keep=("blocks.0/fc1/MatMul",))
    found = OnnxGraph(graph.path)
    stored = {n.name: found.stored_as(n) for n in found.work() if n.op_type == "MatMul"}
    assert (stored["/blocks.0/fc1/MatMul"], stored["/blocks.1/fc1/MatMul"]) == (set(), {"int4"})
    assert "/blocks.1/fc1/MatMul" in quantizer.report.quantized
    assert any("int4 weights" in note for note in quantizer.notes())


def test_formats_and_bits_are_known_before_anything_runs():
    tools = registry.get("trt").quantizers()
    assert lowered_to(tools["modelopt"], 8, 8) == "int8"
    assert lowered_to(tools["modelopt"], 4, 16) == "int4"
    assert lowered_to(tools["modelopt-fp8"], 8, 8) == "fp8"
    with pytest.raises(BackendError, match="'modelopt-fp8' lowers to W8A8, not W4A16"):
        lowered_to(tools["modelopt-fp8"], 4, 16)


def test_fp8_and_int4_build(source, tmp_path, want):
    backend = registry.get("trt")
    graph, quantizer = quantize(source, tmp_path / "fp8", number_format="fp8")
    assert quantizer.notes() == ["convolutions stay in float: ModelOpt's fp8 ones are inaccurate"]
    with backend.compile(graph, Precision.INT8) as engine:
        ran = {
            k.name: (k.type, k.precision) for k in engine.kernels() if k.flops and k.name not in quantizer.report.kept
        }
        assert set(ran.values()) == {("MatMul", "fp8"), ("Conv", "f32"), ("ConvTranspose", "f32")}
        assert engine.size_bytes > 100_000
        got = engine.infer(FEEDS)
        kinds = {t.data_type for t in onnx.load(str(graph.path)).graph.initializer if math.prod(t.dims) > 4096}
        assert onnx.TensorProto.FLOAT8E4M3FN in kinds  # weights are stored as such, as int8 ones are
        assert all(1e-4 < error(got[name], want[name]) < 0.15 for name in want)
    graph, _ = quantize(source, tmp_path / "int4", bits_w=4, bits_a=16)
    with backend.compile(graph, Precision.INT8) as engine:
        assert set(executed_precision(engine.kernels())) == {"f32"}
        assert 1e-3 < error(engine.infer(FEEDS)["tokens"], want["tokens"]) < 0.3


def test_calibration_holds_one_item_and_reads_what_was_asked(source, tmp_path):
    items = Calibration(9)
    quantize(source, tmp_path, calibration=items)
    assert items.most_alive <= 3
    assert items.made <= ITEMS + 6


def test_shared_constants_are_stored_once_and_second_names_are_followed():
    weight = np.random.default_rng(0).standard_normal((32, 32), dtype=np.float32)
    scale, zero = np.full(32, 0.03, np.float32), np.zeros(32, np.int8)
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [
        make("Identity", ["w"], ["w2"]),
        make("QuantizeLinear", ["w2", "s", "z"], ["q"], axis=1),
        make("DequantizeLinear", ["q", "s", "z"], ["d"], axis=1),
        make("MatMul", ["x", "d"], ["h"]),
        make("Add", ["h", "table1"], ["a"]),
        make("Add", ["a", "table2"], ["y"]),
    ]
    port = onnx.helper.make_tensor_value_info
    ports = [port("x", onnx.TensorProto.FLOAT, [32, 32])], [port("y", onnx.TensorProto.FLOAT, [32, 32])]
    named = [("w", weight), ("s", scale), ("z", zero), ("table1", weight), ("table2", weight.copy())]
    graph = onnx.helper.make_graph(nodes, "g", *ports, [tensor(array, name) for name, array in named])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    store_weights(model, half=False)
    tidy(model)
    onnx.checker.check_model(model, full_check=True)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert set(stored) == {"s", "z", "q", "table1"}
    np.testing.assert_array_equal(stored["q"], np.clip(np.rint(weight / 0.03), -127, 127).astype(np.int8))
    assert [n.op_type for n in model.graph.node] == ["DequantizeLinear", "MatMul", "Add", "Add"]


DETERMINISM = """
import sys
sys.path.insert(0, sys.argv[1])
import dataclasses
from pathlib import Path
from backend_toys import Calibration, toy
from backends.base import QuantSpec, Source
from backends.exchange import describe_onnx
from backends.trt.modelopt import ModelOptQuantizer
graph = describe_onnx(Path(sys.argv[2]))
spec = QuantSpec(calibration_samples=4, smooth_quant_alpha=None, weight_range="full", output_dir=Path(sys.argv[3]))
print(ModelOptQuantizer().quantize(Source("q", None, {}, (), graph), spec, Calibration(4)).sha256)
"""


def test_the_same_input_gives_the_same_bytes_in_another_process(kept, source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISM, str(Path(__file__).parent), str(source.graph.path), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(backends.__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [kept[0].sha256]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits_w": 2}, "lowers to W8A8 or W4A16, not W2A8"),
        ({"weights": "per_tensor"}, "weights is per_tensor, and the quantizer 'modelopt' takes per_channel alone"),
        ({"symmetric_activations": False}, "takes true alone"),
        ({"smooth_quant_alpha": 0.5}, "smooth_quant_alpha is 0.5, and the quantizer 'modelopt' takes null alone"),
        ({"weight_range": "halv"}, "did you mean 'half'?"),
        ({"calibration_samples": 0}, "at least 1"),
        ({"calibration_samples": 99}, "holds 4 items"),
        ({"keep": ("(",)}, "not a valid regular expression"),
        ({"keep": ("blocks.0/fcc1/MatMul",)}, "(did you mean '/blocks.0/fc1/MatMul'?)"),
    ],
)
def test_bad_specs(changes, says, source, tmp_path):
    with refused(says, tmp_path):
        quantize(source, tmp_path, **changes)


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ([], "empty calibration set"),
        (iter([]), "iterable again"),
        ([{"x": image().numpy()}], "inputs must be ['image']"),
        ([{"image": image().numpy()[:, :, :8]}], "must be float32[1, 3, 64, 64]"),
        ([{"image": np.full((1, 3, 64, 64), np.nan, np.float32)}], "not finite"),
    ],
)
def test_bad_calibration(calibration, says, source, tmp_path):
    with refused(says, tmp_path):
        quantize(source, tmp_path, calibration=calibration)


def test_plans_are_cached_and_a_damaged_one_is_built_again(tmp_path):
    _, graph = linear_graph(tmp_path)
    options = {**builder.OPTIONS}
    plan = builder.build_plan(graph, options, tmp_path / "plans")
    manifest, built = builder.read_manifest(plan), plan.stat().st_mtime_ns
    assert manifest["size_bytes"] == plan.stat().st_size
    assert manifest["graph_sha256"] == graph.sha256
    assert builder.build_plan(graph, options, tmp_path / "plans").stat().st_mtime_ns == built
    other = builder.build_plan(graph, {**options, "optimization_level": 1}, tmp_path / "plans")
    assert other != plan
    plan.write_bytes(b"damaged")
    with pytest.raises(BackendError, match="is damaged"):
        check_plan(plan, builder.load())
    assert (
        builder.build_plan(graph, options, tmp_path / "plans").stat().st_size
        == builder.read_manifest(plan)["size_bytes"]
    )
    assert [p.name for p in (tmp_path / "plans").iterdir() if p.name.startswith(".")] == []


def test_a_plan_for_another_version_or_device_is_refused(tmp_path):
    _, graph = linear_graph(tmp_path)
    plan = builder.build_plan(graph, builder.OPTIONS, tmp_path)
    manifest = builder.read_manifest(plan)
    for change, says in [({"target": "1.0"}, "was built for 1.0"), ({"version": "0.1"}, "build it again")]:
        plan.with_suffix(".json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(BackendError, match=says):
            check_plan(plan, builder.load())
    plan.with_suffix(".json").unlink()
    with pytest.raises(BackendError, match="no readable manifest"):
        check_plan(plan, builder.load())


def test_weights_beside_the_graph_are_parsed_from_the_file(tmp_path):
    _, graph = linear_graph(tmp_path)
    model = onnx.load(str(graph.path))
    path = tmp_path / "outside.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location=path.name + ".data", size_threshold=0)
    outside = describe_onnx(path)
    assert len(outside.files()) == 2
    assert builder.build_plan(outside, builder.OPTIONS, tmp_path).stat().st_size > 32_768  # 64 * 128 floats
    with pytest.raises(BackendError, match="too large to be converted"):
        registry.get("trt").compile(outside, Precision.F16)


def test_a_refused_pattern_names_the_node_and_what_is_supported(kept, tmp_path):
    model = onnx.load(str(kept[0].path))
    quantize_node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    zero = onnx.numpy_helper.from_array(np.array(3, np.int8), "odd_zero")
    model.graph.initializer.append(zero)
    dequantize = next(n for n in model.graph.node if n.input and n.input[0] == quantize_node.output[0])
    quantize_node.input[2] = dequantize.input[2] = "odd_zero"
    onnx.save(model, str(tmp_path / "asymmetric.onnx"))
    with pytest.raises(BackendError) as caught:
        registry.get("trt").compile(describe_onnx(tmp_path / "asymmetric.onnx"), Precision.INT8)
    assert "QuantizeLinear" in str(caught.value)
    assert "zero point 0" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workspace_mb": 0}, "'workspace_mb' must be a whole number from 1"),
        ({"optimization_level": 6}, "must be 0 to 5"),
        ({"target": "sm89"}, "a compute capability such as '8.9'"),
        ({"target": "3.5"}, "3.5"),
        ({"rest": "f16"}, "'rest' must be 'f32'"),
    ],
)
def test_bad_options(options, says, tmp_path):
    _, graph = linear_graph(tmp_path)
    with pytest.raises(BackendError) as caught:
        registry.get("trt").compile(graph, Precision.F32, options)
    assert says in str(caught.value)


def test_layers_of_the_inspector_become_kernels(kept):
    """The shape of the JSON is the one of TensorRT's Developer Guide, section on the engine inspector."""
    graph = OnnxGraph(kept[0].path)
    total = sum(graph.flops(n) for n in graph.work())

    def layer(name, kind, datatype, nodes):
        meta = "\x1e".join(f"[ONNX Layer: {n}]" for n in nodes)
        ports = [{"Name": "in", "Dimensions": [1, 64], "Format/Datatype": datatype}]
        return {"Name": name, "LayerType": kind, "Inputs": ports, "Outputs": ports, "TacticName": "t", "Metadata": meta}

    layers = [
        layer("reformat", "Reformat", "Row major linear FP32", ["/blocks.0/fc1/MatMul"]),
        layer("fc1", "gemm", "Int8", ["/blocks.0/fc1/MatMul", "/blocks.0/fc1/Add"]),
        layer("fc2", "gemm", "Half", ["/blocks.0/fc2/MatMul"]),
    ]
    kernels = layer_kernels(json.dumps({"Layers": layers}), {"fc1": 7.5}, graph)
    by_name = {k.name: k for k in kernels}
    assert by_name["reformat"].flops == 0.0
    assert (by_name["fc1"].precision, by_name["fc1"].time_us) == ("int8", 7.5)
    assert by_name["fc1"].flops == by_name["fc2"].flops == 2 * 64 * 64 * 256
    assert by_name["fc2"].precision == "f16"
    assert sum(k.flops for k in kernels) == total
    assert by_name["(not attributed)"].precision == "unknown"


@pytest.mark.gpu
@pytest.mark.skipif(provider() is None, reason="needs a CUDA device and torch with CUDA or pycuda")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_device_runs_the_engine(kept, want, cuda_graph):
    with registry.get("trt").compile(kept[0], Precision.INT8, {"cuda_graph": cuda_graph}) as engine:
        assert engine.measured == "engine"
        got = engine.infer(FEEDS)
        np.testing.assert_array_equal(engine.infer(FEEDS)["map"], got["map"])
        assert error(got["map"], want["map"]) < 0.1
        assert engine.device_ms(FEEDS) > 0
        assert sum(k.time_us for k in engine.kernels()) > 0
    with pytest.raises(BackendError, match="closed"):
        engine.infer(FEEDS)
