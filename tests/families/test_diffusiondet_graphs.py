"""DiffusionDet's two graphs: what is fed, what is exported, and which of its nodes are named how."""

import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusiondet_toys import TINY, WHOLE, made, sentence_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from backends.base import Precision, QuantSpec, Source
from backends.exchange import export
from backends.onnx_graph import OnnxGraph, kept_nodes
from pqk.cli.run_output import settings_of
from pqk.families.detection.inputs import fit, fitted_size, padded
from pqk.families.diffusiondet import parts
from pqk.families.diffusiondet.build import graphs
from pqk.families.diffusiondet.graphs import example_boxes, parts_of
from pqk.families.diffusiondet.network.attention import nearest_mask
from pqk.families.diffusiondet.network.backbone import STRIDES
from pqk.families.diffusiondet.network.roialign import FIRST_LEVEL, box_levels, pool, pyramid
from pqk.families.diffusiondet.settings import load_workload
from pqk.settings.keep import keep_for

WORKLOAD = Path(__file__).parents[2] / "configs" / "diffusiondet" / "workload.yaml"
# The sines of a relation are of logarithms times 100: 1e-4 between two runtimes is more than they agree to.
STEADY = {**WHOLE, "geo_bias_type": "mlp"}
SAMPLE = {**STEADY, "label_state": "sample", "label_diffusion": "d3pm_mask"}
DIST = {**STEADY, "label_diffusion": "d3pm_mask"}
EXTENDED = {"network.quality_head": True, "network.geo_feat": True, "network.classes": 3}
ASKED = {
    "plain": (TINY, {}),
    "sample": (SAMPLE, {**EXTENDED, "network.label_state": "sample"}),
    "dist": (DIST, {**EXTENDED, "network.label_state": "dist"}),
}


def workload(changes=None):
    return load_workload(WORKLOAD, {"input.shape": [1, 3, 64, 96], "sampler.boxes": 12, **(changes or {})})


def network(config):
    model, generator = made(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# ---------------------------------------------------------------- what is fed


@settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 40), st.integers(1, 40))
def test_a_picture_is_fitted_as_large_as_it_can_be(tall, wide, rows, columns):
    height, width = 32 * rows, 32 * columns
    found = fitted_size((tall, wide), height, width)
    assert 1 <= found[0] <= height and 1 <= found[1] <= width
    assert found[0] == height or found[1] == width
    scale = min(height / tall, width / wide)
    assert abs(found[0] - tall * scale) <= max(0.5, 1 - tall * scale) + 1e-9
    assert abs(found[1] - wide * scale) <= max(0.5, 1 - wide * scale) + 1e-9


def test_a_fitted_picture_is_normalised_and_padded():
    image = np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    fed = fit(image, 64, 96, 3)
    assert fed.size == (32, 96) and fed.original == (40, 120) and fed.number == 3
    assert fed.whwh.dtype == np.float32 and fed.whwh.tolist() == [96, 32, 96, 32]
    assert fed.image.shape == (1, 3, 64, 96) and fed.image.dtype == np.float32
    assert not fed.image[:, :, 32:].any()
    small = np.asarray(Image.fromarray(image).resize((96, 32), Image.Resampling.BILINEAR))
    batch, whwh = padded([torch.from_numpy(small.copy()).permute(2, 0, 1)])
    assert np.array_equal(fed.image[:, :, :32], batch.numpy()) and np.array_equal(fed.whwh, whwh[0].numpy())


def test_a_picture_of_the_right_size_is_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (64, 50, 3), dtype=np.uint8)
    fed = fit(image, 64, 96, 0)
    assert fed.size == fed.original == (64, 50)
    assert np.array_equal(fed.image[:, :, :, :50], padded([torch.from_numpy(image).permute(2, 0, 1)])[0][..., :50])


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 4), (0, 5, 3)])
def test_what_is_no_picture_is_refused(shape):
    assert "(height, width, 3)" in sentence_of(fit, np.zeros(shape, dtype=np.uint8), 64, 64, 0)
    assert "float64" in sentence_of(fit, np.zeros((5, 5, 3)), 64, 64, 0)


# ---------------------------------------------------------------- graphs


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    """Returns case, model, graphs and their files; the export has compared these with torch on two feeds."""

    @cache
    def made_of(case):
        config, changes = ASKED[case]
        model, folder = network(config), tmp_path_factory.mktemp(case)
        specs = graphs(model, workload(changes))
        files = {n: export(s.module, s.inputs, s.output_names, folder / f"{n}.onnx") for n, s in specs.items()}
        return case, model, specs, files

    return made_of


@pytest.fixture(params=["plain", "sample"])
def exported(request, files_of):
    return files_of(request.param)


def test_shapes_and_names_of_the_graphs(exported):
    case, model, specs, files = exported
    found = {name: {port.name: port.shape for port in (*g.inputs, *g.outputs)} for name, g in files.items()}
    assert {port.dtype for g in files.values() for port in (*g.inputs, *g.outputs)} == {"float32"}
    maps = {f"p{level}": (1, 16, 64 >> level, 96 >> level) for level in range(2, 6)}
    assert found["backbone"] == {"image": (1, 3, 64, 96), **maps}
    more = {"labels": (1, 12), "whwh": (1, 4), "quality": (1, 12)} if case == "sample" else {}
    for graph in files.values():  # toolchains that count FLOPs read every shape from the file
        inferred = onnx.shape_inference.infer_shapes(onnx.load(graph.path), data_prop=True).graph
        sized = {
            value.name
            for value in (*inferred.value_info, *inferred.output)
            if all(side.dim_value > 0 for side in value.type.tensor_type.shape.dim)
        }
        assert all(name in sized for node in inferred.node for name in node.output)
    boxes = {"boxes": (1, 12, 4), "t": (1,), "logits": (1, 12, 3), "refined": (1, 12, 4)}
    assert found["head"] == {**maps, **boxes, **more}
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(p.data_ptr() in weights for spec in specs.values() for p in spec.module.parameters())


def test_the_graphs_run_in_openvino(exported):
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine

    _, _, specs, files = exported
    for name, spec in specs.items():
        with torch.no_grad():
            wanted = spec.module(*spec.inputs.values())
        with OpenVINOEngine(files[name], Precision.F32) as engine:
            found = engine.infer({key: value.numpy() for key, value in spec.inputs.items()})
        for output, value in zip(spec.output_names, wanted, strict=True):
            np.testing.assert_allclose(found[output], value, atol=1e-4 * float(value.abs().max()), err_msg=output)


def test_what_an_export_computes_is_needed_for_the_last_stage(exported):
    """No shape arithmetic and no control flow, and classes only where they are read."""
    _, _, _, files = exported
    nodes = OnnxGraph(files["head"].path).work()
    assert not {node.op_type for node in nodes} & {"If", "Loop", "NonZero", "ScatterND", "TopK", "RoiAlign"}
    assert {node.name.split("/")[1] for node in nodes if "class_logits" in node.name} == {"head_series.1"}
    assert {node.name.split("/")[1] for node in nodes if "bboxes_delta" in node.name} == {
        "head_series.0",
        "head_series.1",
    }


def test_the_last_stage_of_the_head_is_what_the_model_gives(exported):
    case, model, specs, _ = exported
    given = dict(specs["head"].inputs)
    maps = [given.pop(name) for name in ("p2", "p3", "p4", "p5")]
    if case == "sample":
        given["labels"] = given["labels"].long()
    with torch.no_grad():
        wanted = model.head(maps, **given)
        last = specs["head"].module(*specs["head"].inputs.values())
        every = parts_of(model, training=True)["head"](*specs["head"].inputs.values())
    for one, whole, all_ in zip(last, wanted, every, strict=True):
        assert torch.equal(all_, whole)
        torch.testing.assert_close(one, whole[-1], rtol=1e-4, atol=1e-4)  # boxes are pooled in another form


def test_examples_are_varied():
    boxes = example_boxes(100, 800, 1088, torch.Generator().manual_seed(0))
    assert len(boxes.unique(dim=0)) == 100 and (boxes[0, 2:] == boxes[0, :2]).all()
    assert ((boxes < 0) | (boxes > 1088)).any()
    assert set(box_levels(boxes).tolist()) == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("config", "changes", "lacking"),
    [
        ({"snr_scale": 1.0}, {}, ["signal_scale=1.0"]),
        ({"noise_std": [1, 1, 0.5, 0.5]}, {}, ["noise_std=[1.0, 1.0, 0.5, 0.5]"]),
        ({"quality_head": True, "geo_feat": True}, {}, ["quality_head=true", "geo_feat=true"]),
        ({}, {"network.geo_feat": True}, ["geo_feat=false"]),
        ({}, {"network.label_state": "dist", "network.classes": 3}, ["label_state=null", "classes=null"]),
        ({"label_state": "sample", "label_diffusion": "d3pm_mask"}, {}, ["label_state=sample", "classes=3"]),
        (DIST, {**ASKED["dist"][1], "network.classes": 4}, ["classes=3"]),
        (DIST, {**ASKED["dist"][1], "network.label_schedule": "cosine"}, ["label_schedule=linear"]),
    ],
)
def test_a_workload_of_another_network_is_refused_with_all_that_it_lacks(config, changes, lacking):
    """As arguments that a shell takes; with them the network is taken."""
    model = made({**TINY, **config})
    said = sentence_of(graphs, model, workload(changes))
    words = shlex.split(said)
    asked = [word for before, word in pairwise(words) if before == "--set"]
    assert asked == [f"workload.network.{setting}" for setting in lacking]
    graphs(model, workload({**changes, **settings_of([word.removeprefix("workload.") for word in asked])}))


def test_a_class_table_that_is_not_diffused_is_no_label_state():
    spec = graphs(made({**TINY, "label_state": "dist"}), workload())["head"]
    assert "labels" not in spec.input_names


# ---------------------------------------------------------------- neighbours


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_the_nearest_boxes_of_equally_near_ones_the_first(seed, many, nearest, tied):
    random = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 4, (2, many, 4), generator=random).float()
    boxes = boxes if tied else boxes + torch.rand(boxes.shape, generator=random)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    distance = (middle[:, :, None] - middle[:, None]).square().sum(dim=-1)
    rank = distance.argsort(dim=-1, stable=True).argsort(dim=-1)
    assert torch.equal(nearest_mask(boxes, nearest), rank < nearest)


MLP, RELATION = {"geo_bias": True, "geo_bias_type": "mlp"}, {"geo_bias": True, "geo_bias_type": "relation"}


@pytest.mark.parametrize(("config", "neighbours"), [({}, 0), ({}, 1), ({}, 50), (MLP, 5), (RELATION, 5)])
def test_a_network_among_neighbours_is_exported(config, neighbours, tmp_path):
    """Of its training or of the workload; the export compares the file with torch."""
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine

    model, trained = network({**TINY, **config}), network({**TINY, **config, "geo_bias_topk": neighbours})
    spec = graphs(model, workload({"network.neighbours": neighbours}))["head"]
    with torch.no_grad():
        wanted = spec.module(*spec.inputs.values())
        own = graphs(trained, workload())["head"].module(*spec.inputs.values())
        free = graphs(model, workload())["head"].module(*spec.inputs.values())
    assert torch.equal(wanted[0], own[0]) == (neighbours > 0)  # geo_bias_topk: 0 is no limit
    assert torch.equal(wanted[0], free[0]) == (neighbours > 12)
    graph = export(spec.module, spec.inputs, spec.output_names, tmp_path / "head.onnx", more=spec.more)
    with OpenVINOEngine(graph, Precision.F32) as engine:
        found = engine.infer({name: value.numpy() for name, value in spec.inputs.items()})
    for name, value in zip(spec.output_names, wanted, strict=True):
        np.testing.assert_allclose(found[name], value, atol=1e-4 * float(value.abs().max()))


# ---------------------------------------------------------------- pooling


def roi_align(maps, boxes):
    """The operator RoiAlign (aligned by half a pixel) on all levels, from each of which come the boxes of its own."""
    nodes, level = [], (box_levels(boxes[0]) - FIRST_LEVEL).numpy()
    for number, stride in enumerate(STRIDES):
        nodes.append(
            helper.make_node(
                "RoiAlign",
                [f"p{number}", "boxes", "image"],
                [f"pooled{number}"],
                coordinate_transformation_mode="half_pixel",
                mode="avg",
                output_height=7,
                output_width=7,
                sampling_ratio=2,
                spatial_scale=1 / stride,
            )
        )
    feeds = {f"p{number}": map_.numpy() for number, map_ in enumerate(maps)}
    feeds |= {"boxes": boxes[0].numpy(), "image": np.zeros(boxes.shape[1], dtype=np.int64)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == "image" else TensorProto.FLOAT, value.shape)
        for name, value in feeds.items()
    ]
    shape = (boxes.shape[1], maps[0].shape[1], 7, 7)
    outputs = [helper.make_tensor_value_info(f"pooled{number}", TensorProto.FLOAT, shape) for number in range(4)]
    graph = helper.make_graph(nodes, "pooling", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pooled = np.stack(session.run(None, feeds))  # (4, N, C, 7, 7)
    chosen = pooled[level, np.arange(len(level))]
    return chosen.reshape(*chosen.shape[:2], 49).transpose(0, 2, 1)


def test_the_onnx_operator_pools_as_the_head_does():
    random = torch.Generator().manual_seed(2)
    boxes = example_boxes(200, 640, 800, random)[None] * 1.2 - 20  # some far outside
    maps = [torch.randn((1, 8, 640 // stride, 800 // stride), generator=random) for stride in STRIDES]
    assert len(box_levels(boxes).unique()) == 4
    wanted = roi_align(maps, boxes)
    for exported in (False, True):
        found = pool(pyramid(maps, exported), boxes)[0].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4)


# ---------------------------------------------------------------- names


def test_every_weight_belongs_to_a_part_but_those_of_all_stages():
    model = network(DIST)
    names = [name for name, _ in model.named_parameters()]
    alone = {name.split(".")[1] for name in names if parts.part_of(name) is None}
    assert alone == {"time_mlp", "label_embed"}
    found = {part for name in names if (part := parts.part_of(name))}
    assert {kind for _, kind in found} == set(parts.KINDS) - {"pooling"}
    assert not {part for part, _ in found} & set(parts.KINDS)  # tables tell a kind from a part by its name
    assert ("head.1.attention", "attention among boxes") in found and ("backbone.res4", "backbone") in found


def test_nodes_are_found_by_their_names(exported):
    _, _, _, files = exported
    for name, graph in files.items():
        nodes = [node for node in OnnxGraph(graph.path).work() if node.op_type in ("MatMul", "Gemm", "Conv")]
        lost = {node.name.split("/")[1] for node in nodes if parts.part_of(node.name) is None}
        assert lost <= {"time_mlp", "label_embed"}, lost
        kinds = {found[1] for node in nodes if (found := parts.part_of(node.name))}
        own = {"backbone", "pyramid"}
        assert kinds == (own if name == "backbone" else set(parts.KINDS) - own)


def test_keep_lists_find_what_they_name(exported):
    _, _, _, files = exported
    graph = OnnxGraph(files["head"].path)

    def found(*entries):
        return kept_nodes(graph, keep_for(entries, "head"))

    stages = [f"/head_series.{number}" for number in range(2)]
    attention = {f"{stage}/self_attn/MatMul_{number}" for stage in stages for number in (1, 2)}
    assert set(found(*parts.ATTENTION)) == attention
    assert set(found(*parts.POOLING)) == {*(f"{stage}/pooler/MatMul" for stage in stages), "/pyramid/Concat_4"}
    last = {f"{stage}/bboxes_delta/MatMul" for stage in stages} | {"/head_series.1/class_logits/MatMul"}
    assert {name for name, kind in found(*parts.LAST_LAYERS).items() if kind == "MatMul"} == last
    scales = {f"{stage}/self_attn/{name}" for stage in stages for name in ("Div", "MatMul_1")}
    assert set(found("AttentionScales")) == scales
    assert set(found("Softmax")) == {f"{stage}/self_attn/Softmax" for stage in stages}
    norms = [name for name, kind in found("LayerNorm").items() if kind == "LayerNormalization"]
    assert len(norms) == 2 * (3 + 3 + 3) + 1  # own, dynamic convolution, box tower; class tower of the last stage
    assert not keep_for(parts.POOLING, "backbone")


def test_quantizers_leave_boxes_and_places_in_float(tmp_path):
    """Eight bits for a coordinate are an error of pixels. What is pooled is kept by name, the rest by its operators."""
    pytest.importorskip("nncf")
    ov = pytest.importorskip("openvino")
    from backends.openvino.nncf import NNCFQuantizer

    config, changes = ASKED["dist"]
    spec = graphs(network({**config, "num_heads": 1}), workload(changes))["head"]
    graph = export(spec.module, spec.inputs, spec.output_names, tmp_path / "head.onnx")
    source = Source("head", spec.module, spec.inputs, spec.output_names, graph)
    keep = ("LayerNorm", "Softmax", "AttentionScales", *keep_for(parts.POOLING, "head"))
    feeds = {name: value.numpy() for name, value in spec.inputs.items()}
    asked = QuantSpec(keep=keep, calibration_samples=1, output_dir=tmp_path / "int8")
    model = ov.Core().read_model(NNCFQuantizer().quantize(source, asked, [feeds]).path)
    quantized = {
        target.get_node().get_friendly_name(): node.input_value(0).get_node().get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "FakeQuantize"
        for target in node.output(0).get_target_inputs()
    }
    assert any("/inst_interact/" in name for name in quantized)
    pooled = {made for name, made in quantized.items() if "/pooler/" in name}
    assert all(made.endswith("/pooler/MatMul") for made in pooled)  # features, which the dynamic convolution takes
    assert not [name for name in quantized if "/refine/" in name]
