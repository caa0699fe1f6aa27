"""Whether a candidate met the evaluation's thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pqk.spec.evaluation import Thresholds


@dataclass(frozen=True)
class Measured:
    """What the thresholds look at; None is what was not measured."""

    drop_pct: float | None
    speedup_vs_own_f32: float | None
    speedup_vs_best_float: float | None
    size_ratio: float
    int8_share: float | None


Verdict = tuple[str | None, list[str]]
Check = tuple[bool | None, str]


def judge_quantized(
    measured: Measured, limits: Thresholds, recipe: Sequence[str] = ("Q",), precision: str = "int8"
) -> Verdict:
    """('pass' | 'fail' | None, one sentence per threshold). None when a column that decides was not measured.

    Success of quantization: drop, median time against fp32 and best float, size, share of FLOPs in kernels of the
    `precision` that was asked for. Where only weights are lowered (int4) all work is done in floats: no share is asked.
    """
    checks = [_drop(measured.drop_pct, drop_limit(recipe, limits))]
    reduction = limits.t_pair_p50_reduction_pct
    speedup = measured.speedup_vs_own_f32
    checks.append(
        (None, "compiled, not timed: there is no t_pair to judge")
        if speedup is None
        else (
            1 - 1 / speedup >= reduction / 100,
            f"t_pair p50 {_against(100 * (1 - 1 / speedup))} fp32 (at least {reduction:g} % below)",
        )
    )
    slack = limits.not_slower_than_best_float_pct
    against = measured.speedup_vs_best_float
    allowed = f"at most {slack:g} % slower" if slack else "not slower"
    checks.append(
        (None, "compiled, not timed: there is no float precision to compare with")
        if against is None
        else (1 / against <= 1 + slack / 100, f"{against:.2f}x the speed of the best float precision ({allowed})")
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
    return _verdict(checks)


def judge_float(drop_pct: float | None, size_ratio: float, limits: Thresholds, recipe: Sequence[str]) -> Verdict:
    """The same for a recipe without quantization: the drop and, where it prunes, the size against the Teacher's."""
    checks = [_drop(drop_pct, drop_limit(recipe, limits))]
    if "P" in recipe:
        smaller, least = 100 * (1 - size_ratio), limits.size_reduction_p_only_pct
        checks.append((smaller >= least, f"files {smaller:.1f} % smaller (at least {least:g} %)"))
    return _verdict(checks)


def drop_limit(recipe: Sequence[str], limits: Thresholds) -> float:
    """The drop in percent that a recipe may have: P alone and Q alone have lines of their own."""
    own = {"Q": limits.quality_drop_q_only_pct, "P": limits.quality_drop_p_only_pct}
    return own.get("→".join(recipe), limits.quality_drop_mainline_pct)


def _drop(drop: float | None, limit: float) -> Check:
    if drop is None:
        return None, f"the quality drop was not measured (limit {limit:g} %)"
    return drop <= limit, f"quality drop {drop:.4g} % (at most {limit:g} %)"


def _verdict(checks: Sequence[Check]) -> Verdict:
    sentences = [f"{'?' if ok is None else 'ok' if ok else 'FAILED'}: {text}" for ok, text in checks]
    if any(ok is False for ok, _ in checks):
        return "fail", sentences
    return (None if any(ok is None for ok, _ in checks) else "pass"), sentences


def _against(reduction_pct: float) -> str:
    """'57.1 % below' or '33.0 % above'."""
    return f"{abs(reduction_pct):.1f} % {'below' if reduction_pct >= 0 else 'above'}"
