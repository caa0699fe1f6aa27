"""`pqk profile`: kernels of a real f32 and a real int8 engine, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pqk.bench import profile as module
from pqk.bench.profile import CLASSES, Spent, profile, why, write_profile
from pqk.errors import PqkError
from pqk.recipe.request import Request

pytest.importorskip("nncf")

RATES = {"f32": {"matmul": 100.0, "conv1x1": 90.0}, "int8": {"matmul": 120.0, "conv1x1": 200.0}}


def spent(part: str, does: str, precision: str, gflop: float, ms: float) -> Spent:
    return Spent("net", f"{part}/{does}", part, "kind", does, "jit", precision, gflop * 1e9, ms)


def test_what_is_said_of_two_engines() -> None:
    plain = [
        spent("a.mlp", "linear layers", "f32", 1.0, 20.0),
        spent("a.attn", "attention", "f32", 1.0, 10.0),
        spent("b", "the rest", "f32", 0.0, 10.0),
    ]
    lowered = [
        spent("a.mlp", "linear layers", "int8", 1.0, 10.0),
        spent("a.attn", "attention", "f32", 1.0, 12.0),
        spent("b", "layout changes", "f32", 0.0, 3.0),
    ]
    assert why([plain, lowered], RATES) == [
        "int8 takes 25 ms where f32 takes 40: 1.60x, summed over kernels",
        "40 % of its time are int8 kernels, at 100 GFLOP/s, 50 % of the largest int8 rate here (200; f32: 100)",
        "48 % are products that stay in float, 12 % has no products; changes of layout are 12 %",
        "no faster than in f32: a.attn (12.0 ms, 10.0 in f32)",
        "with all products at the largest rates it would be 2.22x of f32",  # 5 ms, 10 ms, and 3 ms as they are
    ]


@pytest.fixture(scope="module")
def found(
    finished: tuple[Path, Any], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The profile of the finished project's B1. The tests of `pqk bench engine` measure rates."""
    from shutil import copytree

    root = copytree(finished[0], tmp_path_factory.mktemp("profile") / "project", symlinks=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "ceilings_of", lambda folder: RATES)
    patch.chdir(root)
    try:
        asked = Request("B1", "openvino", model=str(tiny_model), qat=False)
        result = profile(asked, 3, root, lambda *_: None, lambda text: None)
    finally:
        patch.undo()
    return result, root


def test_every_kernel_counts_once(found: tuple[dict[str, Any], Path], finished: tuple[Path, Any]) -> None:
    data, _ = found
    record = finished[1].record
    for side in ("f32", "int8"):
        kernels = data["kernels"][side]
        total = sum(kernel["ms"] for kernel in kernels)
        for table in ("parts", "classes"):
            assert sum(row[f"{side}_ms"] for row in data[table].values()) == pytest.approx(total)
        assert sum(kernel["flops"] for kernel in kernels) == pytest.approx(1e9 * record["flops_G"], rel=1e-6)
        assert {kernel["does"] for kernel in kernels} <= set(CLASSES)
        assert {"linear layers", "attention"} <= {kernel["does"] for kernel in kernels}
    int8 = sum(kernel["flops"] for kernel in data["kernels"]["int8"] if kernel["precision"] == "int8")
    assert int8 / 1e9 / record["flops_G"] == pytest.approx(record["executed_precision"]["int8"], rel=1e-6)


def test_it_is_written_and_drawn(found: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    data, _ = found
    written = write_profile(data, tmp_path)
    assert json.loads(written[0].read_text())["why"] == data["why"]
    with Image.open(written[1]) as picture:
        assert picture.size[0] > 600


def test_a_card_that_quantizes_nothing(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    root = copy_of()
    asked = Request("T2", "openvino", model=str(tiny_model), qat=False)
    with pytest.raises(PqkError, match="card T2 quantizes nothing"):
        profile(asked, 3, root, lambda *_: None, lambda text: None)
