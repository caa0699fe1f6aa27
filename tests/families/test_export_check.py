"""The export check sees the whole network: attention's scale, RoPE and the order of the views, whatever the example."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backends.base import BackendError
from backends.exchange import draws, export, verify
from pqk.families.dust3r import layers
from pqk.models import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from run_toys import TINY

Graphs = dict[str, Any]


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    return build_model("dust3r", TINY, generator=torch.Generator().manual_seed(1)).eval().graphs(64, 64)


def written(graphs: Graphs, name: str, folder: Path) -> Any:
    spec = graphs[name]
    return export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")


def no_rope(x: Tensor, rope: object, head_dim: int) -> Tensor:
    return x


def twice_the_scale(q: Tensor, k: Tensor, v: Tensor, attn_mask: None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=2 * scale)


def break_attention(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "RoPE":
        monkeypatch.setattr(layers, "apply_rope", no_rope)
    else:
        monkeypatch.setattr(layers, "F", SimpleNamespace(scaled_dot_product_attention=twice_the_scale))


@pytest.mark.parametrize("constant", [False, True], ids=["the model's example", "a constant example"])
@pytest.mark.parametrize("how", ["RoPE", "scale"])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_attention_that_is_wrong_in_the_file_is_refused(
    graphs: Graphs, name: str, how: str, constant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = graphs[name]
    with monkeypatch.context() as broken:
        break_attention(broken, how)
        graph = written(graphs, name, tmp_path)
    example = {k: torch.zeros_like(v) for k, v in spec.inputs.items()} if constant else spec.inputs
    with pytest.raises(BackendError, match="differs from torch by"):
        verify(graph, spec.module, example)


@pytest.mark.parametrize("how", ["RoPE", "scale"])
def test_an_exporter_that_breaks_attention_writes_no_file(
    graphs: Graphs, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch itself computes rightly; what is wrong is the traced graph alone."""
    right_rope = layers.apply_rope
    wrong = torch.jit.is_tracing
    if how == "RoPE":
        monkeypatch.setattr(layers, "apply_rope", lambda x, rope, width: x if wrong() else right_rope(x, rope, width))
    else:

        def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None, scale: float) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, scale=scale * (2 if wrong() else 1))

        monkeypatch.setattr(layers, "F", SimpleNamespace(scaled_dot_product_attention=attention))
    with pytest.raises(BackendError, match=r"encoder\.onnx: output 'tokens' differs from torch by"):
        written(graphs, "encoder", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("equal", [False, True], ids=["the model's example", "equal views"])
def test_exchanged_views_are_refused(graphs: Graphs, equal: bool, tmp_path: Path) -> None:
    spec, graph = graphs["decoder"], written(graphs, "decoder", tmp_path)
    assert max(verify(graph, spec.module, spec.inputs).values()) < 1e-5
    model = onnx.load(str(graph.path))
    other = {"tokens_1": "tokens_2", "tokens_2": "tokens_1"}
    for node in model.graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]
    onnx.save(model, str(graph.path))
    tokens = spec.inputs["tokens_1"]
    with pytest.raises(BackendError, match="differs from torch by"):
        verify(graph, spec.module, {"tokens_1": tokens, "tokens_2": tokens.clone()} if equal else spec.inputs)


def test_the_example_inputs_are_those_of_a_model_at_work(graphs: Graphs) -> None:
    """Not constant, not equal, in the range of what is fed, the same in every process; also at full size."""
    again = build_model("dust3r", TINY).graphs(64, 64)
    for name, spec in graphs.items():
        for key, value in spec.inputs.items():
            assert torch.equal(value, again[name].inputs[key])
            assert value.std() > 0.5
    image, (first, second) = graphs["encoder"].inputs["image"], graphs["decoder"].inputs.values()
    assert image.abs().max() <= 1
    assert (first - second).abs().mean() > 0.5


def test_draws_are_varied_whatever_the_example_is() -> None:
    image, count = torch.rand(1, 3, 4, 4), torch.arange(6)
    kept, shuffled = draws({"x": image, "n": count})
    assert torch.equal(kept["x"], image)
    assert not torch.equal(shuffled["x"], image)
    assert torch.equal(shuffled["x"].flatten().sort().values, image.flatten().sort().values)
    assert torch.equal(shuffled["n"].sort().values, count)
    for constant, low, high in ((0.0, -1.0, 1.0), (3.0, 0.0, 6.0), (-3.0, -6.0, 0.0)):
        made = draws({"a": torch.full((2, 8), constant), "b": torch.full((2, 8), constant)})[1:]
        assert len(made) == 2
        values = [value for draw in made for value in draw.values()]
        assert all(low <= value.min() < value.max() <= high for value in values)
        assert len({tuple(value.flatten().tolist()) for value in values}) == 4


def test_a_model_that_gives_no_numbers_is_at_fault_not_its_export(graphs: Graphs, tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 4)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(BackendError, match=r"'y' holds values that are not finite in torch already"):
        export(module, {"x": torch.randn(2, 4)}, ["y"], tmp_path / "m.onnx")
