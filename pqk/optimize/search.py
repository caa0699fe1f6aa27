"""Finds the fastest recipe of a model within a drop, verifies it on test samples once, and exports it: `pqk optimize`.

Every measurement is an artifact of the store, so a search that was killed goes on where it was. All choices use
validation samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.base import BackendError
from pqk.bench.predict_speed import ERROR_PCT, Predictor, Unpredictable
from pqk.errors import NotBuilt, PqkError
from pqk.export.export import export
from pqk.export.target import target_of
from pqk.measure.scores import drop_of
from pqk.optimize.points import LETTERS, Found, Point, Skipped, Status, front, needless, points_of, too_slow
from pqk.recipe.candidate import Candidate, make
from pqk.recipe.columns import interval_of
from pqk.recipe.reduce import check_reducing
from pqk.recipe.request import Request, asked_experiment, chosen_quantizer, usable_backend
from pqk.recipe.runner import run
from pqk.recipe.training import check_family
from pqk.recipe.verdict import UNDECIDED, judge_drop
from pqk.settings.evaluation import Thresholds
from pqk.settings.recipe import quantizes
from pqk.stats.latency import speedup
from pqk.store.store import OnEvent

CARD = "AUTO"
_LIMITS = ("quality_drop_mainline_pct", "quality_drop_q_only_pct", "quality_drop_p_only_pct")
_MOST = {True: 10.0, False: 1.5}
"""How many times as fast as its FLOPs say a recipe can be, quantized or not: AMX multiplies int8 nine times as fast as
f32. What is above is measured again.
"""
_BETTER = -2.0  # percent: a drop whose whole interval lies below is more than noise, and no recipe makes a model better


@dataclass(frozen=True)
class Optimized:
    """What `pqk optimize` found.

    verdict: accept, regression, undecided, anomalous or infeasible; why: a sentence for each reason. skipped: points
    that were not measured, and why. final: the winner's record on test samples. bundle: the exported folder.
    """

    model: str
    backend: str
    metric: str
    max_drop: float
    guard_limit: float
    found: Sequence[Found]
    skipped: Sequence[Skipped]
    winner: Found | None
    final: dict[str, Any] | None
    verdict: str
    why: Sequence[str]
    bundle: Path | None
    seconds: float


def optimize(
    request: Request,
    letters: Sequence[str] | None,
    max_drop: float,
    budget_s: float,
    out: Path | None,
    decide: int | None,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
) -> Optimized:
    """Measures recipes out of `letters` on validation samples, and takes the fastest one within the limits.

    letters: None: all that the family and the backend have. budget_s: no point is begun after these seconds; one that
    was begun is finished. out: folder of the export; None: none is written. decide: see `pqk.recipe.runner.run`.
    Raises PqkError before anything long for a letter that is impossible, and for engines that are emulated: they have
    no times.
    """
    began = time.monotonic()
    if out is not None:
        target_of(out)
    asked, skipped = _letters(request, letters, root)
    thresholds = asked_experiment(request, root).evaluation.thresholds
    most = thresholds.guard_drop_pct
    known: dict[Point, Found] = {}
    best: Found | None = None
    candidate: Candidate | None = None
    predictor = _predictor(request, root, on_event, say)
    for point in points_of(asked):
        status, foretold = Status.NEEDLESS, None
        reason = needless(point, known, best, max_drop, most)
        if reason is None and time.monotonic() - began > budget_s:
            status, reason = Status.NO_BUDGET, "the budget is used up"
        if reason is None and predictor is not None:
            foretold = _foretold(predictor, request, point, root, say)
            status, reason = Status.RULED_OUT, too_slow(foretold, best, ERROR_PCT)
            if reason is not None and predictor.disturbed:
                say(f"{point.name}: {reason}, but its parts were timed while other processes used the cores: measured")
                reason = None
        if reason is not None:
            skipped.append(Skipped(point, status, reason, foretold))
            say(f"{point.name}: not measured, {status}: {reason}")
            continue
        say(f"{point.name}:" + ("" if foretold is None else f" {foretold:.2f}x of f32 is predicted"))
        candidate = make(_at(request, point), root, on_event, say).candidate
        if candidate.trained and candidate.trained[-1].failed:
            skipped.append(Skipped(point, Status.STOPPED, str(candidate.trained[-1].reason), foretold))
            continue
        known[point] = replace(_measured(point, candidate), foretold=foretold)
        if _faster(best, known[point], max_drop, most):
            best = known[point]
        say(_line(known[point], best is known[point]))
        for line in _front_lines(list(known.values()), max_drop, most):
            say(line)
    final, verdict, why, bundle = None, "infeasible", [_none_within(known, max_drop, most)], None
    if best is not None:
        final, verdict, why = _verified(request, best, max_drop, thresholds, root, on_event, say, decide)
        if out is not None and verdict != "anomalous":
            precision = None if quantizes(best.point.letters) else "f32"  # what was judged
            bundle = export(_at(request, best.point), precision, out, root, on_event, say, rollback=False)
    metric = candidate.metric if candidate else ""
    name = candidate.teacher.name if candidate else str(request.model)
    seconds = time.monotonic() - began
    return Optimized(
        name,
        request.backend,
        metric,
        max_drop,
        most,
        list(known.values()),
        skipped,
        best,
        final,
        verdict,
        why,
        bundle,
        seconds,
    )


def _letters(request: Request, asked: Sequence[str] | None, root: Path) -> tuple[list[str], list[Skipped]]:
    """Returns the letters to use, and those that are impossible here with the reason.

    Raises the reason where the user asked for such a letter.
    """
    experiment = asked_experiment(request, root)
    backend = usable_backend(request.backend)
    possible: list[str] = []
    skipped: list[Skipped] = []
    for letter in LETTERS if asked is None else asked:
        if letter not in LETTERS:
            raise PqkError(f"--letters must hold letters out of {', '.join(LETTERS)}, and {letter!r} is not one")
        try:
            check_family(experiment, (letter,))
            check_reducing(experiment.family, experiment.card.id, (letter,))
            if letter == "Q":
                chosen_quantizer(backend, request.quantizer, experiment.quant.ptq)
        except (NotBuilt, PqkError) as error:
            if asked is not None:
                raise
            skipped.append(Skipped(Point((letter,)), Status.IMPOSSIBLE, str(error)))
            continue
        if letter in possible:
            raise PqkError(f"--letters holds {letter} twice")
        possible.append(letter)
    if not possible:
        raise PqkError(f"no letter can be used here: {skipped[0].why}")
    return possible, skipped


def _predictor(request: Request, root: Path, on_event: OnEvent, say: Callable[[str], None]) -> Predictor | None:
    """Returns what predicts the speeds of points; None, and says why, where nothing does."""
    try:
        return Predictor(request, root, on_event, say)
    except Unpredictable as error:
        say(str(error))
        return None


def _foretold(
    predictor: Predictor, request: Request, point: Point, root: Path, say: Callable[[str], None]
) -> float | None:
    """Returns the predicted speed of a point against the Teacher in f32; None, and says why, where there is none."""
    try:
        return predictor.speedup(asked_experiment(_at(request, point), root))
    except (Unpredictable, BackendError) as error:
        say(f"{point.name}: no prediction, {error}")
        return None


def _at(request: Request, point: Point) -> Request:
    """Returns the request that makes a point."""
    quantizer = request.quantizer if quantizes(point.letters) else None
    settings = {**point.settings, **request.settings}
    return replace(request, stages=point.letters, settings=settings, quantizer=quantizer, qat=False)


def _measured(point: Point, candidate: Candidate) -> Found:
    """Scores and times a candidate beside the Teacher. Raises PqkError where it has no drop, or no times."""
    variant, first = candidate.variants[-1], candidate.variants[0]
    teachers = [one for one in candidate.variants if one.hashes == first.hashes]
    mine, teacher = candidate.score(variant), candidate.score(first)
    if mine["measured"] == "emulated":
        raise PqkError("pqk optimize needs times, but these engines are emulated: they have none")
    metrics = candidate.experiment.metrics
    drop = drop_of(candidate.experiment.metric, mine, teacher, candidate.decides)
    if drop is None:
        raise PqkError(f"pqk optimize needs a drop, and {candidate.metric} gives none here")
    guards = {
        name: lost
        for name in candidate.experiment.evaluation.quality.metrics
        if metrics[name].guard and name != candidate.metric
        if (lost := drop_of(metrics[name], mine, teacher, candidate.decides)) is not None
    }
    samples = {name: row["sample"] for name, row in candidate.time([*teachers, variant])["variants"].items()}
    faster = min((speedup(samples[v.name], samples[variant.name]) for v in teachers), key=lambda ratio: ratio.value)
    against = speedup(samples[teachers[0].name], samples[variant.name])
    return Found(point, drop, against, faster, guards, statistics.median(samples[variant.name]))


def _faster(best: Found | None, found: Found, max_drop: float, most: float) -> bool:
    """Returns whether a point within the limits is faster than float, and than the best one so far."""
    if not found.within(max_drop, most) or found.faster.value <= 1:
        return False
    return best is None or found.speedup.value > best.speedup.value


def _line(found: Found, is_best: bool) -> str:
    half = f" ± {found.drop.half:.2f}" if found.drop.half is not None else ""
    ends = f" [{found.speedup.low:.2f}, {found.speedup.high:.2f}]" if found.speedup.low is not None else ""
    best = "; the best so far" if is_best else ""
    return f"{found.point.name}: drop {found.drop.value:+.2f}{half} %, {found.speedup.value:.2f}x{ends} of f32{best}"


def _front_lines(found: list[Found], max_drop: float, most: float) -> list[str]:
    """Returns the front in one line, for a reader who watches the search."""
    shown = [f"{one.point.name} {one.speedup.value:.2f}x {one.drop.value:+.2f} %" for one in front(found)]
    return [f"front: {'; '.join(shown)}"] if len(found) > 1 else []


def _none_within(known: Mapping[Point, Found], max_drop: float, most: float) -> str:
    if not known:
        return "nothing was measured within the budget"
    slow = [one for one in known.values() if one.within(max_drop, most)]
    if slow:
        fastest = max(slow, key=lambda one: one.faster.value)
        return f"within the limits nothing is faster than float: {fastest.point.name} has {fastest.faster.value:.2f}x"
    least = min(known.values(), key=lambda one: one.drop.value)
    return f"nothing is within a drop of {max_drop:g} %: {least.point.name} has the least, {least.drop.value:.2f} %"


def _verified(
    request: Request,
    best: Found,
    max_drop: float,
    thresholds: Thresholds,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
    decide: int | None,
) -> tuple[dict[str, Any], str, list[str]]:
    """Runs the winner whole, test samples included; returns its record, the verdict and its reasons."""
    say(f"{best.point.name} on the test samples")
    lines = {f"eval.thresholds.{name}": min(max_drop, getattr(thresholds, name)) for name in _LIMITS}
    whole = _at(request, best.point)
    whole = replace(whole, settings={**whole.settings, **lines})
    records = run(whole, root, on_event, say, decide=decide).records
    if strange := implausible(records):
        say(f"{strange}: measured again")
        records = run(replace(whole, retime=True), root, on_event, say, decide=decide).records
        if strange := implausible(records):
            return records[-1], "anomalous", [strange]
    return records[-1], *judge(records, max_drop)


def implausible(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns what of a run, Teacher first and candidate last, is faster or better than can be; None: nothing."""
    teacher, mine = records[0], records[-1]
    drop, fast = interval_of(mine, "quality_drop_pct"), mine["speedup_vs_teacher_f32"]
    bound = _MOST[mine["precision"] not in ("f32", "bf16", "f16")] * teacher["flops_G"] / mine["flops_G"]
    if fast is not None and fast > bound:
        return f"{fast:.2f}x is faster than its FLOPs can be ({bound:.1f}x)"
    if drop is not None and drop.high is not None and drop.high < _BETTER:
        return f"a drop of {drop.value:.2f} % is better than the Teacher by more than its noise"
    return None


def judge(records: Sequence[Mapping[str, Any]], max_drop: float) -> tuple[str, list[str]]:
    """Returns accept, regression or undecided with a sentence for each limit, for a run's records, candidate last.

    Judged are its drop, its speed against the Teacher's best float precision, and the guard metrics of its own verdict.
    """
    mine = records[-1]
    checks = [judge_drop(interval_of(mine, "quality_drop_pct"), max_drop)]
    if mine["samples"]:
        floats = [record["samples"]["pair"] for record in records if record["role"] == "teacher"]
        ratios = [speedup(times, mine["samples"]["pair"]) for times in floats]
        faster = min(ratios, key=lambda ratio: ratio.value)
        text = f"{faster.value:.2f}x the speed of the Teacher's best float precision (faster)"
        known = faster.low is not None and faster.high is not None
        checks.append((UNDECIDED if not known or faster.low <= 1 < faster.high else faster.low > 1, text))  # type: ignore[operator]
    marks = {True: "ok", False: "FAILED", UNDECIDED: UNDECIDED, None: "?"}
    reasons = [f"{marks[ok]}: {text}" for ok, text in checks]
    reasons += [reason for reason in mine["verdict_reasons"] or () if ": guard metric: " in reason]
    if any(reason.startswith("FAILED") for reason in reasons):
        return "regression", reasons
    return ("undecided" if any(reason.startswith((UNDECIDED, "?")) for reason in reasons) else "accept"), reasons
