"""The two graphs export with both of torch's exporters, and ONNX Runtime gives the network's answers."""

import onnx
import onnxruntime
import pytest
import torch

from pqk.families.dust3r.model import OUTPUTS
from pqk.families.vectors import compare
from pqk.models import build_model


@pytest.fixture(scope="module")
def model(small_config):
    torch.manual_seed(0)
    model = build_model("dust3r", small_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases too, and attention far from uniform
    return model


def export(spec, path, dynamo):
    torch.onnx.export(
        spec.module,
        tuple(spec.inputs[name] for name in spec.input_names),
        path,
        input_names=list(spec.input_names),
        output_names=list(spec.output_names),
        opset_version=18,
        dynamo=dynamo,
    )
    return onnxruntime.InferenceSession(path)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_graphs_agree_with_the_model(model, tmp_path, dynamo):
    """An odd token grid (5 x 3), so the crop in the DPT head is part of the test."""
    graphs = model.graphs(80, 48)
    torch.manual_seed(2)
    image1, image2 = torch.rand(2, 1, 3, 80, 48) * 2 - 1
    with torch.no_grad():
        expected = model(image1, image2)
    sessions = {name: export(spec, tmp_path / f"{name}.onnx", dynamo) for name, spec in graphs.items()}
    tokens = [sessions["encoder"].run(["tokens"], {"image": image.numpy()})[0] for image in (image1, image2)]
    got = sessions["decoder"].run(list(OUTPUTS), {"tokens_1": tokens[0], "tokens_2": tokens[1]})
    for name, value in zip(OUTPUTS, got, strict=True):
        assert compare(name, value, expected[name]).passes, name
    for name, spec in graphs.items():
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        operators = {node.op_type for node in graph.node}
        assert not operators & {"Shape", "If", "NonZero", "Einsum", "Loop"}, "no shape arithmetic, no control flow"
        assert all(dim.dim_value > 0 for value in graph.input for dim in value.type.tensor_type.shape.dim)
        weights = {initializer.name for initializer in graph.initializer}
        bias = "enc_blocks.0.mlp.fc1.bias" if name == "encoder" else "dec_blocks2.2.mlp.fc1.bias"
        assert bias in weights, "parameters keep their official names"
        assert spec.module.training is False


def test_graphs_share_weights_and_leave_the_mode_alone(model):
    model.train()
    try:
        graphs = model.graphs(32, 48)
        assert graphs["encoder"].module.training and model.enc_blocks.training
        assert graphs["encoder"].module.enc_blocks[0].attn.qkv.weight is model.enc_blocks[0].attn.qkv.weight
        assert graphs["decoder"].inputs["tokens_1"].shape == (1, 6, 32)
    finally:
        model.eval()
