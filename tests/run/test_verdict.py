"""The verdict: each threshold alone decides, on the right side of its limit, and nothing passes unmeasured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import Graph, Precision
from pqk.engines.variant import Variant
from pqk.families.dust3r.settings import Thresholds, load_evaluation
from pqk.families.registry import family
from pqk.recipe.runner import _wrong
from pqk.recipe.verdict import Measured, Rise, judge_drop, judge_quantized, wrongly_computed
from pqk.stats.intervals import Interval

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = load_evaluation(REPOSITORY / "configs" / "eval.yaml").thresholds


def exact(value: float) -> Interval:
    """A number that is known without error."""
    return Interval(value, value, value, 8)


def risen(value: Interval | None) -> list[Rise]:
    """A rise of ause, which is judged beside the main metric."""
    return [Rise("ause", "confidence", value, LIMITS.ause_rise)]


def measured_as(name: str, value: Any) -> Measured:
    """What is measured: GOOD with one number changed."""
    changed: dict[str, Any] = {"rises": risen(value)} if name == "ause_rise" else {name: value}
    return replace(GOOD, **changed)


GOOD = Measured(exact(0.4), exact(2.6), exact(1.3), 0.26, int8_share=0.91, rises=risen(exact(0.01)), planned_share=0.92)
ORDER = ["drop_pct", "speedup_vs_own_f32", "speedup_vs_best_float", "size_ratio", "int8_share", "ause_rise"]
NOISY = ("drop_pct", "speedup_vs_own_f32", "speedup_vs_best_float")

# name: (just good enough, just not)
EDGES = {
    "drop_pct": (exact(1.0), exact(1.0001)),
    "speedup_vs_own_f32": (exact(2.0), exact(1.9999)),
    "speedup_vs_best_float": (exact(1.0), exact(0.9999)),
    "size_ratio": (1 / 3.5, 1 / 3.4999),
    "int8_share": (0.92 * 0.98, 0.92 * 0.9799),
    "ause_rise": (exact(0.03), exact(0.0301)),
}


def test_all_good() -> None:
    verdict, sentences = judge_quantized(GOOD, LIMITS)
    assert verdict == "pass"
    assert len(sentences) == 6
    for rises in ([], risen(None)):  # where it is not asked for, and where it was not measured
        assert judge_quantized(replace(GOOD, rises=rises), LIMITS) == ("pass", sentences[:5])
    assert all(sentence.startswith("ok: ") for sentence in sentences)
    assert sentences[1] == "ok: t_pair p50 61.5 % below the model's own f32 (at least 50 % below)"


@pytest.mark.parametrize("name", ORDER)
def test_each_threshold_flips_alone(name: str) -> None:
    enough, not_enough = EDGES[name]
    assert judge_quantized(measured_as(name, enough), LIMITS)[0] == "pass"
    verdict, sentences = judge_quantized(measured_as(name, not_enough), LIMITS)
    assert verdict == "fail"
    assert [s.startswith("FAILED: ") for s in sentences] == [field == name for field in ORDER]


@pytest.mark.parametrize("name", NOISY)
def test_what_was_not_measured_neither_passes_nor_hides_a_failure(name: str) -> None:
    verdict, sentences = judge_quantized(measured_as(name, None), LIMITS)
    assert verdict is None
    assert [s.startswith("?: ") for s in sentences] == [field == name for field in ORDER]
    assert judge_quantized(replace(measured_as(name, None), int8_share=0.1), LIMITS)[0] == "fail"


def test_the_slack_against_the_best_float_is_said() -> None:
    slack = LIMITS.model_copy(update={"not_slower_than_best_float_pct": 5.0})
    slower = replace(GOOD, speedup_vs_best_float=exact(0.96))
    assert judge_quantized(slower, LIMITS)[0] == "fail"
    verdict, sentences = judge_quantized(slower, slack)
    assert verdict == "pass"
    assert "(at most 5 % slower)" in sentences[2]


@pytest.mark.parametrize("name", [*NOISY, "ause_rise"])
def test_an_interval_on_both_sides_of_its_limit_is_undecided(name: str) -> None:
    good, bad = EDGES[name]
    assert isinstance(good, Interval) and isinstance(bad, Interval)
    low, high = sorted((good.value, bad.value))
    for value in (low, high):  # whatever the number itself would say
        verdict, sentences = judge_quantized(measured_as(name, Interval(value, low, high, 8)), LIMITS)
        assert verdict == "undecided"
        assert [s.startswith("undecided: ") for s in sentences] == [field == name for field in ORDER]
    unknown = measured_as(name, Interval(good.value, None, None, 1))
    assert judge_quantized(unknown, LIMITS)[0] == "undecided"
    assert judge_quantized(replace(unknown, int8_share=0.1), LIMITS)[0] == "fail"
    assert judge_quantized(replace(unknown, int8_share=None), LIMITS)[0] is None


def test_an_undecided_drop_says_how_many_scenes_would_decide() -> None:
    drop = Interval(0.5, -2.1, 3.1, 8)
    assert judge_drop(drop, 1.0) == (
        "undecided",
        "8 scenes give the drop to +-2.6 %; about 217 would decide (drop 0.5 %, at most 1 %)",
    )
    assert judge_drop(Interval(0.5, None, None, 1), 1.0)[1].startswith("1 scene gives no interval; at least 2")
    assert judge_drop(Interval(1.0, 0.5, 1.5, 8), 1.0)[1].startswith("8 scenes give the drop to +-0.5 %; no number")


intervals = st.tuples(st.floats(-100, 100), st.floats(0, 10), st.floats(0, 10)).map(
    lambda t: Interval(t[0], t[0] - t[1], t[0] + t[2], 8)
)
speeds = st.tuples(st.floats(0.01, 100), st.floats(0.5, 1), st.floats(1, 2)).map(
    lambda t: Interval(t[0], t[0] * t[1], t[0] * t[2], 30)
)
measured = st.builds(
    Measured,
    drop_pct=st.none() | intervals,
    speedup_vs_own_f32=st.none() | speeds,
    speedup_vs_best_float=st.none() | speeds,
    size_ratio=st.floats(0.01, 2),
    int8_share=st.floats(0.01, 1),
    planned_share=st.floats(0, 1),
)


@given(measured, st.floats(0, 20), st.floats(0, 95), st.floats(1, 10), st.floats(0, 1))
def test_the_verdict_is_the_conjunction(m: Measured, drop: float, cut: float, ratio: float, share: float) -> None:
    limits: Thresholds = LIMITS.model_copy(
        update={
            "quality_drop_q_only_pct": drop,
            "t_pair_p50_reduction_pct": cut,
            "size_ratio_min": ratio,
            "as_planned_min": share,
        }
    )
    verdict, sentences = judge_quantized(m, limits)
    marks = [sentence.split(":")[0] for sentence in sentences]
    assert set(marks) <= {"ok", "FAILED", "?", "undecided"}
    assert (verdict == "fail") == ("FAILED" in marks)
    assert (verdict == "pass") == (set(marks) == {"ok"})
    assert (verdict == "undecided") == (set(marks) in ({"ok", "undecided"}, {"undecided"}))
    assert marks.count("?") == [m.drop_pct, m.speedup_vs_own_f32, m.speedup_vs_best_float].count(None)
    if m.drop_pct is not None:
        assert m.drop_pct.low is not None and m.drop_pct.high is not None
        assert (marks[0] == "ok") == (m.drop_pct.high <= drop)
        assert (marks[0] == "FAILED") == (m.drop_pct.low > drop)
    assert m.int8_share is not None and m.planned_share is not None
    assert (marks[4] == "ok") == (m.int8_share >= share * m.planned_share)


@given(measured, st.floats(0, 50), st.floats(1, 4))
def test_a_better_measurement_never_fails_where_a_worse_one_passed(m: Measured, less: float, faster: float) -> None:
    if judge_quantized(m, LIMITS)[0] != "pass":
        return
    assert m.drop_pct is not None
    assert m.speedup_vs_own_f32 is not None
    drop, speed = m.drop_pct, m.speedup_vs_own_f32
    assert drop.low is not None and drop.high is not None and speed.low is not None and speed.high is not None
    better = replace(
        m,
        drop_pct=Interval(drop.value - less, drop.low - less, drop.high - less, 8),
        speedup_vs_own_f32=Interval(speed.value * faster, speed.low * faster, speed.high * faster, 30),
    )
    assert judge_quantized(better, LIMITS)[0] == "pass"


@pytest.mark.parametrize(
    ("drop", "told"),
    [
        (None, False),
        (Interval(0.1, 0.0, 0.2, 52), False),
        (Interval(30.0, 5.0, 55.0, 52), False),  # not for sure
        (Interval(207.2, 170.7, 243.7, 52), True),
        (Interval(207.2, None, None, 1), True),
    ],
)
def test_a_float_precision_that_is_far_from_f32_is_told(drop: Interval | None, told: bool) -> None:
    found = wrongly_computed("bf16", drop)
    assert (found is not None) == told
    if found is not None:
        assert "bf16 drops 207.2 % against f32 of the same network" in found and "quant.float_rest=f32" in found


def test_a_precision_is_held_against_f32_of_the_same_network() -> None:
    def variant(name: str, precision: Precision, path: str) -> Variant:
        return Variant(name, "openvino", precision, {"net": Graph(Path(path), (), (), path)})

    def scores(factor: float) -> dict[str, Any]:
        rows = [{"group": f"g{k}", "sample": str(k), "absrel": factor * (1 + 0.01 * (k % 3))} for k in range(12)]
        return {"samples": rows}

    other, own = variant("a", Precision.F32, "teacher"), variant("b", Precision.F32, "student")
    coarse, of_other = variant("c", Precision.BF16, "student"), variant("d", Precision.BF16, "alone")
    known = {each.name: each for each in family("dust3r").settings_part().METRICS}
    candidate: Any = SimpleNamespace(
        variants=[other, own, coarse, of_other],
        experiment=SimpleNamespace(metrics=known),
        metric="absrel",
        truthful=True,
    )
    final: Any = SimpleNamespace(scored={"a": scores(1.0), "b": scores(2.0), "c": scores(2.01), "d": scores(9.0)})
    assert _wrong(candidate, own, final) is None and _wrong(candidate, coarse, final) is None
    assert _wrong(candidate, of_other, final) is None  # nothing to hold it against
    final.scored["c"] = scores(4.0)
    assert "bf16 drops 100.0 %" in (_wrong(candidate, coarse, final) or "")
