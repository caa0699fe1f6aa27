"""torch -> ONNX: same bytes, no traces of the machine, checked against torch, whole or absent."""

from __future__ import annotations

import hashlib
import os

import onnx
import pytest
import torch
from backend_toys import Linear, image, toy
from torch import nn

from backends.base import BackendError
from backends.exchange import describe_onnx, export, verify


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_export_describes_repeats_and_hides_the_machine(exporter, tmp_path):
    module, example = toy(1), {"image": image()}
    first = export(module, example, ["tokens", "map"], tmp_path / "a" / "toy.onnx", exporter=exporter)
    second = export(module, example, ["tokens", "map"], tmp_path / "b" / "toy.onnx", exporter=exporter)
    assert first.sha256 == second.sha256
    assert first.path.read_bytes() == second.path.read_bytes()
    assert [(t.name, t.shape, t.dtype) for t in first.inputs] == [("image", (1, 3, 64, 64), "float32")]
    assert [(t.name, t.shape) for t in first.outputs] == [("tokens", (1, 64, 64)), ("map", (1, 4, 32, 32))]
    data = first.path.read_bytes()
    assert str(tmp_path).encode() not in data
    assert b"backend_toys.py" not in data
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["toy.onnx"]
    assert max(verify(first, module, example).values()) < 1e-5


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_large_weights_go_to_one_data_file(exporter, tmp_path):
    module, example = toy(1), {"image": image()}
    graph = export(module, example, ["tokens", "map"], tmp_path / "toy.onnx", exporter=exporter, external_above=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.onnx", "toy.onnx.data"]
    weights = sum(p.numel() * 4 for p in module.parameters())
    assert (tmp_path / "toy.onnx.data").stat().st_size > 0.9 * weights
    assert graph.size_bytes > weights
    assert describe_onnx(graph.path) == graph
    again = export(
        module, example, ["tokens", "map"], tmp_path / "b" / "toy.onnx", exporter=exporter, external_above=1000
    )
    assert again.sha256 == graph.sha256
    # A damaged weights file changes the graph's hash; a missing one is named.
    data = tmp_path / "toy.onnx.data"
    damaged = bytearray(data.read_bytes())
    damaged[100] ^= 1
    data.write_bytes(bytes(damaged))
    assert describe_onnx(graph.path).sha256 != graph.sha256
    data.unlink()
    with pytest.raises(BackendError, match=r"toy\.onnx\.data"):
        describe_onnx(graph.path)


def test_training_mode_is_restored(tmp_path):
    module = toy(1).train()
    module.norm.eval()
    export(module, {"image": image()}, ["tokens", "map"], tmp_path / "toy.onnx")
    assert module.training
    assert not module.norm.training


class Branching(nn.Module):
    """Traced on positive numbers, the branch is frozen into the file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x * 3


def test_verify_notices_a_frozen_branch(tmp_path):
    graph = export(Branching(), {"x": torch.ones(2, 2)}, ["y"], tmp_path / "b.onnx")
    with pytest.raises(BackendError, match=r"output 'y' differs from torch by 0\.333 of its largest value 3"):
        verify(graph, Branching(), {"x": -torch.ones(2, 2)})


class Unstable(nn.Module):
    """Returns something else at every call: no file can agree with it."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Unstable.calls += 1
        return x + Unstable.calls


def test_a_file_that_disagrees_is_not_written_and_an_older_one_survives(tmp_path):
    target = tmp_path / "model.onnx"
    export(Linear().eval(), {"x": torch.randn(8, 64)}, ["y"], target)
    before = hashlib.sha256(target.read_bytes()).hexdigest()
    with pytest.raises(BackendError, match="differs from torch"):
        export(Unstable(), {"x": torch.ones(2, 2)}, ["y"], target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


class Cancelling(nn.Module):
    """Sums of thousands of terms cancel in the columns behind `exact`: their rounding is left, and `small`."""

    def __init__(self, small: float, exact: int, terms: float = 10.0) -> None:
        super().__init__()
        self.small, self.exact = small, exact
        generator = torch.Generator().manual_seed(0)
        weight = terms * torch.randn((4096, 32 - exact), generator=generator)
        self.order = torch.randperm(4096, generator=generator)
        self.one, self.other = nn.Parameter(weight), nn.Parameter(weight[self.order])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = x @ self.one - x[:, self.order] @ self.other
        return torch.cat((x[:, : self.exact], left + self.small * x[:, self.exact : 32]), dim=1)


def test_a_module_that_multiplies_rounding_is_held_against_double_precision(tmp_path):
    example = {"x": torch.randn((8, 4096), generator=torch.Generator().manual_seed(1))}
    graph = export(Cancelling(0.5, 28), example, ["y"], tmp_path / "c.onnx")
    assert 1e-4 < verify(graph, Cancelling(0.5, 28), example)["y"] < 1e-2
    # A file of other weights is found all the same, and so is one of whose values most are rounding.
    with pytest.raises(BackendError, match="differs from torch"):
        verify(graph, Cancelling(0.4, 28), example)
    with pytest.raises(BackendError, match=r"0\.0001 is allowed"):
        export(Cancelling(0.5, 2, 1000.0), example, ["y"], tmp_path / "d.onnx")


class Unexportable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cartesian_prod(x, x)


class Sorting(nn.Module):
    """Made of an operator that the exporter finds only when it writes the graph, which it then prints from C++."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argsort(stable=True).float()


def test_what_cannot_be_exported_is_not_printed(tmp_path, capfd):
    with pytest.raises(BackendError, match=r"the torchscript exporter cannot write x\.onnx"):
        export(Sorting(), {"x": torch.rand(3)}, ["y"], tmp_path / "x.onnx", exporter="torchscript")
    os.write(1, b"still there")
    assert capfd.readouterr() == ("still there", "")


def test_bad_requests(tmp_path):
    with pytest.raises(BackendError, match=r"the torchscript exporter cannot write x\.onnx"):
        export(Unexportable(), {"x": torch.ones(3)}, ["y"], tmp_path / "x.onnx")
    with pytest.raises(BackendError, match="exporter must be one of"):
        export(Linear(), {"x": torch.ones(8, 64)}, ["y"], tmp_path / "x.onnx", exporter="best")
    with pytest.raises(BackendError, match="example is empty"):
        export(Linear(), {}, ["y"], tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_must_have_static_shapes_and_known_weights_files(tmp_path):
    dynamic = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
    )
    path = tmp_path / "dynamic.onnx"
    onnx.save(onnx.helper.make_model(dynamic), path)
    with pytest.raises(BackendError, match=r"axis 0 of 'x' is dynamic \(batch\)"):
        describe_onnx(path)

    graph = export(Linear().eval(), {"x": torch.randn(8, 64)}, ["y"], tmp_path / "m.onnx")
    model = onnx.load(graph.path)
    onnx.save_model(
        model, str(tmp_path / "far.onnx"), save_as_external_data=True, location="elsewhere.bin", size_threshold=0
    )
    with pytest.raises(BackendError, match=r"keeps weights in 'elsewhere\.bin'"):
        describe_onnx(tmp_path / "far.onnx")
    with pytest.raises(BackendError, match="not a readable ONNX file"):
        describe_onnx(tmp_path / "absent.onnx")
