"""Compares the outputs of one recipe on every toolchain, with a verdict per level: `pqk parity CARD`.

Three levels, from the strictest comparison to the loosest:

1. float: the float graph on every runtime against the model in torch. A difference is a bug of export or runtime.
2. shared: one Q/DQ graph on every runtime that can run it. Elementwise they differ, because roundings flip; quality
   over many pairs and the mean error against f32 must agree.
3. recipe: each backend's own quantizers. Their quality must agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backends import registry
from backends.base import BackendError, Precision
from backends.cpu import saturates
from backends.qdq import with_half_range
from pqk.engines.variant import Variant, graphs_to_json
from pqk.errors import PqkError, nearest
from pqk.files import write_json
from pqk.measure.scores import drop_of
from pqk.recipe import stages
from pqk.recipe.candidate import Candidate
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.runner import run
from pqk.report.cells import value_of
from pqk.settings.evaluation import Parity
from pqk.settings.recipe import quantizes
from pqk.stats.intervals import groups_to_decide, within
from pqk.store import worker
from pqk.store.store import OnEvent

_CODE = ("pqk.measure.output_difference",)
RUNTIME = "reference"  # ONNX Runtime: reads every ONNX graph, and belongs to no toolchain


Heads = Mapping[str, Mapping[str, float | None]]  # see `pqk.measure.similarity.HeadAgreement`


@dataclass(frozen=True)
class Row:
    """One side of one level: its record, or None, and the comparison of its outputs with those of `against`."""

    level: str
    side: str  # such as 'openvino/nncf int8'
    against: str | None = None
    record: Mapping[str, Any] | None = None
    heads: Heads | None = None
    metric: float | None = None  # the main metric over all test pairs
    metric_drop_pct: float | None = None
    note: str | None = None  # why there is no result, or a remark


VERDICTS = ("not compared", "agree", "undecided", "differ")
"""From the best to the worst."""


@dataclass
class Verdict:
    """The verdict of a level: agree, differ, undecided or 'not compared', with a sentence per comparison."""

    level: str
    verdict: str = "not compared"
    sentences: list[str] = field(default_factory=list)

    def judge(self, ok: bool | None, sentence: str) -> None:
        """Adds one comparison, None: undecided. The worst of all is the verdict."""
        word, verdict = {True: ("ok", "agree"), None: ("undecided", "undecided"), False: ("DIFFERS", "differ")}[ok]
        self.sentences.append(f"{word}: {sentence}")
        self.verdict = max(self.verdict, verdict, key=VERDICTS.index)


@dataclass(frozen=True)
class Result:
    """The rows, verdicts and explanation that `pqk parity` prints and writes."""

    card: str
    rows: list[Row]
    verdicts: list[Verdict]
    metric: str
    candidates: Mapping[tuple[str, str], Candidate] = field(default_factory=dict)  # (backend, quantizer) -> its run
    explanation: Mapping[str, Mapping[str, Any]] | None = None  # see `pqk.parity.explain.explain_all`


def parity(
    request: Request,
    backends: list[str],
    quantizers: list[str] | None,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
) -> Result:
    """Runs (or reuses) the card on each backend with its default quantizer, or those of `quantizers`, and compares.

    `request.backend` and `request.quantizer` are not used. A backend that cannot run, or a quantizer that fails, is a
    row with the reason. Raises PqkError for unknown names, an invalid card, and when no side could be run.
    """
    offered = check_names(backends, quantizers)
    card = asked_experiment(request, root).card  # reports a mistake in card or configs once, not once per side
    candidates: dict[tuple[str, str], Candidate] = {}
    missing: list[Row] = []
    for backend in backends:
        found = registry.get(backend).availability()
        if not found.available:
            missing.append(Row("recipe", backend, note=f"unavailable: {found.reason}; {found.remedy}"))
            continue
        if not offered[backend]:
            missing.append(Row("recipe", backend, note="it has no quantizer"))
        wanted = quantizers or offered[backend][:1]
        sides: list[str | None] = [q for q in offered[backend] if q in wanted]
        for quantizer in sides if quantizes(card.recipe) else [None]:  # a float recipe is compared as it is
            say(f"{request.card} on {backend}" + (f" with {quantizer}" if quantizer else ""))
            try:
                candidate = run(replace(request, backend=backend, quantizer=quantizer), root, on_event, say)
            except (BackendError, PqkError, worker.WorkerCrashed) as error:
                why = f"failed: {str(error).strip().splitlines()[-1]}"
                missing.append(Row("recipe", f"{backend}/{quantizer or 'float'}", note=why))
                continue
            candidates[backend, quantizer or "float"] = candidate
    if not candidates:
        raise PqkError("no side could be run: " + "; ".join(f"{row.side}: {row.note}" for row in missing))
    compare = _Comparer(next(iter(candidates.values())))
    rows, verdicts = [], []
    for level in (_float_level, _shared_level, _recipe_level):
        made, verdict = level(candidates, compare)
        rows += made
        verdicts.append(verdict)
    return Result(card.id, rows + missing, verdicts, compare.metric, candidates)


def check_names(backends: list[str], quantizers: list[str] | None) -> dict[str, list[str]]:
    """Returns the quantizers that each backend offers. Raises PqkError for an unknown name."""
    known = registry.names()
    for name in backends:
        if name not in known:
            raise PqkError(f"unknown backend {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    offered = {name: list(registry.get(name).quantizers()) for name in backends}
    every = sorted({q for listed in offered.values() for q in listed})
    for name in quantizers or []:
        if name not in every:
            raise PqkError(
                f"unknown quantizer {name!r}{nearest(name, every)}; {', '.join(backends)} have {', '.join(every)}"
            )
    return offered


class _Comparer:
    """Comparisons on the same validation pairs, from the store; all candidates share scenes, model and evaluation."""

    def __init__(self, any_candidate: Candidate) -> None:
        self.candidate = any_candidate
        self.limits: Parity = any_candidate.experiment.evaluation.parity
        self.metric: str = any_candidate.experiment.evaluation.quality.main_metric

    def heads(self, base: Variant | None, others: Sequence[Variant]) -> list[Heads]:
        """Returns the agreement of each of `others` with `base`; base None is the model in torch."""
        ctx, experiment, found = self.candidate.ctx, self.candidate.experiment, self.candidate.validation
        request = {"count": self.limits.pairs}
        if not others:
            return []

        def make(folder: Path) -> None:
            asked = {
                "base": {"variant": base.to_json()} if base else {"torch": self.candidate.model},
                "others": [{"variant": other.to_json()} for other in others],
                **experiment.fed,
                "samples": found.to_json(),
                **request,
            }
            write_json(folder / "agreement.json", worker.call("agreement", asked))

        names = ", ".join(f"{other.backend} {other.name}" for other in others)
        label = f"{names} with {f'{base.backend} {base.name}' if base else 'torch'}"
        sources = stages.sources_of(base, *others) + (() if base else stages.LOADER_CODE)
        inputs = {
            "base": stages.identity(ctx, base, None) if base else {"torch": self.candidate.onnx_float.hashes},
            "others": [stages.identity(ctx, other, None) for other in others],
            "samples": found.key,
            **stages.fed_key(experiment),
            **request,
        }
        parts = stages.parts_code(experiment.family, "settings", "model", "data", "predict", "scoring")
        made = ctx.make("agreement", (*_CODE, *parts, *sources), inputs, make, label)
        heads: list[Heads] = json.loads((made.path / "agreement.json").read_text())["heads"]
        return heads

    def judge_metric(
        self, verdict: Verdict, limit: float, first: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
    ) -> None:
        """Judges how far the main metric of one side is from that of another, scored on the same samples.

        first, other: names and scores. The difference is in percent of `first`; its interval over groups must lie
        within `limit` for a pass and outside for a failure. Nothing is judged where the metric was not measured.
        """
        (name, base), (its, mine) = first, other
        a, b = base["summary"].get(self.metric), mine["summary"].get(self.metric)
        if a is None or b is None:
            return
        said = f"{self.metric}: {name} {a:.5g}, {its} {b:.5g}"
        if not a:
            verdict.judge(b == a, said)
            return
        gap = drop_of(self.candidate.experiment.metric, mine, base, truthful=True)
        assert gap is not None  # both were measured
        ok = within(gap, limit)
        said += f", {abs(gap.value):.2g} % apart"
        if gap.half is not None:
            said += f" ± {gap.half:.2g}"
        said += f" (at most {limit:g} %)"
        needed = groups_to_decide(replace(gap, value=abs(gap.value)), limit) if ok is None else None
        verdict.judge(ok, f"{said}; about {needed} scenes would decide" if needed else said)


Level = tuple[list[Row], Verdict]


def _float_level(candidates: Mapping[tuple[str, str], Candidate], compare: _Comparer) -> Level:
    """Compares every runtime's f32, and for information its faster float precisions, with torch."""
    verdict, rows = Verdict("float"), [Row("float", "torch f32", note="the model itself: base of this level")]
    plain = compare.candidate.onnx_float
    sides: dict[str, tuple[Variant, Mapping[str, Any] | None]] = {f"{RUNTIME} fp32": (plain, None)}
    for (backend, _), candidate in candidates.items():
        records = {v.name: r for v, r in zip(candidate.variants, candidate.records, strict=True)}
        for variant in candidate.floats():
            sides.setdefault(f"{backend} {variant.name}", (variant, records[variant.name]))
    found = compare.heads(None, [variant for variant, _ in sides.values()])
    for (name, (variant, known)), heads in zip(sides.items(), found, strict=True):
        rows.append(Row("float", name, "torch f32", known, heads, *_quality(known, compare.metric)))
        if variant.precision is Precision.F32:
            worst, error = _worst(heads)
            limit = compare.limits.float_relative
            verdict.judge(
                error <= limit, f"{name} is within {error:.1e} of torch, worst in {worst} (at most {limit:g})"
            )
    return rows, verdict


def _shared_level(candidates: Mapping[tuple[str, str], Candidate], compare: _Comparer) -> Level:
    """Compares ONNX Runtime with every other ONNX reader on one Q/DQ graph: quality, and error against f32."""
    verdict = Verdict("shared")
    shared = next(
        (
            (key, v)
            for key, candidate in candidates.items()
            for v in candidate.variants
            if v.precision is Precision.INT8 and all(g.format == "onnx" for g in v.graphs.values())
        ),
        None,
    )
    if shared is None:
        verdict.sentences.append("no quantizer that ran here writes a Q/DQ ONNX graph (modelopt does: backend trt)")
        return [Row("shared", "–", note=verdict.sentences[0])], verdict
    (owner, tool), graph = shared
    note = f"graph of {owner}/{tool}"
    less = _half_range(compare.candidate, graph) if saturates() else None
    if less is not None:  # ONNX Runtime's and OpenVINO's int8 kernels saturate differently
        graph, note = less, f"{note}, its weights at 7 of their 8 bits: int8 sums saturate on this CPU (no VNNI)"
        verdict.sentences.append(
            "weights have 7 bits here, as int8 sums saturate on this CPU in each runtime otherwise"
        )
    # Where a runtime of ours reads ONNX: the reference, and openvino when it took part. trt without a GPU computes by
    # the reference itself, so it would only be compared with itself.
    readers = [RUNTIME, *(name for name in ("openvino",) if registry.get(name).availability().available)]
    sides = {name: Variant("int8", name, Precision.INT8, graph.graphs, {}) for name in readers}
    if "openvino" in sides:
        sides["openvino"] = replace(sides["openvino"], options={"rest": "f32"})
    float_side = compare.candidate.onnx_float
    errors, scores, rows = {}, {}, []
    for (name, variant), heads in zip(sides.items(), compare.heads(float_side, list(sides.values())), strict=True):
        errors[name] = sum(_relative(head) for head in heads.values()) / len(heads)
        scores[name] = compare.candidate.score(variant, ())
        metric = scores[name]["summary"].get(compare.metric)
        rows.append(Row("shared", f"{name} int8", f"{RUNTIME} fp32", None, heads, metric, None, note))
    for name in readers[1:]:
        limits = compare.limits
        gap = _gap_pct(errors[RUNTIME], errors[name])
        verdict.judge(
            gap <= limits.shared_error_pct,
            f"mean error against f32: {RUNTIME} {errors[RUNTIME]:.3g}, {name} {errors[name]:.3g}, "
            f"{gap:.2g} % apart (at most {limits.shared_error_pct:g} %)",
        )
        compare.judge_metric(verdict, limits.shared_metric_pct, (RUNTIME, scores[RUNTIME]), (name, scores[name]))
    if len(readers) == 1:
        verdict.sentences.append("only one runtime here reads the graph")
    return rows, verdict


def _half_range(candidate: Candidate, variant: Variant) -> Variant | None:
    """Returns Q/DQ graphs with weights of 7 bits, None where all have them already."""

    def make(folder: Path) -> None:
        made = {name: with_half_range(graph, folder) for name, graph in variant.graphs.items()}
        stages.keep_graphs(folder, graphs_to_json({name: graph for name, graph in made.items() if graph}))

    made = candidate.ctx.make("half_range", ("backends.qdq",), {"graphs": variant.hashes}, make)
    changed = stages.read_graphs(made.path)
    return replace(variant, graphs={**variant.graphs, **changed}) if changed else None


def _recipe_level(candidates: Mapping[tuple[str, str], Candidate], compare: _Comparer) -> Level:
    """Compares the candidates of all quantizers with the first of them."""
    verdict, rows = Verdict("recipe"), []
    variants = [candidate.variants[-1] for candidate in candidates.values()]
    against = [None, *compare.heads(variants[0], variants[1:])]
    first: tuple[str, dict[str, Any]] | None = None
    for ((backend, quantizer), candidate), heads in zip(candidates.items(), against, strict=True):
        record = candidate.records[-1]
        name = f"{backend}/{quantizer} {record['precision']}"
        metric, drop = _quality(record, compare.metric)
        note = "emulated by ONNX Runtime, not timed" if record["measured"] == "emulated" else None
        rows.append(Row("recipe", name, first[0] if first else None, record, heads, metric, drop, note))
        if metric is not None and len(candidates) > 1:
            scored = (name, candidate.score(candidate.variants[-1], on=candidate.test))
            if first is not None:
                compare.judge_metric(verdict, compare.limits.recipe_metric_pct, first, scored)
            first = first or scored
    if len(candidates) == 1:
        verdict.sentences.append("only one quantizer ran")
    return rows, verdict


def _quality(record: Mapping[str, Any] | None, metric: str) -> tuple[float | None, float | None]:
    return (value_of(record, metric), record["quality_drop_pct"]) if record else (None, None)


def _worst(heads: Heads) -> tuple[str, float]:
    worst = max(heads, key=lambda head: _relative(heads[head]))
    return worst, _relative(heads[worst])


def _relative(head: Mapping[str, float | None]) -> float:
    """Returns the relative error of a head; infinity where it is None, because the reference is 0."""
    value = head["relative"]
    return math.inf if value is None else value


def _gap_pct(a: float, b: float) -> float:
    """Returns the difference in percent of the first; 0 when both are 0."""
    return 100 * abs(b - a) / abs(a) if a else (0.0 if b == a else math.inf)
