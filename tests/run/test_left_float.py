"""Tests a model of which one graph is left in float as a whole, on both toolchains."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_toys import pqk

KEPT = ("--set", "quant.ptq.keep_list=['encoder:.*']")


@pytest.fixture
def project(tmp_path: Path, begun: Callable[[Path], Path]) -> Path:
    return begun(tmp_path / "project")


@pytest.mark.parametrize("backend", ["openvino", "trt"])
def test_a_graph_that_is_kept_whole_runs_in_float_beside_a_quantized_one(
    project: Path, tiny_model: Path, backend: str
) -> None:
    pytest.importorskip("openvino" if backend == "openvino" else "modelopt")
    asked = ("B1", "--backend", backend, "--model", tiny_model, *KEPT)
    found = pqk(project, "run", *asked, "--json")
    assert found.code in (0, 1, 4), found.err
    record = found.record
    assert "encoder: nothing of it is quantized" in record["notes"]
    if record["measured"] == "engine":
        assert 0 < record["executed_precision"]["int8"] < 0.9
    exported = pqk(project, "export", *asked, "-o", "out")
    assert exported.code == 0, exported.err
    graphs = json.loads((project / "out" / "manifest.json").read_text())["graphs"]
    assert set(graphs) == {"encoder", "decoder"}


def test_a_model_that_is_kept_whole_is_refused(project: Path, tiny_model: Path) -> None:
    found = pqk(
        project, "run", "B1", "--backend", "openvino", "--model", tiny_model, "--set", "quant.ptq.keep_list=['.*']"
    )
    assert found.code == 2
    assert "nothing is left to quantize" in found.sentence
