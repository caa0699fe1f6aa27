"""Nodes of ModelOpt's Q/DQ graphs back in float: all of them make the float graph, and the node that hurts is named."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from backend_toys import image, linear_graph, quantized

from backends import registry
from backends.base import BackendError, Graph, Precision, QuantSpec, executed_precision, surgery_of
from backends.exchange import describe_onnx
from backends.qdq_surgery import QDQSurgery
from backends.rank import mean_error, rank_by_groups, rank_nodes

pytest.importorskip("modelopt", reason="ModelOpt is not installed")
from backends.trt.modelopt import ModelOptQuantizer

FEEDS = [{"image": image(99).numpy()}]
SPEC = QuantSpec(calibration_samples=4, smooth_quant_alpha=None, bias_correction="none", weight_range="full")
EMULATED = {"build": False}


def made(source, folder, number_format="int8", **changes):
    return quantized(ModelOptQuantizer(number_format), SPEC, source, folder, **changes)


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    return made(source, tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def everything(source, tmp_path_factory):
    """Scores and probabilities are quantized too, some of them behind moves."""
    return made(source, tmp_path_factory.mktemp("everything"), keep=())


@pytest.fixture(scope="module")
def weights_only(source, tmp_path_factory):
    return made(source, tmp_path_factory.mktemp("int4"), bits_w=4, bits_a=16)


@pytest.fixture(scope="module")
def fp8(source, tmp_path_factory):
    return made(source, tmp_path_factory.mktemp("fp8"), number_format="fp8")


@pytest.mark.parametrize("which", ["kept", "everything", "weights_only", "fp8"])
def test_all_nodes_back_in_float_is_the_float_graph(which, source, request):
    surgery = QDQSurgery(request.getfixturevalue(which), source.graph)
    assert len(surgery.nodes) > 7
    (share,) = rank_nodes(surgery, FEEDS, names={"all": surgery.nodes})
    assert 1e-3 < share.error_all < 0.5
    assert share.error_without < 1e-6


def test_nothing_of_the_quantization_is_left(everything, source, tmp_path):
    surgery = QDQSurgery(everything, source.graph)
    graph = onnx.load(str(surgery.write(surgery.nodes, tmp_path / "float").path)).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert all(node.op_type == "Shape" for node in graph.node if not dequantized.isdisjoint(node.input))
    assert not any(t.data_type == onnx.TensorProto.INT8 and t.dims for t in graph.initializer)
    read = {name for node in graph.node for name in node.input}
    assert all(tensor.name in read for tensor in graph.initializer)


def test_names_are_those_of_the_keep_list(everything, kept, source, tmp_path):
    names = QDQSurgery(everything, source.graph).nodes
    assert set(QDQSurgery(kept, source.graph).nodes) < set(names)
    scores = [name for name in names if re.fullmatch(r"/blocks\.\d/MatMul", name)]
    assert len(scores) == 2
    some = [scores[0], "/up/ConvTranspose", "/blocks.1/fc1/MatMul"]
    again = made(source, tmp_path, keep=tuple(f"^{re.escape(name)}$" for name in some))
    assert QDQSurgery(again, source.graph).nodes == tuple(name for name in names if name not in some)


def test_a_node_back_in_float_runs_in_float_and_the_others_in_int8(everything, source, tmp_path):
    name = "/blocks.0/fc1/MatMul"
    surgery = QDQSurgery(everything, source.graph)
    mixed = surgery.write([name], tmp_path / "mixed")
    assert mixed == describe_onnx(tmp_path / "mixed.onnx")
    assert QDQSurgery(mixed, source.graph).nodes == tuple(other for other in surgery.nodes if other != name)
    assert everything.size_bytes < mixed.size_bytes < everything.size_bytes + 4 * 64 * 256
    backend = registry.get("trt")
    if not backend.availability().available:
        pytest.skip(backend.availability().reason)
    with backend.compile(mixed, Precision.INT8, EMULATED) as engine:
        kernels = engine.kernels()
        assert backend.kept_in_int8(engine, (f"^{name}$",), kernels) == []
        assert backend.kept_in_int8(engine, ("^/blocks.1/fc1/MatMul$",), kernels) != []
        assert 0.5 < executed_precision(kernels)["int8"] < 1


def test_the_written_graph_is_the_one_that_was_ranked(kept, source, tmp_path):
    names = ["/blocks.0/qkv/MatMul", "/blocks.1/fc2/MatMul"]
    surgery = QDQSurgery(kept, source.graph)
    (share,) = rank_nodes(surgery, FEEDS, names={"two": names})
    mixed = surgery.write(names, tmp_path / "mixed")
    reference = registry.get("reference")
    with reference.compile(source.graph, Precision.F32) as engine:
        want = engine.infer(FEEDS[0])
    with reference.compile(mixed, Precision.INT8, {"fuse_qdq": False}) as engine:
        got = engine.infer(FEEDS[0])
    assert mean_error([got], [want]) == pytest.approx(share.error_without, rel=1e-6)


def test_the_node_that_hurts_is_ranked_first(kept, source, tmp_path):
    """Its activations are clipped to a thirtieth of their range."""
    model = onnx.load(str(kept.path))
    makers = {name: node for node in model.graph.node for name in node.output}
    node = next(node for node in model.graph.node if node.name == "/blocks.1/fc2/MatMul")
    dequantize = makers[node.input[0]]
    scale = next(t for t in model.graph.initializer if t.name == dequantize.input[1])
    wrong = (onnx.numpy_helper.to_array(scale) / np.float32(30)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(wrong, "wrong"))
    for pair in (dequantize, makers[dequantize.input[0]]):
        pair.input[1] = "wrong"
    onnx.save_model(model, str(tmp_path / "spoilt.onnx"))
    groups, nodes = rank_by_groups(QDQSurgery(describe_onnx(tmp_path / "spoilt.onnx"), source.graph), FEEDS, detail=1)
    assert (groups[0].name, nodes[0].name) == ("blocks.1", "/blocks.1/fc2/MatMul")
    assert min(groups[0].share, nodes[0].share) > 0.5 > 3 * abs(nodes[1].share)
    assert {name for share in nodes for name in share.nodes} == set(groups[0].nodes)


def shared_pairs(folder):
    """y = x w, z = x' v, u = x v. One Q/DQ pair of x feeds the last two, the second by a Transpose and another pair.

    The first is smoothed: its pair holds x / 2 and its weights are 2 w.
    """
    helper, kinds = onnx.helper, onnx.TensorProto
    random = np.random.default_rng(0)
    w, v = (random.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
    step = np.float32(0.05)
    stored = {name: np.clip(np.rint(value / step), -127, 127) for name, value in {"w8": 2 * w, "v8": v}.items()}
    constants = {"w": w, "v": v, "step": step, "half": np.float32(0.5), "zero": np.int8(0)}
    constants |= {name: value.astype(np.int8) for name, value in stored.items()}

    def pair(name):
        return [
            helper.make_node("QuantizeLinear", [name, "step", "zero"], [f"{name}q"], f"{name}/Q"),
            helper.make_node("DequantizeLinear", [f"{name}q", "step", "zero"], [f"{name}d"], f"{name}/DQ"),
        ]

    def weight(name):
        return helper.make_node("DequantizeLinear", [f"{name}8", "step", "zero"], [f"{name}d"], f"{name}/DQ")

    def values(names):
        return [helper.make_tensor_value_info(name, kinds.FLOAT, [8, 8]) for name in names]

    def write(name, nodes):
        read = {i for node in nodes for i in node.input}
        used = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items() if n in read]
        graph = helper.make_graph(nodes, "g", values("x"), values("yzu"), used)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
        onnx.save_model(model, str(folder / f"{name}.onnx"))
        return describe_onnx(folder / f"{name}.onnx")

    def work(first, second, turn, third, weights):
        return [
            helper.make_node("MatMul", [first, weights[0]], ["y"], "/a/first"),
            helper.make_node("Transpose", [turn], ["t"], "/a/turn"),
            *(pair("t") if second != "t" else []),
            helper.make_node("MatMul", [second, weights[1]], ["z"], "/a/second"),
            helper.make_node("MatMul", [third, weights[1]], ["u"], "/a/third"),
        ]

    smooth = helper.make_node("Mul", ["x", "half"], ["s"], "/a/smooth")
    before = [smooth, *pair("s"), *pair("x"), weight("w"), weight("v")]
    ints = [*before, *work("sd", "td", "xd", "xd", ("wd", "vd"))]
    return write("plain", work("x", "t", "x", "x", ("w", "v"))), write("ints", ints)


@pytest.mark.parametrize(("name", "output"), [("/a/first", "y"), ("/a/second", "z"), ("/a/third", "u")])
def test_other_readers_of_a_pair_stay_quantized(name, output, tmp_path):
    plain, ints = shared_pairs(tmp_path)
    surgery = QDQSurgery(ints, plain)
    assert surgery.nodes == ("/a/first", "/a/second", "/a/third")
    feeds = [{"x": np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)}]
    (want,), (int8,), (mixed,) = surgery.infer_plain(feeds), surgery.infer((), feeds), surgery.infer([name], feeds)
    for each in ("y", "z", "u"):
        assert not np.array_equal(want[each], int8[each])
        np.testing.assert_array_equal(mixed[each], (want if each == output else int8)[each])


def test_a_float_graph_with_weights_in_a_file_of_their_own(kept, source, tmp_path):
    model = onnx.load(str(source.graph.path))
    path = tmp_path / "plain.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="plain.onnx.data", size_threshold=256)
    outside, inside = QDQSurgery(kept, describe_onnx(path)), QDQSurgery(kept, source.graph)
    name = "/blocks.1/qkv/MatMul"
    written = [s.write([name], tmp_path / k / "g") for k, s in (("a", outside), ("b", inside))]
    assert written[0].sha256 == written[1].sha256


def test_bad_input(kept, source, tmp_path):
    surgery = QDQSurgery(kept, source.graph)
    with pytest.raises(BackendError, match=r"no quantized node '/blocks.0/fc1/MatMull' \(did you mean"):
        surgery.infer(["/blocks.0/fc1/MatMull"], FEEDS)
    with pytest.raises(BackendError, match="the float graph is wanted"):
        QDQSurgery(kept, kept)
    (tmp_path / "other").mkdir()
    _, other = linear_graph(tmp_path / "other")
    with pytest.raises(BackendError, match="it is of another model"):
        QDQSurgery(kept, other).write(["/blocks.0/fc1/MatMul"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_which_backends_can(kept, source):
    assert surgery_of(registry.get("trt")) is QDQSurgery
    assert surgery_of(registry.get("reference")) is None
    assert isinstance(kept, Graph) and kept.format == "onnx"
