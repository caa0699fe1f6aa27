"""Ranking quantized nodes: surgery that takes quantization back exactly, shares that name the node that hurts."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from backend_toys import Calibration, image, quantized

from backends.base import BackendError, Precision, QuantSpec, executed_precision

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from backends.openvino.engine import OpenVINOEngine, read_model, write_ir
from backends.openvino.inc import INCQuantizer
from backends.openvino.keep import check_keep, kept_nodes, name_nodes
from backends.openvino.nncf import NNCFQuantizer
from backends.openvino.passes import fold_constants
from backends.openvino.rank import IRSurgery
from backends.rank import mean_error, node_groups, rank_by_groups, rank_nodes

FEEDS = [{"image": image(99).numpy()}]
ITEMS = 4


def quantize(source, folder, **changes):
    spec = dataclasses.replace(QuantSpec(calibration_samples=ITEMS, output_dir=folder), **changes)
    return NNCFQuantizer().quantize(dataclasses.replace(source, name="q"), spec, Calibration(ITEMS))


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """Without SmoothQuant and bias correction; scores quantized too, behind moves."""
    folder = tmp_path_factory.mktemp("plain")
    return quantize(source, folder, smooth_quant_alpha=None, bias_correction="none", keep=())


@pytest.fixture(scope="module")
def corrected(source, tmp_path_factory):
    """With SmoothQuant and bias correction, which change more than the quantized nodes themselves."""
    return quantize(source, tmp_path_factory.mktemp("corrected"))


@pytest.fixture(scope="module")
def by_inc(source, tmp_path_factory):
    """From the torch module: other names, other layouts of weights, a ReLU merged into a FakeQuantize."""
    pytest.importorskip("neural_compressor", reason="needs Intel Neural Compressor: pip install 'pqk[inc]'")
    pytest.importorskip("torchao", reason="needs torchao: pip install 'pqk[inc]'")
    spec = QuantSpec(calibration_samples=ITEMS, smooth_quant_alpha=None, bias_correction="none")
    return quantized(INCQuantizer(), spec, source, tmp_path_factory.mktemp("inc"))


def quantized_nodes(graph, source):
    return list(IRSurgery(graph, source.graph).nodes)


def infer(graph, precision, options=None):
    with OpenVINOEngine(graph, precision, options) as engine:
        return engine.infer(FEEDS[0])


@pytest.mark.parametrize("which", ["plain", "corrected", "by_inc"])
def test_all_nodes_back_in_float_is_the_float_graph(which, source, request):
    """Not one trace of the quantization is left: weights, ranges, SmoothQuant, bias correction."""
    graph = request.getfixturevalue(which)
    surgery = IRSurgery(graph, source.graph)
    assert len(surgery.nodes) > 10
    (share,) = rank_nodes(surgery, FEEDS, names={"all": surgery.nodes})
    assert 1e-3 < share.error_all < 0.2
    assert share.error_without < 1e-6
    assert share.share == pytest.approx(1.0, abs=1e-3)


def test_quantized_nodes_are_those_that_read_quantized_values(plain, corrected, source):
    names = quantized_nodes(plain, source)
    for part in ("/embed/Conv", "/blocks.0/fc1/MatMul", "/blocks.1/qkv/MatMul", "/conv2/Conv"):
        assert any(name.startswith(part) for name in names), part
    # The keep-list of the other graph holds the scores.
    assert any("MatMul" in name and name.count("/") == 2 for name in names)
    assert set(quantized_nodes(corrected, source)) < set(names)


def test_names_are_those_of_the_keep_list(plain, source, tmp_path):
    """An anchored pattern of each ranked node, automatic names included, keeps that node alone in float."""
    model = read_model(source.graph.path)
    fold_constants(model)
    name_nodes(model)
    names = quantized_nodes(plain, source)
    for name in names:
        assert list(kept_nodes(model, [f"^{re.escape(name)}$"])) == [name]
    transposed = next(name for name in names if name.startswith("ConvolutionBackpropData"))
    keep = (f"^{re.escape(transposed)}$",)
    again = quantize(source, tmp_path, smooth_quant_alpha=None, bias_correction="none", keep=keep)
    assert quantized_nodes(again, source) == [name for name in names if name != transposed]


def test_a_node_back_in_float_runs_in_float_and_the_others_in_int8(plain, source, tmp_path):
    name = "/blocks.0/fc1/MatMul"
    names = quantized_nodes(plain, source)
    mixed = IRSurgery(plain, source.graph).write([name], tmp_path / "mixed")
    assert mixed.path == tmp_path / "mixed.xml"
    assert quantized_nodes(mixed, source) == [other for other in names if other != name]
    assert plain.size_bytes < mixed.size_bytes < plain.size_bytes + 4 * 64 * 256 + 20_000
    with OpenVINOEngine(mixed, Precision.INT8) as engine:
        kernels = engine.kernels()
        assert check_keep(engine, (f"^{name}$",), kernels) == []
        assert check_keep(engine, ("^/blocks.1/fc1/MatMul$",), kernels) != []
        assert executed_precision(kernels)["int8"] > 0.5


def test_the_written_graph_is_the_one_that_was_ranked(plain, source, tmp_path):
    names = ["/blocks.0/qkv/MatMul", "/blocks.1/fc2/MatMul"]
    surgery = IRSurgery(plain, source.graph)
    (share,) = rank_nodes(surgery, FEEDS, names={"two": names})
    mixed = surgery.write(names, tmp_path / "mixed")
    want = infer(source.graph, Precision.F32)
    got = infer(mixed, Precision.INT8, {"rest": "f32"})
    assert mean_error([got], [want]) == pytest.approx(share.error_without, rel=1e-6)


@pytest.fixture(scope="module")
def spoilt(plain, tmp_path_factory):
    """One matmul's activations are clipped to a thirtieth of their range: it causes nearly all of the error."""
    model = read_model(plain.path)
    node = next(op for op in model.get_ops() if op.get_friendly_name() == "/blocks.1/fc2/MatMul")
    quantize_node = node.input_value(0).get_node()
    assert quantize_node.get_type_name() == "FakeQuantize"
    import openvino.opset13 as ops

    for index in range(1, 5):
        limit = quantize_node.input_value(index).get_node().get_data()
        quantize_node.input(index).replace_source_output(ops.constant(limit / np.float32(30)).output(0))
    return write_ir(model, tmp_path_factory.mktemp("spoilt") / "q.xml")


def test_the_node_that_hurts_is_ranked_first(spoilt, source):
    seen = []
    groups, nodes = rank_by_groups(
        IRSurgery(spoilt, source.graph),
        FEEDS,
        detail=1,
        progress=lambda done, total, name: seen.append((done, total, name)),
    )
    assert groups[0].name == "blocks.1"
    assert groups[0].share > 0.5
    assert nodes[0].name == "/blocks.1/fc2/MatMul"
    assert nodes[0].nodes == ("/blocks.1/fc2/MatMul",)
    assert nodes[0].share > 0.5 > 3 * abs(nodes[1].share)
    assert {name for share in nodes for name in share.nodes} == set(groups[0].nodes)
    assert [share.share for share in groups] == sorted((share.share for share in groups), reverse=True)
    assert len(seen) == len(groups) + len(nodes) + 2
    assert seen[0] == (0, len(groups) + 1, "all nodes in int8")


def test_what_comes_after_the_graph_counts(spoilt, source):
    """Errors are taken where `after` ends, not at the graph's outputs: the same matmul no longer matters to `map`."""
    seen = []

    def only(outputs):
        seen.append(sorted(outputs[0]))
        return [{"half": outputs[0]["tokens"][:, ::2] * 0 + 1}]

    shares = rank_nodes(IRSurgery(spoilt, source.graph), FEEDS, names=["/blocks.1/fc2/MatMul"], after=only)
    assert (shares[0].error_all, shares[0].share) == (0.0, 0.0)
    assert seen == [["map", "tokens"]] * 3


def test_a_reference_can_be_given(plain, source):
    want, surgery = infer(source.graph, Precision.F32), IRSurgery(plain, source.graph)
    name = "/blocks.0/fc1/MatMul"
    given = rank_nodes(surgery, FEEDS, reference=[want], names=[name])
    assert given == rank_nodes(surgery, FEEDS, names=[name])
    zero = {key: np.zeros_like(value) for key, value in want.items()}
    assert rank_nodes(surgery, FEEDS, reference=[zero], names=[name])[0].error_all == np.inf


def test_groups_follow_the_names():
    names = [
        "/embed/Conv",
        "/dec_blocks2.0/attn/qkv/MatMul",
        "Odd.12",
        "/dec_blocks2.0/fc1/MatMul",
        "/head/dpt/head.0/C",
    ]
    assert node_groups(names) == {
        "embed": ("/embed/Conv",),
        "dec_blocks2.0": ("/dec_blocks2.0/attn/qkv/MatMul", "Odd.12", "/dec_blocks2.0/fc1/MatMul"),
        "head": ("/head/dpt/head.0/C",),
    }
    flat = [f"node_linear_{k}" for k in range(10)]
    groups = node_groups(flat)
    assert [name for members in groups.values() for name in members] == flat
    assert [len(members) for members in groups.values()] == [4, 4, 2]
    assert node_groups([]) == {}


def test_bad_input(plain, source, tmp_path):
    surgery = IRSurgery(plain, source.graph)
    for rank in (rank_nodes, rank_by_groups):
        with pytest.raises(BackendError, match="no feeds"):
            rank(surgery, [])
    with pytest.raises(BackendError, match=r"no quantized node '/blocks.0/fc1/MatMull' \(did you mean"):
        rank_nodes(surgery, FEEDS, names=["/blocks.0/fc1/MatMull"])
    with pytest.raises(BackendError, match="no quantized node 'x'"):
        surgery.write(["x"], tmp_path / "out")
    with pytest.raises(BackendError, match="the float graph is wanted"):
        IRSurgery(plain, plain)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["plain", "by_inc"])
def test_a_float_graph_of_another_model_is_refused(which, tmp_path, request):
    from backend_toys import linear_graph

    _, other = linear_graph(tmp_path)
    with pytest.raises(BackendError, match="it is of another model"):
        IRSurgery(request.getfixturevalue(which), other).write(["/blocks.0/fc1/MatMul"], tmp_path / "out")


def test_a_node_of_inc_back_in_float_runs_in_float(by_inc, source, tmp_path):
    """The weight is found among the float graph's by its value, though the torch program stores it transposed."""
    name = "/blocks.0/fc1/MatMul"
    surgery = IRSurgery(by_inc, source.graph)
    mixed = surgery.write([name], tmp_path / "mixed")
    assert quantized_nodes(mixed, source) == [other for other in surgery.nodes if other != name]
    node = next(op for op in read_model(mixed.path).get_ops() if op.get_friendly_name() == name)
    stored = next(v.get_node().get_data() for v in node.input_values() if v.get_node().get_type_name() == "Constant")
    np.testing.assert_array_equal(stored, source.module.blocks[0].fc1.weight.detach().numpy())
    with OpenVINOEngine(mixed, Precision.INT8) as engine:
        kernels = engine.kernels()
        assert check_keep(engine, (f"^{name}$",), kernels) == []
        assert check_keep(engine, ("^/blocks.1/fc1/MatMul$",), kernels) != []


def test_names_of_inc_are_those_of_its_keep_list(by_inc, source, tmp_path):
    names = quantized_nodes(by_inc, source)
    kept = [names[1], names[-1]]
    spec = QuantSpec(calibration_samples=ITEMS, smooth_quant_alpha=None, bias_correction="none")
    again = quantized(
        INCQuantizer(), spec, source, tmp_path, keep=(*spec.keep, *(f"^{re.escape(name)}$" for name in kept))
    )
    assert quantized_nodes(again, source) == [name for name in names if name not in kept]
