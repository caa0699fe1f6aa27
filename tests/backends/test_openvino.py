"""OpenVINO: quantization with NNCF, the keep-list proved on executed kernels, caches, IR files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backend_toys import Calibration, error, image, linear_graph, quantized, refused, toy_flops

import backends
from backends import registry
from backends.base import BackendError, Precision, QuantSpec, Source, executed_precision, matched_by_size

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from backends.cpu import saturates
from backends.keep import GROUPS
from backends.openvino import flops as work
from backends.openvino.engine import OpenVINOEngine, best_float, describe_ir, read_model
from backends.openvino.keep import check_keep, kept_nodes
from backends.openvino.nncf import NNCFQuantizer

ITEMS = 6
SPEC = QuantSpec(calibration_samples=ITEMS, smooth_quant_alpha=0.95, bias_correction="fast")


def quantize(source, folder, **changes):
    quantizer = NNCFQuantizer()
    return quantized(quantizer, SPEC, source, folder, **changes), quantizer.report


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def free(source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("free"), keep=())[0]


def test_int8_engine_runs_int8_and_stays_near(kept, source):
    graph, report = kept
    feeds = {"image": image(99).numpy()}
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        want = engine.infer(feeds)
        assert engine.planned_flops() == 0
    with OpenVINOEngine(graph, Precision.INT8) as engine:
        assert engine.rest == best_float()
        got = engine.infer(feeds)
        kernels = engine.kernels()
        assert engine.size_bytes == graph.size_bytes
        planned = engine.planned_flops()
    share = executed_precision(kernels)
    assert share["int8"] > 0.5 and planned is not None
    assert 0.9 * share["int8"] < planned / toy_flops() < 1  # the keep-list leaves some products in float
    assert sum(k.flops for k in kernels) == pytest.approx(toy_flops(), rel=1e-9)
    assert "unknown" not in share
    for name in want:
        assert 1e-4 < error(got[name], want[name]) < 0.1
    assert report.items == ITEMS
    assert report.passes == 2


def test_rest_in_f32_leaves_no_bf16_kernel(kept):
    with OpenVINOEngine(kept[0], Precision.INT8, {"rest": "f32"}) as engine:
        assert set(executed_precision(engine.kernels())) == {"int8", "f32"}


def test_weights_are_stored_as_int8(kept, source):
    parameters = sum(p.numel() for p in source.module.parameters())
    stored = kept[0].path.with_suffix(".bin").stat().st_size
    assert parameters < stored < 1.6 * parameters
    assert source.graph.size_bytes > 3.9 * parameters


def test_keep_list_is_honoured_by_the_executed_kernels(kept):
    graph, report = kept
    with OpenVINOEngine(graph, Precision.INT8) as engine:
        assert check_keep(engine, SPEC.keep) == []
        precision = {name: k.precision for k in engine.kernels() for name in k.originals}
    assert any("Softmax" in name for name in report.kept)
    assert sum(name.startswith("MVN") for name in report.kept) == 5
    scores = [name for name in report.kept if name.endswith("MatMul")]
    assert len(scores) == 2
    assert {precision[name] for name in scores} == {str(best_float())}


def test_products_of_attention_run_in_int8_where_nothing_keeps_them(free, source, tmp_path):
    def planned(graph):
        with OpenVINOEngine(graph, Precision.INT8) as engine:
            return engine.planned_flops() / toy_flops()

    scores, both = planned(quantize(source, tmp_path, keep=("Softmax",))[0]), planned(free)
    assert scores < both == 1  # Softmax in float leaves what it multiplies in float
    assert planned(quantize(source, tmp_path / "kept", keep=("Softmax", "AttentionScales"))[0]) < scores


def test_the_keep_check_can_fail(free):
    with OpenVINOEngine(free, Precision.INT8) as engine:
        kernels = engine.kernels()
        offending = check_keep(engine, ("fc1/MatMul",), kernels)
        assert len(offending) == 2
        assert {k.type for k in offending} == {"FullyConnected"}
        assert check_keep(engine, ("^/out/",), kernels) != []


def test_a_kept_pattern_runs_in_float(source, tmp_path):
    graph, report = quantize(source, tmp_path, keep=("blocks.0/fc1/MatMul",))
    with OpenVINOEngine(graph, Precision.INT8) as engine:
        kernels = engine.kernels()
        assert check_keep(engine, ("blocks.0/fc1/MatMul",), kernels) == []
        assert len(check_keep(engine, ("blocks.1/fc1/MatMul",), kernels)) == 1
    assert report.kept == ("/blocks.0/fc1/MatMul",)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"smooth_quant_alpha": None}, 1),
        ({"bias_correction": "none"}, 2),
        ({"weights": "per_tensor", "symmetric_activations": False}, 2),
    ],
)
def test_other_specs_quantize_too(changes, passes, source, tmp_path):
    graph, report = quantize(source, tmp_path, **changes)
    assert report.passes == passes
    feeds = {"image": image(99).numpy()}
    with OpenVINOEngine(source.graph, Precision.F32) as f32, OpenVINOEngine(graph, Precision.INT8) as engine:
        assert error(engine.infer(feeds)["map"], f32.infer(feeds)["map"]) < 0.15
        assert executed_precision(engine.kernels())["int8"] > 0.5


def test_full_bias_correction(source, tmp_path):
    graph, report = quantize(source, tmp_path, bias_correction="full")
    assert report.passes >= 2
    assert graph.sha256 != quantize(source, tmp_path / "fast", bias_correction="fast")[0].sha256


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits_w": 4}, "not W4A8"),
        ({"weights": "per_row"}, "'per_channel' or 'per_tensor'"),
        ({"activations": "per_token"}, "must be 'per_tensor'"),
        ({"bias_correction": "quick"}, "one of ['none', 'fast', 'full']"),
        ({"smooth_quant_alpha": 1.5}, "[0, 1]"),
        ({"calibration_samples": 0}, "at least 1"),
        ({"keep": ("LayerNrm",)}, "matches no node (did you mean 'LayerNorm'?)"),
        ({"keep": ("(",)}, "not a valid regular expression"),
        ({"calibration_samples": 7}, "holds 6 items, calibration_samples asks for 7"),
    ],
)
def test_a_spec_that_cannot_be_followed_writes_nothing(changes, says, source, tmp_path):
    with refused(says, tmp_path):
        quantize(source, tmp_path, **changes)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([], "empty calibration set"),
        (iter([]), "iterable again"),
        (Calibration(6, names=("picture",)), "calibration item 0: inputs must be ['image'], got ['picture']"),
        ([{"image": np.zeros((1, 3, 64, 64))}] * 6, "must be float32[1, 3, 64, 64], got float64[1, 3, 64, 64]"),
    ],
)
def test_bad_calibration_sets(items, says, source, tmp_path):
    with refused(says, tmp_path):
        NNCFQuantizer().quantize(source, dataclasses.replace(SPEC, output_dir=tmp_path), items)


def test_a_name_cannot_leave_its_folder(source, tmp_path):
    with pytest.raises(BackendError, match="plain file name"):
        quantize(source, tmp_path / "in", name="../out")


def test_calibration_memory_is_bounded_and_only_the_asked_items_are_used(source, tmp_path):
    calibration = Calibration(40)
    spec = dataclasses.replace(SPEC, output_dir=tmp_path, calibration_samples=20)
    quantizer = NNCFQuantizer()
    quantizer.quantize(source, spec, calibration)
    assert quantizer.report.items == 20
    assert calibration.most_alive <= 3
    assert calibration.made <= quantizer.report.passes * 21


def test_quantizing_prints_nothing(source, tmp_path, capfd):
    quantize(source, tmp_path)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


AGAIN = """
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[3])
from backend_toys import Calibration
from backends.base import QuantSpec, Source
from backends.exchange import describe_onnx
from backends.openvino.engine import read_model
from backends.openvino.nncf import NNCFQuantizer
graph = describe_onnx(sys.argv[1])
for _ in range(int(sys.argv[4])):
    read_model(graph.path)  # moves the process-wide counter of automatic node names
source = Source("q", None, {}, ("tokens", "map"), graph)
spec = QuantSpec(
    calibration_samples=6, smooth_quant_alpha=0.95, bias_correction="fast", output_dir=Path(sys.argv[2])
)
print(NNCFQuantizer().quantize(source, spec, Calibration(6)).sha256)
"""


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes_in_any_process(source, kept, tmp_path):
    found = {kept[0].sha256}
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, source.graph.path, tmp_path / seed, Path(__file__).parent, seed],
            capture_output=True,
            text=True,
            cwd=Path(backends.__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.split()[-1])
    assert len(found) == 1
    text = kept[0].path.read_text(encoding="utf-8")
    assert str(source.graph.path.parent) not in text


def test_the_quick_search_for_patterns_finds_what_the_plain_one_does(source, kept, tmp_path, monkeypatch):
    monkeypatch.setattr("backends.openvino.nncf.quick_matching", contextlib.nullcontext)
    assert quantize(source, tmp_path)[0].sha256 == kept[0].sha256


def test_precision_and_graph_must_fit(kept, source):
    with pytest.raises(BackendError, match="holds no quantized operation"):
        OpenVINOEngine(source.graph, Precision.INT8)
    with pytest.raises(BackendError, match="compile it as int8, not f32"):
        OpenVINOEngine(kept[0], Precision.F32)
    with pytest.raises(BackendError, match="f32 or bf16, not f16"):
        OpenVINOEngine(source.graph, Precision.F16)
    with pytest.raises(BackendError, match="'rest' must be 'best', 'bf16' or 'f32', got 'fp32'"):
        OpenVINOEngine(kept[0], Precision.INT8, {"rest": "fp32"})
    with pytest.raises(BackendError, match="unknown precision 'int7'"):
        registry.get("openvino").compile(source.graph, "int7")


def test_read_back_catches_a_runtime_that_took_another_precision(source, monkeypatch):
    settings = OpenVINOEngine._settings
    monkeypatch.setattr(
        OpenVINOEngine,
        "_settings",
        lambda self, perf_count: {**settings(self, perf_count), "INFERENCE_PRECISION_HINT": "f32"},
    )
    if best_float() == Precision.F32:
        pytest.skip("this CPU has one float precision")
    with pytest.raises(BackendError, match="asked OpenVINO for bf16, it compiled f32"):
        OpenVINOEngine(source.graph, Precision.BF16)


def test_model_cache_and_threads(source, tmp_path):
    options = {"cache_dir": tmp_path / "cache", "threads": 1}
    feeds = {"image": image().numpy()}
    with OpenVINOEngine(source.graph, Precision.F32, options) as engine:
        assert not engine.loaded_from_cache
        assert engine.threads == 1
        want = engine.infer(feeds)
    with OpenVINOEngine(source.graph, Precision.F32, options) as engine:
        assert engine.loaded_from_cache
        np.testing.assert_array_equal(engine.infer(feeds)["map"], want["map"])


def test_a_damaged_compiled_model_is_made_again(source, tmp_path):
    """The runtime loads a blob with flipped bytes and computes nonsense with it."""
    options = {"cache_dir": tmp_path / "cache"}
    feeds = {"image": image().numpy()}
    with OpenVINOEngine(source.graph, Precision.F32, options) as engine:
        want = engine.infer(feeds)
    (blob,) = (tmp_path / "cache").glob("*/*.blob")
    data = bytearray(blob.read_bytes())
    for position in range(len(data) // 2, len(data) // 2 + 64):
        data[position] ^= 0xFF
    blob.write_bytes(data)
    with OpenVINOEngine(source.graph, Precision.F32, options) as engine:
        assert not engine.loaded_from_cache
        np.testing.assert_array_equal(engine.infer(feeds)["map"], want["map"])


def test_a_cache_that_cannot_be_used_is_done_without(source, tmp_path):
    """As when another process deletes the compiled models while this one compiles."""
    file = tmp_path / "file"
    file.write_text("no folder")
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        want = engine.infer({"image": image().numpy()})
    with OpenVINOEngine(source.graph, Precision.F32, {"cache_dir": file / "cache"}) as engine:
        assert not engine.loaded_from_cache
        np.testing.assert_array_equal(engine.infer({"image": image().numpy()})["map"], want["map"])


def test_counting_in_the_engine_itself_gives_the_same_kernels(source):
    with OpenVINOEngine(source.graph, Precision.F32, {"perf_count": True, "snippets": False}) as engine:
        kernels = engine.kernels()
    assert executed_precision(kernels) == {"f32": 1.0}
    assert sum(k.flops for k in kernels) == pytest.approx(toy_flops(), rel=1e-9)
    assert not any(k.type == "Subgraph" and k.flops for k in kernels)


def test_every_call_times_the_kernels_anew(source, monkeypatch):
    """An engine that is profiled again and again compiles once for it."""
    compiled = []
    whole = OpenVINOEngine._compile
    monkeypatch.setattr(OpenVINOEngine, "_compile", lambda *a, **k: compiled.append(1) or whole(*a, **k))
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        calls = [engine.kernels() for _ in range(4)]
    assert len(compiled) == 2  # to run, and to count times
    assert len({tuple(k.name for k in kernels) for kernels in calls}) == 1  # in the order of execution
    assert all(sum(k.time_us for k in kernels) > 0 for kernels in calls)
    assert len({tuple(k.time_us for k in kernels) for kernels in calls}) > 1


class Means:
    """Tells the mean of all runs so far in whole microseconds, as the runtime does."""

    def __init__(self, runs: list[int]) -> None:
        self.runs, self.done = runs, 0

    def infer(self, feeds: dict[str, np.ndarray], **how: bool) -> None:
        self.done += 1

    @property
    def profiling_info(self) -> list[SimpleNamespace]:
        mean = sum(self.runs[: self.done]) // self.done
        return [SimpleNamespace(node_name=name, real_time=timedelta(microseconds=us)) for name, us in self.shown(mean)]

    def shown(self, mean: int) -> list[tuple[str, int]]:
        return [("slow", mean), ("light", int(self.done < 3)), ("weights", 0)]


def test_the_times_are_those_of_the_runs_that_were_asked_for(source):
    """The runtime's mean holds the slow first run for ever, and a light kernel drops out of it."""
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        engine._counter = Means([9000, 100, 110, 90, 500, 100, 100])
        times = [engine.node_times({}, runs) for runs in (1, 1, 1, 1, 1, 2)]
    slow = [time["slow"] for time in times]
    assert slow == pytest.approx([9000, 100, 110, 90, 500, 100], abs=7)
    assert all(set(time) == {"slow", "light"} for time in times)


def test_what_the_engine_itself_ran_is_taken_off(source):
    feeds = {"image": image().numpy()}
    with OpenVINOEngine(source.graph, Precision.F32, {"perf_count": True}) as engine:
        for _ in range(5):
            engine.infer(feeds)
        before, total = engine._totals(), 0.0
        for runs in (1, 3, 2):
            times = engine.node_times(feeds, runs)
            total += runs * sum(times.values())
        told = sum(engine._totals()[name] - before[name] for name in times)
        assert all(kernel.time_us >= 0 for kernel in engine.kernels())
    assert engine._counted == 11
    assert 0 < total == pytest.approx(told)


def test_an_engine_that_counts_while_it_runs_compiles_once(source, tmp_path, monkeypatch):
    """Not from the cache: a compiled model that is read back has lost the names of what was fused."""
    feeds = {"image": image().numpy()}
    with OpenVINOEngine(source.graph, Precision.F32, {"cache_dir": str(tmp_path)}) as engine:
        want, kernels = engine.infer(feeds), engine.kernels()
    compiled = []
    whole = OpenVINOEngine._compile
    monkeypatch.setattr(OpenVINOEngine, "_compile", lambda *a, **k: compiled.append(1) or whole(*a, **k))
    with OpenVINOEngine(source.graph, Precision.F32, {"cache_dir": str(tmp_path), "perf_count": True}) as engine:
        got = [engine.infer(feeds) for _ in range(3)]
        told = engine.kernels()
        assert not engine.loaded_from_cache and engine._counted == 3
    assert len(compiled) == 1
    for name, array in want.items():
        np.testing.assert_array_equal(got[0][name], array)
    assert executed_precision(told) == executed_precision(kernels) == {"f32": 1.0}
    assert sum(k.flops for k in told) == sum(k.flops for k in kernels)
    assert sum(k.time_us for k in told) > 0


def test_weights_are_saved_in_full_precision(source, tmp_path):
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        engine.save(tmp_path / "f32.xml")
    assert (tmp_path / "f32.bin").stat().st_size >= 4 * sum(p.numel() for p in source.module.parameters())


def test_files_that_are_no_ir(tmp_path):
    (tmp_path / "junk.xml").write_text("junk")
    with pytest.raises(BackendError, match=r"junk\.xml"):
        describe_ir(tmp_path / "junk.xml")
    with pytest.raises(BackendError, match="there is no graph file"):
        describe_ir(tmp_path / "absent.xml")


def test_availability_names_the_machine():
    found = registry.get("openvino").availability()
    assert found.available
    assert "CPU" in found.devices
    assert {"openvino", "nncf"} <= set(found.versions) <= {"openvino", "nncf", "neural-compressor-pt"}
    assert found.details["cpu"]
    assert ("BF16" in found.details["capabilities"]) == (best_float() == Precision.BF16)


@pytest.mark.parametrize(
    ("primitive", "runtime", "want"),
    [
        ("brgemm_avx512_i8", "i8", "int8"),
        ("brgemm_avx512_amx_i8", "u8", "int8"),
        ("brgconv_avx512_I8", "u8", "int8"),
        ("brgconv_avx512_bf16", "i8", "bf16"),
        ("brgconv_avx512_amx_1x1_bf16", "bf16", "bf16"),
        ("jit_avx512_core_amx_fp16", "f16", "f16"),
        ("gemm_mlas_f32", "f32", "f32"),
        ("unknown", "u8", "int8"),
        ("", "", "unknown"),
    ],
)
def test_precision_from_the_executed_primitive(primitive, runtime, want):
    assert work.executed_precision_of(primitive, runtime) == want


def test_attention_flops_of_a_fused_operation():
    import openvino as ov
    import openvino.opset13 as ops

    q, k, v = (ops.parameter([2, 4, n, d], name=x) for x, n, d in (("q", 32, 64), ("k", 48, 64), ("v", 48, 16)))
    attention = ops.scaled_dot_product_attention(q, k, v)
    model = ov.Model([attention], [q, k, v], "m")
    (found,) = work.works(model)
    assert found.flops == 2 * 2 * 4 * 32 * 48 * (64 + 16)
    kept = kept_nodes(model, ("Softmax",))
    assert list(kept) == [attention.get_friendly_name()]
    assert kept_nodes(model, ("AttentionScales",)) == kept
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True})
    request = compiled.create_infer_request()
    request.infer({i: np.ones(p.get_shape(), np.float32) for i, p in enumerate((q, k, v))})
    spent = {p.node_name: 1.0 for p in request.profiling_info}
    kernels = work.executed_kernels(work.nodes_of(compiled.get_runtime_model()), spent, work.works(model), "f32")
    assert executed_precision(kernels) == {"f32": 1.0}


def test_work_that_no_kernel_claims_is_reported_as_unknown(source):
    import openvino as ov

    model = read_model(source.graph.path)
    compiled = ov.Core().compile_model(model, "CPU", {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    request.infer({"image": image().numpy()})
    spent = {p.node_name: 1.0 for p in request.profiling_info if "conv1" not in p.node_name}
    kernels = work.executed_kernels(work.nodes_of(compiled.get_runtime_model()), spent, work.works(model), "f32")
    share = executed_precision(kernels)
    assert share["unknown"] == pytest.approx(2 * 16 * 16 * 64 * 64 * 9 / toy_flops())
    assert sum(k.flops for k in kernels) == toy_flops()


def test_a_convolution_whose_names_were_lost_is_found_by_its_shape(source, monkeypatch):
    monkeypatch.setattr(work, "_aliases", lambda op: (op.get_friendly_name() + " renamed",))
    with OpenVINOEngine(source.graph, Precision.F32, {"snippets": False}) as engine:
        kernels = engine.kernels()
    assert executed_precision(kernels) == {"f32": 1.0}
    assert matched_by_size(kernels) == 1.0
    assert {k.matched for k in kernels if k.flops} == {"size"}


def test_work_that_only_its_size_tells_is_marked_with_its_share(source, monkeypatch):
    """Two layers of one size, of which the names are lost: either may be the other."""
    aliases = work._aliases
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        assert matched_by_size(engine.kernels()) == 0.0
    monkeypatch.setattr(work, "_aliases", lambda op: () if "fc1/MatMul" in op.get_friendly_name() else aliases(op))
    with OpenVINOEngine(source.graph, Precision.F32) as engine:
        kernels = engine.kernels()
    by_size = [k for k in kernels if k.matched == "size"]
    assert len(by_size) == 2
    assert all(k.type == "FullyConnected" and k.flops == 2 * 64 * 64 * 256 for k in by_size)
    assert matched_by_size(kernels) == pytest.approx(2 * 2 * 64 * 64 * 256 / toy_flops())
    assert matched_by_size([]) is None


class TwoScales(torch.nn.Module):
    """Attention with an explicit scale, a rotary-like table product that is no scale, and a mask."""

    def forward(self, q, k, table):
        q, k = q * table, k * table
        return ((q @ k.transpose(-2, -1)) * 0.125 + table[:, :16].sum()).softmax(-1) @ k


def test_attention_scales_are_found_and_tables_are_not(tmp_path):
    from backends.exchange import export

    example = {"q": torch.randn(2, 16, 64), "k": torch.randn(2, 16, 64), "table": torch.rand(16, 64)}
    graph = export(TwoScales(), example, ["y"], tmp_path / "a.onnx")
    kept = kept_nodes(read_model(graph.path), GROUPS)
    assert sorted(kept.values()) == ["MatMul", "Multiply", "Softmax"]


@pytest.mark.parametrize(("weight_range", "levels"), [("full", 127), ("half", 63.5)])
def test_one_linear_layer_agrees_with_exact_integer_arithmetic(tmp_path, weight_range, levels):
    module, graph = linear_graph(tmp_path)
    rng = np.random.default_rng(0)
    items = [{"x": rng.uniform(-1, 1, (8, 64)).astype(np.float32)} for _ in range(8)]
    spec = QuantSpec(
        calibration_samples=8,
        keep=(),
        bias_correction="none",
        smooth_quant_alpha=None,
        weight_range=weight_range,
        output_dir=tmp_path,
    )
    made = NNCFQuantizer().quantize(Source("lin", module, {}, ("y",), graph), spec, items)
    # Symmetric ranges: weights by row, activations by their largest value over the calibration set.
    weight, bias = module.layer.weight.detach().numpy(), module.layer.bias.detach().numpy()
    limit = max(float(np.abs(item["x"]).max()) for item in items)
    x = items[0]["x"]
    scale_w = np.abs(weight).max(1, keepdims=True) / levels
    want = (np.round(np.clip(x / limit, -1, 1) * 127) * limit / 127) @ (np.round(weight / scale_w) * scale_w).T + bias
    with OpenVINOEngine(made, Precision.INT8, {"rest": "f32"}) as engine:
        got = engine.infer({"x": x})["y"]
    if weight_range == "full" and saturates():  # what the CPU does to full weights, and why auto halves them here
        assert error(got, want) > 0.05
    else:
        assert error(got, x @ weight.T + bias) < 0.02
        assert error(got, want) < 0.01


def test_auto_holds_weights_to_half_their_range_where_sums_saturate(tmp_path, monkeypatch):
    module, graph = linear_graph(tmp_path)
    items = [{"x": np.random.default_rng(0).uniform(-1, 1, (8, 64)).astype(np.float32)}]
    made = {}
    for here in (False, True):
        monkeypatch.setattr("backends.cpu.saturates", lambda here=here: here)
        quantizer = NNCFQuantizer()
        spec = QuantSpec(
            calibration_samples=1, keep=(), bias_correction="none", smooth_quant_alpha=None, output_dir=tmp_path
        )
        made[here] = quantizer.quantize(Source(f"lin{here}", module, {}, ("y",), graph), spec, items)
        assert bool(quantizer.notes()) is here
    stored = {here: _int8_weights(graph) for here, graph in made.items()}
    assert np.abs(stored[False]).max() == 127
    assert np.abs(stored[True]).max() in (63, 64)


def _int8_weights(graph):
    model = read_model(graph.path)
    found = [op.data for op in model.get_ops() if op.get_type_name() == "Constant" and op.data.dtype == np.int8]
    assert len(found) == 1
    return found[0].astype(np.int32)
