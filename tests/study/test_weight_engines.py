"""Tools that pack weights for engines: which schemes each follows, and that its engine computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")

from backends.base import Graph
from backends.exchange import export
from pqk.compress.weights.schemes import SCHEMES
from pqk.engines.calls import compiled
from pqk.study.weights.engines import FLOAT, TOOLS, EngineResult, Tool, engines_of, variants_of

BY_RUNTIME = {tool.runtime: tool for tool in TOOLS}
GROUPS = ["INT4_Group_128", "INT4_Group_64", "INT4_Group_32"]
CHANNEL = ["INT8_Per_Channel_Symmetric", "INT8_Per_Channel_Asymmetric"]
X = np.random.default_rng(0).standard_normal((1, 8, 128)).astype(np.float32)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    """A graph with products, and one with a small convolution alone, which holds nothing that ONNX Runtime packs."""
    folder = tmp_path_factory.mktemp("engines")
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))
    head = torch.nn.Conv1d(8, 8, 3, padding=1)
    example = {"x": torch.from_numpy(X)}
    return {name: export(one, example, ["y"], folder / f"{name}.onnx") for name, one in (("a", body), ("b", head))}


@pytest.mark.parametrize(
    ("runtime", "followed"),
    [("OpenVINO", [*CHANNEL, *GROUPS]), ("ONNX Runtime", [*CHANNEL, *GROUPS]), ("TensorRT", ["INT4_Group_32"])],
)
def test_which_schemes_a_tool_follows(runtime: str, followed: list[str]) -> None:
    assert [name for name, scheme in SCHEMES.items() if BY_RUNTIME[runtime].what(scheme)] == followed


@pytest.mark.parametrize("runtime", BY_RUNTIME)
def test_an_engine_computes_what_is_packed(runtime: str, graphs: dict[str, Graph], tmp_path: Path) -> None:
    tool = BY_RUNTIME[runtime]
    if tool.missing():
        pytest.skip(f"{', '.join(tool.missing())} is not installed")
    variants, notes = variants_of(tool, SCHEMES, {"a": graphs["a"]}, tmp_path)
    assert not notes and next(iter(variants)) == FLOAT
    outputs = {}
    for name, variant in variants.items():
        with compiled(variant) as call:
            outputs[name] = call("a", {"x": X})["y"]
    errors = {name: float(np.linalg.norm(y - outputs[FLOAT]) / np.linalg.norm(y)) for name, y in outputs.items()}
    for name in variants:
        if name != FLOAT:
            assert 1e-4 < errors[name] < (0.02 if "INT8" in name else 0.2), errors
            assert variants[name].graphs["a"].size_bytes < 0.5 * graphs["a"].size_bytes
    results = engines_of(tool, variants, SCHEMES, None, errors)
    assert list(results) == [name for name in variants if name != FLOAT]
    one = results["INT4_Group_32"].to_json()
    assert (one["rounds"], one["p50_ms"], one["speedup"]) == (0, None, None)
    assert one["measured"] == ("emulated" if runtime == "TensorRT" else "engine")
    assert ("emulated" in one["what"]) == (runtime == "TensorRT")


def test_a_graph_without_such_weights_runs_as_it_is(graphs: dict[str, Graph], tmp_path: Path) -> None:
    schemes = {"INT4_Group_32": SCHEMES["INT4_Group_32"]}
    variants, notes = variants_of(BY_RUNTIME["ONNX Runtime"], schemes, graphs, tmp_path / "both")
    assert not notes and variants["INT4_Group_32"].graphs["b"] == graphs["b"]
    assert variants["INT4_Group_32"].graphs["a"] != graphs["a"]
    variants, notes = variants_of(BY_RUNTIME["ONNX Runtime"], schemes, {"b": graphs["b"]}, tmp_path / "one")
    assert not variants and notes == ["ONNX Runtime, INT4_Group_32: the model has no weight that it packs"]


def test_a_tool_that_is_not_installed_says_which_module_it_lacks() -> None:
    tool = BY_RUNTIME["OpenVINO"]
    assert Tool(tool.runtime, tool.backend, ("numpy", "no_such_module"), tool.what, tool.pack).missing() == [
        "no_such_module"
    ]


def test_times_are_quartiles_and_the_ratio_is_of_the_same_runtime(graphs: dict[str, Graph], tmp_path: Path) -> None:
    tool = BY_RUNTIME["ONNX Runtime"]
    schemes = {"INT4_Group_32": SCHEMES["INT4_Group_32"]}
    variants, _ = variants_of(tool, schemes, {"a": graphs["a"]}, tmp_path)
    times = {FLOAT: [10.0, 12.0, 14.0] * 3, "INT4_Group_32": [5.0, 6.0, 7.0] * 3}
    results = engines_of(tool, variants, schemes, times, {})
    assert isinstance(results[FLOAT], EngineResult) and results[FLOAT].to_json()["speedup"]["value"] == 1.0
    found = results["INT4_Group_32"].to_json()
    assert (found["rounds"], found["p50_ms"], found["speedup"]["value"]) == (9, 6.0, 2.0)
