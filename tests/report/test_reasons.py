"""Every sentence that a verdict can say has its Chinese form, with its numbers and names as they were recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pqk.families.dust3r.settings import load_evaluation
from pqk.recipe.verdict import Measured, Rise, judge_float, judge_quantized
from pqk.report.html.reasons import in_language
from pqk.report.plots import drop_lines, quality_lines, speed_limits
from pqk.stats.intervals import Interval

ROOT = Path(__file__).resolve().parents[2]
LIMITS = load_evaluation(ROOT / "configs" / "eval.yaml").thresholds
DROPS = (None, Interval(0.5, 0.4, 0.6, 20), Interval(0.9, -1.0, 2.8, 12), Interval(0.9, None, None, 1))
SPEEDS = (None, Interval(2.2, 2.1, 2.3, 20), Interval(0.8, 0.7, 0.9, 20), Interval(1.5, 0.9, 2.2, 20))
NUMBER = re.compile(r"\d+\.?\d*")
NAMES = {"p50", "f32", "int8", "fp32", "FLOPs", "ause", "Teacher", "t", "pair", "pose", "miss30", "chamfer"}


def sentences() -> Iterator[str]:
    """What verdicts say over a grid of measurements."""
    for drop in DROPS:
        for speed in (*SPEEDS, Interval(1.5, None, None, 3)):
            for share, planned in ((None, 0.8), (0.5, None), (0.83, 0.84)):
                rises = [Rise("ause", "confidence", each, 0.03) for each in DROPS]
                measured = Measured(drop, speed, speed, 3.7, share, rises, planned)
                yield from judge_quantized(measured, LIMITS, ("Q",), "int8")[1]
            rises = [Rise("chamfer", "guard metric", each, 5, " %") for each in DROPS]
            rises += [Rise("pose_miss30", "pose error", each, 0.5) for each in DROPS]
            yield from judge_float(drop, 0.7, LIMITS, ("P", "T"), rises, speed)[1]


def test_no_english_is_left() -> None:
    found = set(sentences())
    assert len(found) > 30
    for sentence in found:
        said = in_language(sentence, "zh")
        left = set(re.findall(r"[A-Za-z]+\d*", said)) - NAMES
        assert not left, f"{sentence} -> {said}"
        assert re.match("(通过|未通过|未定|未测量)：[^：]*", said) and not re.search(
            "(通过|未定|未测量)：.*(通过|未定|未测量)：", said
        ), said
        assert sorted(NUMBER.findall(said)) == sorted(NUMBER.findall(sentence)), said


def limits() -> Iterator[str]:
    """What the lines of a chart are called, for each kind of recipe and each threshold."""
    rows: list[Any] = [
        {"role": "candidate", "combo": combo, "quantizer": "nncf"} for combo in ("Q-only", "P-only", "H")
    ]
    quality: Any = SimpleNamespace(name="absrel", better="lower")
    taught = {"role": "teacher", "precision": "f32", "absrel": 0.1, "quality_reference": "truth"}
    for slack in (0.0, 2.0):
        thresholds = LIMITS.model_copy(update={"not_slower_than_best_float_pct": slack})
        yield from (what for what, _ in drop_lines(rows, thresholds))
        yield from (what for what, _ in speed_limits(rows, thresholds).values())
    same = [{**row, "quality_reference": "truth"} for row in rows]
    yield from (what for what, _ in quality_lines([taught, *same], quality, LIMITS))


def test_limits_are_chinese() -> None:
    found = set(limits())
    assert len(found) >= 7
    for name in found:
        said = in_language(name, "zh")
        assert not set(re.findall(r"[A-Za-z]+", said.replace("-only", ""))) - {"Q", "P", "f", "Teacher"}, said
        assert said.startswith("阈值：") and sorted(NUMBER.findall(said)) == sorted(NUMBER.findall(name)), said


def test_what_a_drop_is_over() -> None:
    assert [in_language(over, "zh") for over in ("52 scenes", "1 scene", "5 draws")] == [
        "52 个场景",
        "1 个场景",
        "5 次抽样",
    ]
    assert in_language("52 scenes", "en") == "52 scenes"


@pytest.mark.parametrize("sentence", ["ok: what nobody knows yet 3 %", "FAILED: <b>x</b>"])
def test_what_is_unknown_stays(sentence: str) -> None:
    assert in_language(sentence, "en") == sentence
    assert in_language(sentence, "zh").split("：", 1)[1] == sentence.split(": ", 1)[1]
