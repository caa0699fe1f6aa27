"""`pqk tune --for speed`: which layers go back to float because they are faster there."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from run_toys import Outcome, pqk

from pqk.recipe.request import Request
from pqk.settings.quant import load_quant
from pqk.stats.intervals import Interval
from pqk.tune import placement
from pqk.tune.placement import Timed, regions_of, search

NAMES = [f"net:layer{number}" for number in range(6)]


def measured(gains: dict[str, float], half: float, together: Callable[[int], float] = lambda _: 1.0) -> Any:
    """A measure of regions whose gains multiply, times what `together` says of so many, and what it was asked."""
    asked: list[tuple[str, ...]] = []

    def measure(names: tuple[str, ...]) -> Timed:
        asked.append(names)
        value = math.prod(gains[name] for name in names) * together(len(names))
        return Timed(names, Interval(value, value - half, value + half, 30))

    return measure, asked


@given(st.lists(st.floats(0.8, 1.2), min_size=1, max_size=6), st.floats(0, 0.1), st.integers(2, 20))
def test_the_winner_is_surely_faster_and_the_fastest_that_was_timed(gains: list[float], half: float, most: int) -> None:
    measure, asked = measured(dict(zip(NAMES, gains, strict=False)), half)
    tried, winner = search(NAMES[: len(gains)], measure, most)
    assert len(asked) == len(tried) <= most and len(set(asked)) == len(asked)
    sure = [one for one in tried if one.sure]
    assert (winner is None) == (not sure)
    if winner is not None:
        assert winner.faster.value == max(one.faster.value for one in sure)


def test_regions_that_are_slower_together_are_joined_one_by_one() -> None:
    gains = dict(zip(NAMES, (1.1, 1.05, 0.9, 1.02, 1.0, 1.0), strict=True))
    measure, asked = measured(gains, 0.01, lambda count: 0.8 if count > 2 else 1.0)
    _, winner = search(NAMES, measure, 40)
    assert winner is not None and winner.regions == (NAMES[0], NAMES[1])
    assert asked[6:] == [(NAMES[0], NAMES[1], NAMES[3]), (NAMES[0], NAMES[1])]


def test_equal_layers_of_all_blocks_are_one_region() -> None:
    nodes = {
        "encoder": [f"/enc_blocks.{i}/{layer}" for i in (0, 11) for layer in ("attn/qkv/MatMul", "attn/MatMul_1")],
        "decoder": [
            *(f"/blocks{stack}.{i}/mlp/{fc}/MatMul" for stack in ("", "2") for i in (0, 1) for fc in ("fc1", "fc2")),
            "/head1/dpt/refine4/unit1/conv1/Conv",
            "/head2/dpt/refine1/unit2/conv1/Conv",
            "plain",
        ],
    }
    found = regions_of(nodes)
    assert {name: len(names) for name, names in found.items()} == {
        "decoder:blocks.*/mlp/fc1/MatMul": 4,
        "decoder:blocks.*/mlp/fc2/MatMul": 4,
        "encoder:enc_blocks.*/attn/qkv/MatMul": 2,
        "encoder:enc_blocks.*/attn/MatMul_1": 2,
        "decoder:head/dpt/refine/unit/conv1/Conv": 2,
        "decoder:plain": 1,
    }
    assert sorted(node for names in found.values() for node in names) == sorted(
        f"{graph}:{name}" for graph, names in nodes.items() for name in names
    )


@pytest.fixture(scope="module")
def root(finished: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(finished[0], tmp_path_factory.mktemp("speed") / "project", symlinks=True)


def test_a_card_is_placed_and_the_search_goes_on_from_what_is_kept(root: Path, tiny_model: Path) -> None:
    asked = ("tune", "B1", "--for", "speed", "--model", tiny_model, "--max-evaluations", "2", "--json")
    first = pqk(root, *asked, "--max-drop", "1000")
    assert first.code in (0, 1, 4), first.err
    found = json.loads(first.out.splitlines()[-1])
    assert len(found["rows"]) == 2 and all(row["float_nodes"] for row in found["rows"])
    assert found["best_float"] in ("f32", "bf16") and found["against_float"]["speedup_vs_float"] > 0
    assert found["test_drop_pct"] is not None
    listed = load_quant(root / found["quant_yaml"]).ptq.keep_list
    winner = [row for row in found["rows"] if row["winner"]]
    attention = found["attention_in_int8"]
    assert attention["taken"] == ((attention["speedup_vs_int8_interval"] or [0])[0] > 1)
    assert (attention["validation_drop_pct"] is not None) == attention["taken"]
    assert "the products of attention in int8: " in found["sentences"][0]
    groups = ("LayerNorm",) if attention["taken"] else ("LayerNorm", "Softmax", "AttentionScales")
    assert listed[: len(groups)] == groups
    assert len(listed) - len(groups) == sum(row["float_nodes"] for row in winner)
    assert (found["again"]["speedup_vs_int8"] is None) == (not winner)
    rows = list(csv.DictReader((root / "reports" / "tune" / "B1.speed.csv").open()))
    assert [row["regions"] for row in rows[1:]] == [" ".join(row["regions"]) for row in found["rows"]]
    assert rows[0]["regions"] == "attention in int8" and rows[0]["winner"] == str(attention["taken"]).lower()
    assert Image.open(root / "reports" / "tune" / "B1.speed.png").size[0] > 600

    strict = pqk(root, *asked, "--max-drop", "-1000")  # nothing is measured again, and the limit alone decides
    assert strict.code == 1 and "`--for quality` lowers it" in strict.err
    again = json.loads(strict.out.splitlines()[-1])
    assert again["rows"] == found["rows"] and again["test_drop_pct"] is None
    assert "… timing" not in strict.err  # only "kept from before"


def test_attention_that_is_faster_in_int8_is_taken_and_regions_are_searched_in_it(
    root: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([([2.0, 2.1, 2.2] * 10, [1.0, 1.1, 1.2] * 10), *[([1.0, 1.1, 1.2] * 10,) * 2] * 9])
    monkeypatch.setattr(placement, "times_beside", lambda *_: next(times))
    monkeypatch.chdir(root)
    request = Request("B1", "openvino", model=str(tiny_model))
    said: list[str] = []
    out = tmp_path / "quant.yaml"
    placed = placement.place(request, 1000, 2, out, root, lambda *_: None, said.append)
    assert placed.attention is not None and placed.attention.taken and placed.attention.faster.value > 1.5
    assert load_quant(out).ptq.keep_list == ("LayerNorm",) and placed.winner is None
    assert any("attn/MatMul_1" in name for name in placed.regions)  # the products are nodes that may go back to float
    assert "taken, and part of plain int8" in placed.sentences[0] and len(placed.tried) == 2
    assert load_quant(root / "configs" / "quant.yaml").ptq.keep_list == ("LayerNorm", "Softmax", "AttentionScales")
