"""Weights compressed with NNCF: sizes, errors and what is refused, on a graph of two layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nncf")

from backends.base import BackendError, Graph, Precision
from backends.exchange import export
from backends.openvino.engine import OpenVINOEngine, read_model
from backends.openvino.weights import PACKED, WeightSpec, compress_weights

WIDE = 256


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(WIDE, 2 * WIDE), torch.nn.GELU(), torch.nn.Linear(2 * WIDE, WIDE))
    return export(module, {"x": torch.randn(1, 8, WIDE)}, ("y",), tmp_path_factory.mktemp("graph") / "mlp.onnx")


def feeds(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(1, 8, WIDE)).astype(np.float32)}


def error(graph: Graph, made: Graph) -> float:
    """Relative error of the outputs against the float graph's."""
    with OpenVINOEngine(graph, Precision.F32) as one, OpenVINOEngine(made, Precision.F32) as other:
        want, got = one.infer(feeds())["y"], other.infer(feeds())["y"]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def weights_of(graph: Graph) -> dict[str, int]:
    """Elements of the packed constants, by type."""
    found: dict[str, int] = {}
    for op in read_model(graph.path).get_ops():
        kind = op.get_element_type().get_type_name()
        if op.get_type_name() == "Constant" and kind in PACKED:
            found[kind] = found.get(kind, 0) + int(np.prod(op.get_output_shape(0)))
    return found


def test_every_scheme_packs_every_weight_and_fewer_bits_err_more(graph: Graph, tmp_path: Path) -> None:
    specs = {
        "int8": WeightSpec(8),
        "int8 asymmetric": WeightSpec(8, symmetric=False),
        "int4 32": WeightSpec(4, group=32),
        "int4 128": WeightSpec(4, group=128),
    }
    made = {name: compress_weights(graph, spec, tmp_path / f"{n}.xml") for n, (name, spec) in enumerate(specs.items())}
    weights = 4 * WIDE * WIDE
    assert weights_of(made["int8"])["i8"] == weights
    assert weights_of(made["int8 asymmetric"])["u8"] >= weights  # zero points count here, too
    assert weights_of(made["int4 32"])["i4"] == weights
    errors = {name: error(graph, each) for name, each in made.items()}
    assert max(errors["int8"], errors["int8 asymmetric"]) < errors["int4 32"] < errors["int4 128"] < 0.2
    least = weights / 2
    assert least < made["int4 128"].size_bytes < made["int4 32"].size_bytes < made["int8"].size_bytes < weights * 1.1


def test_gptq_reads_the_feeds_and_errs_less_on_them(graph: Graph, tmp_path: Path) -> None:
    nearest = compress_weights(graph, WeightSpec(4, group=64), tmp_path / "nearest.xml")
    spec = WeightSpec(4, group=64, method="gptq", samples=16)
    learned = compress_weights(graph, spec, tmp_path / "gptq.xml", [feeds(seed) for seed in range(16)])
    assert error(graph, learned) < error(graph, nearest)


def test_a_weight_that_two_products_share_is_packed_once(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(WIDE, WIDE)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(torch.relu(self.layer(x)))
            return found

    graph = export(Twice(), {"x": torch.randn(1, 8, WIDE)}, ("y",), tmp_path / "twice.onnx")
    made = compress_weights(graph, WeightSpec(4, group=32), tmp_path / "int4.xml")
    assert weights_of(made)["i4"] == WIDE * WIDE
    assert error(graph, made) < 0.2


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (WeightSpec(3), "4 or 8 bits"),
        (WeightSpec(8, group=64), "by output channel"),
        (WeightSpec(4, method="magic"), "nearest, awq, scale_estimation, gptq"),
    ],
)
def test_what_nncf_cannot_follow_is_refused(graph: Graph, tmp_path: Path, spec: WeightSpec, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        compress_weights(graph, spec, tmp_path / "x.xml")
    assert not list(tmp_path.iterdir())
