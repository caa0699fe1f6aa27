"""`pqk bench batch`: several items in one call of a graph, beside as many calls of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_toys import make_project, pqk
from torch import Tensor, nn

from backends import registry
from pqk.bench.batch import _graph
from pqk.families.contract import GraphSpec

pytest.importorskip("openvino")


def test_every_graph_is_timed_in_batches(tmp_path: Path, tiny_model: Path) -> None:
    root = make_project(tmp_path / "project")
    done = pqk(root, "bench", "batch", "2", "--model", tiny_model, "--rounds", "6")
    assert done.code == 0, done.err
    found = done.record
    assert json.loads((root / "reports" / "batch.json").read_text()) == found
    assert [(row["graph"], row["batch"]) for row in found["rows"]] == [
        ("encoder", 1),
        ("encoder", 2),
        ("decoder", 1),
        ("decoder", 2),
    ]
    for row in found["rows"]:
        ratio = row["speedup"]
        assert row["reason"] is None and row["p50_ms"] > 0 and 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
        assert row["batch"] > 1 or ratio == {"value": 1, "low": 1, "high": 1}


def test_sizes_that_cannot_be_compared_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    root = make_project(tmp_path / "project")
    words = ("--model", str(tiny_model))
    for sizes in ("2,3", "1,2", "2,2"):
        refused = pqk(root, "bench", "batch", sizes, *words)
        assert refused.code == 2 and "needs sizes from 2, none twice, that divide the largest" in refused.sentence
    assert "SIZES 2,x: give whole numbers from 1" in pqk(root, "bench", "batch", "2,x", *words).sentence


class Mixing(nn.Module):
    """What it says of an item depends on how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(x)


class Joining(nn.Module):
    """It takes all items for one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1) + 1


class Fixed(nn.Module):
    """It takes one item and no more."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 8) + 1


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Mixing(), "its outputs are not those of the single items"),
        (Joining(), "its outputs are not those of the single items"),
        (Fixed(), "exporter cannot write 2.onnx"),
        (nn.Linear(8, 8), None),
    ],
)
def test_a_graph_that_takes_no_batch_says_why(module: nn.Module, reason: str | None, tmp_path: Path) -> None:
    spec = GraphSpec(module, {"x": torch.rand(1, 8)}, ("x",), ("y",))
    one, two = _graph(spec, registry.get("openvino"), {}, [1, 2], 1, tmp_path)
    assert one["reason"] is None and one["p50_ms"] > 0
    if reason is None:
        assert two["reason"] is None and two["p50_ms"] > 0
    else:
        assert reason in two["reason"] and two["p50_ms"] is None and two["speedup"] is None
