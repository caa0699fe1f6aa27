"""`pqk study weights` in whole commands: packed files, errors, engines, report, and the scripts of the lab's guide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from run_toys import Outcome, pqk, script

from pqk.compress.weights.files import load_weights
from pqk.compress.weights.schemes import SCHEMES
from pqk.study.weights.methods import LEFT_OUT, METHODS, chosen_rows
from pqk.study.weights.result import SCHEMA

pytest.importorskip("skimage")
pytest.importorskip("nncf")


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory, begun: Callable[[Path], Path], tiny_model: Path) -> Path:
    root = begun(tmp_path_factory.mktemp("study") / "project")
    words = ("study", "weights", "--model", tiny_model, "--max-images", "4", "--rounds", "6", "-o", "out")
    made = pqk(root, *words, "--methods", "--samples", "4", "--calibration", "4", "--columns", "W8A8,W4A16")
    assert made.code == 0, made.err
    assert made.out.splitlines()[-1] == "out/methods.txt"
    return root


@pytest.fixture(scope="module")
def results(studied: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((studied / "out" / "comprehensive_results.json").read_text())
    return found


def test_every_claimed_byte_is_on_disk(studied: Path, results: dict[str, Any]) -> None:
    jsonschema.validate(results, SCHEMA)
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["Baseline_FP32", *SCHEMES, "PyTorch_Dynamic"]
    for name in SCHEMES:
        path = studied / "out" / "weights" / f"{name}.safetensors"
        assert rows[name]["size_bytes"] == path.stat().st_size
        assert load_weights(path).theory == rows[name]["theory_bytes"] < rows[name]["size_bytes"]
        assert rows[name]["compression"] == pytest.approx(rows["Baseline_FP32"]["size_bytes"] / path.stat().st_size)


def test_fewer_bits_err_more_and_the_float_model_errs_not(results: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in results["rows"]}
    for output, found in rows["Baseline_FP32"]["outputs"].items():
        assert (found["mae"], found["psnr"], found["ce"]) == (0.0, None, None)
        errors = [rows[name]["outputs"][output]["mae"] for name in ("INT8_Per_Channel_Symmetric", "INT4_Group_128")]
        assert 0 < errors[0] < errors[1]
    assert rows["Baseline_FP32"]["outputs"]["pts3d_1"]["ssim"] == pytest.approx(1.0)
    assert rows["INT4_Group_32"]["drop_pct"] is not None and rows["INT4_Group_32"]["quality"]


def test_engines_compute_what_the_files_hold(results: dict[str, Any]) -> None:
    rows = {row["name"]: {engine["runtime"]: engine for engine in row["engines"]} for row in results["rows"]}
    assert not results["notes"]
    assert list(rows["Baseline_FP32"]) == ["OpenVINO", "ONNX Runtime"]
    assert list(rows["INT8_Per_Tensor_Symmetric"]) == ["torch"] and not rows["INT8_Per_Tensor_Asymmetric"]
    assert list(rows["INT4_Group_32"]) == ["OpenVINO", "ONNX Runtime", "TensorRT", "torch"]
    for row in results["rows"]:
        worst = max(found["relative_error"] for found in row["outputs"].values())
        for engine in row["engines"]:
            if row["name"] == "Baseline_FP32":
                assert engine["relative_error"] < 1e-4 and engine["speedup"]["value"] == 1.0
                continue
            assert 0.2 * worst < engine["relative_error"] < 5 * worst, (row["name"], engine["what"])
            if engine["runtime"] == "TensorRT":
                assert (engine["measured"], engine["rounds"], engine["speedup"]) == ("emulated", 0, None)
            else:
                assert engine["measured"] == "engine" and engine["rounds"] == 6
                assert engine["p25_ms"] <= engine["p50_ms"] <= engine["p75_ms"]
                assert engine["speedup"]["low"] < engine["speedup"]["value"]
    assert "dynamic int8" in rows["PyTorch_Dynamic"]["torch"]["what"]


def test_report_and_charts(studied: Path, results: dict[str, Any]) -> None:
    text = (studied / "out" / "comprehensive_report.txt").read_text()
    for words in (
        "Engines",
        "TensorRT (emulated)",
        "inputs in float32",
        "in each call",
        "pts3d_1: against the float model",
        "Grades",
        "edge device",
        "rule: ",
    ):
        assert words in text
    for row in results["rows"]:
        assert row["name"] in text
    with Image.open(studied / "out" / "comprehensive_visualizations.png") as picture:
        assert picture.width > 1200 and len(picture.convert("L").resize((64, 64)).getcolors(4096) or []) > 8


def test_the_table_of_methods(studied: Path) -> None:
    found = json.loads((studied / "out" / "methods.json").read_text())
    cells = {(cell["method"], cell["column"]): cell for cell in found["cells"]}
    assert {column for _, column in cells} == {"W8A8", "W4A16"}
    assert found["columns"]["W8A8"]["emulated"] and not found["columns"]["W4A16"]["emulated"]
    assert all(cell["drop_pct"] is not None for cell in cells.values())
    assert cells["round to nearest", "W4A16"]["gain_pct"] is None
    gain, drops = (
        cells["GPTQ", "W4A16"]["gain_pct"],
        [cells[name, "W4A16"]["drop_pct"]["value"] for name in ("round to nearest", "GPTQ")],
    )
    assert gain["value"] == pytest.approx(drops[0] - drops[1], abs=1e-6)
    text = (studied / "out" / "methods.txt").read_text()
    assert "(emulated)" in text and "with the float model's prediction as the truth" in text


def test_rows_are_chosen_by_their_words() -> None:
    assert chosen_rows(["gptq"]) == ["round to nearest", "GPTQ"]
    assert chosen_rows(["hadamard+gptq", "left_out"]) == ["round to nearest", LEFT_OUT, "Hadamard + GPTQ"]
    assert chosen_rows([]) == list(METHODS)


def test_methods_are_compared_by_what_rounding_alone_does(studied: Path) -> None:
    found = json.loads((studied / "out" / "methods.json").read_text())
    cells = {(cell["method"], cell["column"]): cell for cell in found["cells"]}
    nearest = cells["round to nearest", "W4A16"]
    assert nearest["closer_pct"] is None and nearest["error_pct"]["value"] > 0 and found["groups"] >= 2
    assert cells["round to nearest", "W8A8"]["error_pct"]["value"] < nearest["error_pct"]["value"]
    for (method, column), cell in cells.items():
        if method != "round to nearest":
            base = cells["round to nearest", column]["error_pct"]["value"]
            smaller = 100 * (1 - cell["error_pct"]["value"] / base)
            assert cell["closer_pct"]["value"] == pytest.approx(smaller, abs=1e-6), (method, column)
            assert cell["closer_pct"]["low"] < cell["closer_pct"]["value"] < cell["closer_pct"]["high"]
    assert cells["round to nearest", "W8A8"]["weights_error"] < nearest["weights_error"] < 0.5
    gptq = cells["GPTQ", "W4A16"]  # moves weights further, so that what layers compute moves less
    assert gptq["weights_error"] > nearest["weights_error"] and 0 < gptq["layers_error"] < nearest["layers_error"]


def test_the_script_of_the_short_comparison_runs_on_pictures(studied: Path, tiny_model: Path, pictures: Path) -> None:
    words = ("--image_folder", pictures, "--max_images", "2", "--output_dir", "short")
    done = script(studied, "compare_quantization", "--model_name", tiny_model, *words)
    assert done.code == 0, done.err
    found = json.loads((studied / "short" / "comparison_report.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert not found["data"]["truthful"] and found["rows"][1]["quality"] is None
    assert found["rows"][1]["drop_pct"] is not None  # against the float model
    assert (studied / "short" / "comparison_summary.txt").is_file()
    assert (studied / "short" / "comparison_plots.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "cuda"), "torch finds no CUDA device here"),
        (("--device", "tpu"), "--device tpu: cpu or cuda"),
        (("--only", "INT4_Group_12"), "unknown scheme 'INT4_Group_12' (did you mean 'INT4_Group_128'?); known are"),
        (("--model", "nobody/nothing"), "download model.safetensors and config.json of https://huggingface.co/nobody/"),
        (
            ("--methods", "--columns", "W4A6"),
            "unknown column 'W4A6' (did you mean 'W4A16'?); known are W8A8, W4A16, W4A4",
        ),
        (("--methods", "--rows", "gptw"), "unknown row 'gptw' (did you mean 'gptq'?); known are rtn, smooth, hadamard"),
        (("--methods", "--images", "here"), "--methods compares drops against ground truth"),
    ],
)
def test_wrong_words_are_one_sentence(studied: Path, words: tuple[str, ...], said: str) -> None:
    outcome: Outcome = pqk(studied, "study", "weights", *words, "-o", "refused")
    assert outcome.code == 2 and said in outcome.sentence
    assert not (studied / "refused").exists() or not list((studied / "refused").iterdir())
