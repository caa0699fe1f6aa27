"""Judges a candidate by the evaluation's thresholds: pass, fail, or undecided where an interval lies on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pqk.settings.evaluation import Thresholds
from pqk.stats.intervals import Interval, groups_to_decide


@dataclass(frozen=True)
class Rise:
    """How much a metric is above the Teacher's, over scenes, and the most that it may be.

    None: it was not measured. meaning: what it tells, for the beginning of a sentence.
    """

    metric: str
    meaning: str
    value: Interval | None
    most: float


@dataclass(frozen=True)
class Measured:
    """What the thresholds look at; None is what was not measured.

    drop_pct over scenes; speedups over timing rounds, against the model's own f32 and its best float precision.
    rises: of the metrics that are judged beside the main one.
    """

    drop_pct: Interval | None
    speedup_vs_own_f32: Interval | None
    speedup_vs_best_float: Interval | None
    size_ratio: float
    int8_share: float | None
    rises: Sequence[Rise] = ()


Verdict = tuple[str | None, list[str]]
Check = tuple[bool | str | None, str]
"""Whether a threshold held: True, False, UNDECIDED, or None when what it looks at was not measured; and a sentence."""
UNDECIDED = "undecided"


def judge_quantized(
    measured: Measured, limits: Thresholds, recipe: Sequence[str] = ("Q",), precision: str = "int8"
) -> Verdict:
    """('pass' | 'fail' | 'undecided' | None, one sentence per threshold). None when something was not measured.

    Success of quantization: drop, median time against the model's own f32 and its best float, size, share of FLOPs in
    kernels of the `precision` that was asked for. Where only weights are lowered (int4) all work is done in floats: no
    share is asked. A threshold holds when the whole interval lies on its good side, and fails when all of it lies on
    the bad one.
    """
    checks = [judge_drop(measured.drop_pct, drop_limit(recipe, limits))]
    reduction = limits.t_pair_p50_reduction_pct
    checks.append(
        _speed(
            measured.speedup_vs_own_f32,
            1 / (1 - reduction / 100),
            lambda speed: f"t_pair p50 {_against(100 * (1 - 1 / speed))} the model's own f32",
            f"at least {reduction:g} % below",
            "there is no t_pair to judge",
        )
    )
    slack = limits.not_slower_than_best_float_pct
    checks.append(
        _speed(
            measured.speedup_vs_best_float,
            1 / (1 + slack / 100),
            lambda speed: f"{speed:.2f}x the speed of the best float precision",
            f"at most {slack:g} % slower" if slack else "not slower",
            "there is no float precision to compare with",
        )
    )
    factor = 1 / measured.size_ratio
    checks.append(
        (factor >= limits.size_ratio_min, f"files {factor:.2f}x smaller (at least {limits.size_ratio_min:g}x)")
    )
    share = measured.int8_share
    if precision != "int4":
        checks.append(
            (None, f"no kernel ran, so none was seen to be {precision}")
            if share is None
            else (
                share >= limits.int8_flops_share_min,
                f"{100 * share:.1f} % of matmul and convolution FLOPs ran in {precision} kernels "
                f"(at least {100 * limits.int8_flops_share_min:g} %)",
            )
        )
    return _verdict([*checks, *_rises(measured.rises)])


def judge_float(
    drop_pct: Interval | None,
    size_ratio: float,
    limits: Thresholds,
    recipe: Sequence[str],
    rises: Sequence[Rise] = (),
) -> Verdict:
    """The same for a recipe without quantization: drop, rises and, where it prunes, the size against the
    Teacher's."""
    checks = [judge_drop(drop_pct, drop_limit(recipe, limits))]
    if "P" in recipe:
        smaller, least = 100 * (1 - size_ratio), limits.size_reduction_p_only_pct
        checks.append((smaller >= least, f"files {smaller:.1f} % smaller (at least {least:g} %)"))
    return _verdict([*checks, *_rises(rises)])


def drop_limit(recipe: Sequence[str], limits: Thresholds) -> float:
    """The drop in percent that a recipe may have: P alone and Q alone have lines of their own."""
    own = {"Q": limits.quality_drop_q_only_pct, "P": limits.quality_drop_p_only_pct}
    return own.get("→".join(recipe), limits.quality_drop_mainline_pct)


def judge_drop(drop: Interval | None, limit: float) -> Check:
    """Whether a drop is at most `limit` percent; an interval that touches the limit from its good side is."""
    if drop is None:
        return None, f"the quality drop was not measured (limit {limit:g} %)"
    if drop.low is None or drop.high is None or drop.half is None:
        few = f"{drop.groups} scene tells no interval; at least 2 are needed"
        return UNDECIDED, f"{few} (quality drop {drop.value:.4g} %, at most {limit:g} %)"
    told = f"quality drop {drop.value:.4g} % ± {drop.half:.2g} % (at most {limit:g} %)"
    if drop.high <= limit:
        return True, told
    if drop.low > limit:
        return False, told
    needed = groups_to_decide(drop, limit)
    more = "no number of scenes would decide" if needed is None else f"about {needed} would decide"
    known = f"{drop.groups} scenes tell the drop to +-{drop.half:.2g} %"
    return UNDECIDED, f"{known}; {more} (drop {drop.value:.4g} %, at most {limit:g} %)"


def _rises(rises: Sequence[Rise]) -> list[Check]:
    """Whether the metrics beside the main one hold: a destroyed confidence map, say, leaves the depth as it is."""
    checks: list[Check] = []
    for rise in rises:
        value, most = rise.value, rise.most
        if value is None:
            continue
        told = f"{rise.meaning}: {rise.metric} {value.value:+.3g} against the Teacher (at most +{most:g})"
        if value.low is None or value.high is None:
            checks.append((UNDECIDED, f"{told}; {value.groups} scene tells no interval"))
        elif value.high <= most:
            checks.append((True, told))
        elif value.low > most:
            checks.append((False, told))
        else:
            checks.append((UNDECIDED, f"{told}; {value.groups} scenes tell it as {value.low:.3g} to {value.high:.3g}"))
    return checks


def _speed(speed: Interval | None, least: float, words: Callable[[float], str], asked: str, untimed: str) -> Check:
    """Whether a speedup is at least `least`, in words of the median."""
    if speed is None:
        return None, f"compiled, not timed: {untimed}"
    told = f"{words(speed.value)} ({asked})"
    if speed.low is None or speed.high is None:
        return UNDECIDED, f"{speed.groups} rounds tell no interval: {told}"
    if speed.low >= least:
        return True, told
    if speed.high < least:
        return False, told
    return UNDECIDED, f"{told}; {speed.groups} rounds tell the speedup as {speed.low:.3g} to {speed.high:.3g}x"


def _verdict(checks: Sequence[Check]) -> Verdict:
    marks = {True: "ok", False: "FAILED", None: "?", UNDECIDED: UNDECIDED}
    sentences = [f"{marks[ok]}: {text}" for ok, text in checks]
    found = [ok for ok, _ in checks]
    if False in found:
        return "fail", sentences
    if None in found:
        return None, sentences
    return (UNDECIDED if UNDECIDED in found else "pass"), sentences


def _against(reduction_pct: float) -> str:
    """'57.1 % below' or '33.0 % above'."""
    return f"{abs(reduction_pct):.1f} % {'below' if reduction_pct >= 0 else 'above'}"
