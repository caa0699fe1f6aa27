"""`pqk tune` from end to end in real processes, on a tiny workload and a tiny model."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_toys import Outcome, pqk

from backends import registry
from pqk.cli import main
from pqk.cli.run_output import settings_of
from pqk.recipe.request import Request
from pqk.settings.keep import split_entry
from pqk.settings.quant import load_quant
from pqk.tune.tune_card import units_of, use_command

pytest.importorskip("nncf")
Copy = Callable[[], Path]


UNDECIDED = 4
"""What pictures of one scene end with: their drop has no interval over scenes."""


def data(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def root(finished: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished project for all tests here; they run in order and build on each other's stores."""
    return shutil.copytree(finished[0], tmp_path_factory.mktemp("tune") / "project", symlinks=True)


@pytest.fixture(scope="module")
def asked(tiny_model: Path, pictures: Path) -> tuple[str | Path, ...]:
    """Photographs make the float model its own truth: every int8 model has a drop above 0, the float model has 0."""
    return ("tune", "B1", "--model", tiny_model, "--images", pictures, "--json")


@pytest.fixture(scope="module")
def plain(root: Path, asked: tuple[str | Path, ...]) -> Outcome:
    return pqk(root, *asked, "--max-drop", "100")


@pytest.fixture(scope="module")
def tuned(root: Path, asked: tuple[str | Path, ...], plain: Outcome) -> Outcome:
    """Tuned to half the drop of plain int8."""
    half = data(plain)["rows"][0]["quality_drop_pct"] / 2
    return pqk(root, *asked, "--max-drop", f"{half:.9f}", "--max-evaluations", "3", "-o", "mixed.yaml")


def test_plain_int8_that_is_good_enough_is_the_winner(root: Path, plain: Outcome) -> None:
    assert plain.code == UNDECIDED, plain.err
    found = data(plain)
    assert found["verdict"] == "undecided" and "1 scene gives no interval" in found["sentences"][1]
    (row,) = found["rows"]
    assert (row["units"], row["float_nodes"], row["winner"], row["speedup_vs_int8"]) == ([], 0, True, 1.0)
    assert 0 < row["quality_drop_pct"] < 100
    assert "int8 as it is drops" in found["sentences"][0]
    assert "ranking" not in plain.err
    unchanged = root / "reports" / "tune" / "B1.quant.yaml"
    assert unchanged.read_bytes() == (root / "configs" / "quant.yaml").read_bytes()


def test_the_winner_is_within_the_limit_when_quantized_anew(root: Path, tuned: Outcome) -> None:
    assert tuned.code == UNDECIDED, tuned.err
    found = data(tuned)
    *searched, confirmed = found["rows"]
    assert 2 <= len(searched) <= 3
    assert searched[0]["units"] == [] and searched[0]["quality_drop_pct"] > found["max_drop_pct"]
    (winner,) = [row for row in searched if row["winner"]]
    assert (confirmed["kind"], confirmed["winner"], confirmed["units"]) == ("confirmed", True, winner["units"])
    assert found["test_drop_pct"] > 0 and winner["float_nodes"] == confirmed["float_nodes"] > 0
    assert max(winner["quality_drop_pct"], confirmed["quality_drop_pct"]) <= found["max_drop_pct"]
    assert any(row["front"] for row in searched) and not confirmed["front"]
    for row in found["rows"]:
        assert row["t_pair_p50_ms"] > 0
        times = searched[0]["t_pair_p50_ms"] / row["t_pair_p50_ms"]
        assert row["speedup_vs_int8"] == pytest.approx(times)
    # Every quantized node is in one unit, and nodes of both graphs take part.
    nodes = [node for unit in found["units"] for node in unit["nodes"]]
    assert len(nodes) == len(set(nodes))
    assert {split_entry(node)[0] for node in nodes} == {"encoder", "decoder"}
    shares = [unit["of_all"] for unit in found["units"]]
    assert shares == sorted(shares, reverse=True)


def test_csv_json_and_plot(root: Path, tuned: Outcome) -> None:
    folder, found = root / "reports" / "tune", data(tuned)
    assert json.loads((folder / "B1.json").read_text()) == found
    rows = list(csv.DictReader((folder / "B1.csv").open(newline="")))
    assert [int(row["float_nodes"]) for row in rows] == [row["float_nodes"] for row in found["rows"]]
    assert [float(row["t_pair_p50_ms"]) for row in rows] == [row["t_pair_p50_ms"] for row in found["rows"]]
    assert rows[-1]["kind"] == "confirmed" and rows[-1]["units"].split() == found["rows"][-1]["units"]
    with Image.open(folder / "B1.png") as picture:
        assert picture.format == "PNG" and picture.width > 900
    assert "winner, quantized again" in tuned.err  # the table goes to stderr beside --json


def test_the_command_at_the_end_runs_the_tuned_recipe(root: Path, tuned: Outcome) -> None:
    found = data(tuned)
    before = load_quant(root / "configs" / "quant.yaml").ptq.keep_list
    added = load_quant(root / "mixed.yaml").ptq.keep_list[len(before) :]
    winner = found["rows"][-1]
    assert len(added) == winner["float_nodes"]
    assert all(split_entry(entry)[0] in ("encoder", "decoder") for entry in added)
    copied, _, run = found["sentences"][-1].removeprefix("to use it: ").partition(" && ")
    what, source, target = shlex.split(copied)
    assert (what, source, target) == ("cp", "mixed.yaml", "configs/quant.yaml")
    original = (root / target).read_bytes()
    try:
        (root / target).write_bytes((root / source).read_bytes())
        outcome = pqk(root, *shlex.split(run)[1:], "--json")
    finally:
        (root / target).write_bytes(original)
    assert outcome.code in (0, 1, 4), outcome.err
    assert outcome.record["keep_list"] == [*before, *added]
    assert outcome.record["quality_drop_pct"] == found["test_drop_pct"]
    assert "✓ quantization  kept from before" in outcome.err


def test_a_limit_that_nothing_reaches_is_exit_1(root: Path, asked: tuple[str | Path, ...], tuned: Outcome) -> None:
    out = root / "none.yaml"
    outcome = pqk(root, *asked, "--max-drop=-1", "--max-evaluations", "3", "-o", "none.yaml")
    assert outcome.code == 1, outcome.err
    found = data(outcome)
    assert found["verdict"] == "fail" and found["quant_yaml"] is None and not out.exists()
    assert not any(row["winner"] for row in found["rows"])
    # The last choice is everything but the unit with the least share of each graph, as each must have an int8 node.
    left = {unit["name"]: unit["name"].split(":")[0] for unit in found["units"]}
    for name in found["rows"][-1]["units"]:
        del left[name]
    assert sorted(left.values()) == ["decoder", "encoder"]
    assert list(left.values())[-1:] == [found["units"][-1]["name"].split(":")[0]]
    assert 0 <= found["rows"][-1]["quality_drop_pct"] < found["rows"][0]["quality_drop_pct"]
    assert "no quant.yaml is written" in found["sentences"][0]
    assert "✓ ranking the nodes of openvino  kept from before" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--backend", "reference"), "back to float, which backend reference cannot do"),
        (("--quantizer", "modelopt"), "unknown quantizer 'modelopt'.*openvino has nncf, inc"),
        (("--max-drop", "nan"), "--max-drop must be a number of percent"),
        (("--set", "quant.ptq.keep_list=[LayerNorm]"), "keep_list is overridden by card B1 or --set"),
        (("-o", "reports"), "-o reports: .* a folder"),
        (("-o", "configs/quant.yaml"), "this is the file that tuning starts from"),
    ],
)
def test_refused_before_anything_runs(
    project: Path,
    arguments: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys, "argv", ["pqk", "tune", "B1", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    outcome = Outcome(int(str(ended.value.code)), said.out, said.err)
    assert outcome.code == 2, outcome.err
    assert re.search(says, outcome.sentence), outcome.sentence
    assert "…" not in outcome.err and "✓" not in outcome.err


def test_emulated_engines_are_refused_before_anything_runs(project: Path) -> None:
    available = registry.get("trt").availability()
    if not available.available or not available.emulated:
        pytest.skip(available.reason or "a CUDA device runs the engines here")
    outcome = pqk(project, "tune", "B1", "--backend", "trt")
    assert outcome.code == 2, outcome.err
    assert "pqk tune needs times, but engines of backend trt are emulated here" in outcome.sentence
    assert "…" not in outcome.err and "✓" not in outcome.err


def test_inc_is_tuned_with_inc(root: Path, asked: tuple[str | Path, ...]) -> None:
    """The winner is quantized again by the same quantizer, whose names the keep-list must match."""
    pytest.importorskip("neural_compressor", reason="needs Intel Neural Compressor: pip install 'pqk[inc]'")
    pytest.importorskip("torchao", reason="needs torchao: pip install 'pqk[inc]'")
    inc = (*asked, "--quantizer", "inc", "-o", "inc.yaml")
    plain = pqk(root, *inc, "--max-drop", "100")
    assert plain.code == UNDECIDED, plain.err
    half = data(plain)["rows"][0]["quality_drop_pct"] / 2
    outcome = pqk(root, *inc, "--max-drop", f"{half:.9f}", "--max-evaluations", "2")
    assert outcome.code == UNDECIDED, outcome.err
    found = data(outcome)
    *_, confirmed = found["rows"]
    assert confirmed["kind"] == "confirmed" and confirmed["quality_drop_pct"] <= found["max_drop_pct"]
    assert "--quantizer inc" in found["sentences"][-1]
    # Nothing is lost between the graph with nodes put back and the graph quantized without them.
    (winner,) = [row for row in found["rows"][:-1] if row["winner"]]
    assert confirmed["quality_drop_pct"] == pytest.approx(winner["quality_drop_pct"], rel=0.2)


def test_a_pattern_of_one_graph_needs_its_name(root: Path, tiny_model: Path) -> None:
    """The encoder has no decoder block; entries with a name are followed by the run of the tuned recipe above."""
    pattern = "^/dec_blocks.0/mlp/fc1/MatMul$"
    run = ("run", "B1", "--backend", "openvino", "--model", tiny_model, "--json")
    refused = pqk(root, *run, "--set", f"quant.ptq.keep_list=['{pattern}']")
    assert refused.code == 2, refused.err
    assert f"encoder: keep entry '{pattern}' matches no node" in refused.sentence
    assert refused.sentence.endswith("must match in both graphs, or name its graph: 'decoder:...'")


def test_units_are_a_partition_of_the_nodes() -> None:
    def row(graph: str, name: str, nodes: tuple[str, ...], share: float) -> dict[str, Any]:
        return {"graph": graph, "name": name, "nodes": list(nodes), "of_all": share}

    groups = [
        row("decoder", "dec.0", ("/dec.0/a", "/dec.0/b"), 0.5),
        row("encoder", "enc.0", ("/a", "/b"), 0.3),
        row("decoder", "head", ("/a",), -0.01),
    ]
    nodes = [row("decoder", "/dec.0/b", ("/dec.0/b",), 0.4), row("decoder", "/dec.0/a", ("/dec.0/a",), 0.02)]
    found = units_of({"groups": groups, "nodes": nodes})
    assert [(u.name, u.nodes) for u in found] == [
        ("decoder:/dec.0/b", ("decoder:/dec.0/b",)),
        ("encoder:enc.0", ("encoder:/a", "encoder:/b")),
        ("decoder:/dec.0/a", ("decoder:/dec.0/a",)),
        ("decoder:head", ("decoder:/a",)),
    ]


def test_the_command_names_everything_that_was_asked(tmp_path: Path) -> None:
    script, out = tmp_path / "scripts" / "run_quant.py", tmp_path / "t.yaml"
    script.parent.mkdir()
    script.touch()
    words = shlex.split(use_command(Request("B1", "openvino", model="my model"), out, tmp_path))
    assert words == ["python", str(script), "--card", "B1", "--cfg", str(out), "--ckpt", "my model"]
    settings = {"quant.float_rest": "f32", "quant.qat.learning_rate": 1e-06, "eval.quality.metrics": ["absrel", "rmse"]}
    text = use_command(Request("B1", "openvino", scenes=Path("a b"), settings=settings), out, tmp_path)
    copied, run = text.split(" && ")
    assert shlex.split(copied) == ["cp", str(out), str(tmp_path / "configs" / "quant.yaml")]
    words = shlex.split(run)
    assert words[:7] == ["pqk", "run", "B1", "--backend", "openvino", "--scenes", "a b"]
    assert settings_of([words[k + 1] for k, word in enumerate(words) if word == "--set"]) == settings
