"""Judges a candidate by the evaluation's thresholds: pass, fail, or undecided where an interval contains a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pqk.settings.evaluation import Thresholds
from pqk.stats.intervals import Interval, groups_to_decide


@dataclass(frozen=True)
class Rise:
    """The rise of a metric above the Teacher's value, over scenes, and its limit `most`.

    value: None when it was not measured. meaning: the metric's subject, for the start of a sentence. unit: ' %' of a
    relative loss.
    """

    metric: str
    meaning: str
    value: Interval | None
    most: float
    unit: str = ""


@dataclass(frozen=True)
class Measured:
    """The values that the thresholds judge; None where one was not measured.

    drop_pct: over scenes. speedups: over timing rounds, against the model's own f32 and its best float precision.
    int8_share: of FLOPs in kernels of the requested precision; planned_share: of those that the quantized graph asks
    for, None where the backend does not tell. rises: of the metrics that are judged beside the main one.
    """

    drop_pct: Interval | None
    speedup_vs_own_f32: Interval | None
    speedup_vs_best_float: Interval | None
    size_ratio: float
    int8_share: float | None
    rises: Sequence[Rise] = ()
    planned_share: float | None = None


Verdict = tuple[str | None, list[str]]
Check = tuple[bool | str | None, str]
"""Result of a threshold: True, False, UNDECIDED, or None when its value was not measured; and a sentence."""
UNDECIDED = "undecided"


def judge_quantized(
    measured: Measured, limits: Thresholds, recipe: Sequence[str] = ("Q",), precision: str = "int8"
) -> Verdict:
    """Returns ('pass' | 'fail' | 'undecided' | None, one sentence per threshold). None: something was not measured.

    Quantization is judged by the drop, the median time against the model's own f32 and its best float, the size, and
    whether kernels of the requested `precision` ran what the graph planned for them. With only the weights quantized
    (int4) all computation is in float, so that is not judged. A threshold holds when the whole interval lies on its
    good side, and fails when all of it lies on the bad side.
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
    if precision != "int4":
        checks.append(_as_planned(measured, limits.as_planned_min, precision))
    return _verdict([*checks, *_rises(measured.rises)])


def _as_planned(measured: Measured, least: float, precision: str) -> Check:
    """Checks that at least the share `least` of the FLOPs that are planned in a precision ran in its kernels."""
    share, planned = measured.int8_share, measured.planned_share
    if share is None:
        return None, f"no kernel ran, so the share of {precision} kernels was not measured"
    text = f"{100 * share:.1f} % of matmul and convolution FLOPs ran in {precision} kernels"
    if planned is None:
        return share > 0, f"{text} (the backend does not tell how many were planned)"
    return (
        share > 0 and share >= least * planned,
        f"{text}, {100 * planned:.1f} % were planned (at least {100 * least:g} % of them)",
    )


def judge_float(
    drop_pct: Interval | None,
    size_ratio: float,
    limits: Thresholds,
    recipe: Sequence[str],
    rises: Sequence[Rise] = (),
    speedup: Interval | None = None,
) -> Verdict:
    """Returns the verdict on a recipe without quantization, as `judge_quantized` does.

    The thresholds are on the drop, the rises and, where the recipe prunes, the size against the Teacher's. Where it
    spares work, `speedup`, against the Teacher in f32, must be one.
    """
    checks = [judge_drop(drop_pct, drop_limit(recipe, limits))]
    if "P" in recipe:
        smaller, least = 100 * (1 - size_ratio), limits.size_reduction_p_only_pct
        checks.append((smaller >= least, f"files {smaller:.1f} % smaller (at least {least:g} %)"))
    if "T" in recipe:
        words = "{:.2f}x the speed of the Teacher in f32".format
        checks.append(_speed(speedup, 1.0, words, "not slower", "there is no Teacher to compare with"))
    return _verdict([*checks, *_rises(rises)])


def drop_limit(recipe: Sequence[str], limits: Thresholds) -> float:
    """Returns the largest allowed drop of a recipe in percent: P alone and Q alone have limits of their own."""
    own = {"Q": limits.quality_drop_q_only_pct, "P": limits.quality_drop_p_only_pct}
    return own.get("→".join(recipe), limits.quality_drop_mainline_pct)


def judge_drop(drop: Interval | None, limit: float) -> Check:
    """Checks that a drop is at most `limit` percent; an interval that touches the limit from its good side passes."""
    if drop is None:
        return None, f"the quality drop was not measured (limit {limit:g} %)"
    if drop.low is None or drop.high is None or drop.half is None:
        few = f"{drop.groups} scene gives no interval; at least 2 are needed"
        return UNDECIDED, f"{few} (quality drop {drop.value:.4g} %, at most {limit:g} %)"
    text = f"quality drop {drop.value:.4g} % ± {drop.half:.2g} % (at most {limit:g} %)"
    if drop.high <= limit:
        return True, text
    if drop.low > limit:
        return False, text
    needed = groups_to_decide(drop, limit)
    more = "no number of scenes would decide" if needed is None else f"about {needed} would decide"
    known = f"{drop.groups} scenes give the drop to +-{drop.half:.2g} %"
    return UNDECIDED, f"{known}; {more} (drop {drop.value:.4g} %, at most {limit:g} %)"


def _rises(rises: Sequence[Rise]) -> list[Check]:
    """Checks the metrics beside the main one: a destroyed confidence map, for example, does not change the depth."""
    checks: list[Check] = []
    for rise in rises:
        value, most = rise.value, rise.most
        if value is None:
            continue
        limit = f"at most +{most:g}{rise.unit}"
        text = f"{rise.meaning}: {rise.metric} {value.value:+.3g}{rise.unit} against the Teacher ({limit})"
        if value.low is None or value.high is None:
            checks.append((UNDECIDED, f"{text}; {value.groups} scene gives no interval"))
        elif value.high <= most:
            checks.append((True, text))
        elif value.low > most:
            checks.append((False, text))
        else:
            checks.append((UNDECIDED, f"{text}; {value.groups} scenes give {value.low:.3g} to {value.high:.3g}"))
    return checks


def _speed(speed: Interval | None, least: float, words: Callable[[float], str], asked: str, untimed: str) -> Check:
    """Checks that a speedup is at least `least`. words: describes the median speedup."""
    if speed is None:
        return None, f"compiled, not timed: {untimed}"
    text = f"{words(speed.value)} ({asked})"
    if speed.low is None or speed.high is None:
        return UNDECIDED, f"{speed.groups} rounds give no interval: {text}"
    if speed.low >= least:
        return True, text
    if speed.high < least:
        return False, text
    return UNDECIDED, f"{text}; {speed.groups} rounds give a speedup of {speed.low:.3g} to {speed.high:.3g}x"


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
    """Returns '57.1 % below' or '33.0 % above'."""
    return f"{abs(reduction_pct):.1f} % {'below' if reduction_pct >= 0 else 'above'}"


WRONG_PCT = 10.0
"""Drop of a float precision against f32 of the same network, in percent, above which it is not only coarser."""


def wrongly_computed(precision: str, drop_pct: Interval | None) -> str | None:
    """Returns a warning where a float precision loses more than `WRONG_PCT` for sure against the network's own f32."""
    if drop_pct is None or (drop_pct.low if drop_pct.low is not None else drop_pct.value) <= WRONG_PCT:
        return None
    return (
        f"{precision} drops {drop_pct.value:.1f} % against f32 of the same network: this is no rounding, the runtime "
        f"computes it wrongly here; int8 leaves its rest in {precision}, too, and --set quant.float_rest=f32 in f32"
    )
