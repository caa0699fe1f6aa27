"""Compares methods of rounding weights, `study_methods`: rows are methods, columns are bits.

The model is scored on the workload's test samples in torch, twice: against ground truth (the drop), and against its own
float predictions (the error). A drop holds the float model's own mistakes, which rounding may undo by chance; the error
holds those of rounding alone, so it tells methods apart on far fewer samples. W8A8 and W4A4 round the inputs of linear
layers as well, in float: these columns are emulated. Methods that learn from data see calibration samples, never test
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pqk.compress.weights.activations import Activations
from pqk.compress.weights.methods.inputs import Inputs, capture
from pqk.compress.weights.methods.method import Method
from pqk.compress.weights.model import QuantizedWeights, quantize_weights, quantized_model
from pqk.compress.weights.quantizers import as_matrix
from pqk.compress.weights.schemes import Scheme
from pqk.engines.calls import in_torch
from pqk.errors import PqkError, nearest
from pqk.families.contract import Call, Family, Given, Metric, Sample
from pqk.measure.scores import drop_of
from pqk.recipe.request import Request, asked_experiment, context, load_teacher, usable_backend
from pqk.recipe.stages import open_split
from pqk.settings.workload import Workload
from pqk.stats.intervals import Interval, difference_interval, drop_interval
from pqk.store.store import OnEvent
from pqk.study.weights.run import Bench, main_metric, opened_bench, predicted, scores_of

GROUP = 64
LEFT_OUT = "gptq, special tokens left out"


@dataclass(frozen=True)
class Column:
    """Bits of weights and of inputs (None: float)."""

    name: str
    scheme: Scheme
    inputs: int | None

    @property
    def emulated(self) -> bool:
        """Returns whether inputs are rounded in float: no kernel computes this here."""
        return self.inputs is not None


COLUMNS = (
    Column("W8A8", Scheme(8, True, "channel"), 8),
    Column("W4A16", Scheme(4, True, "group", GROUP), None),
    Column("W4A4", Scheme(4, True, "group", GROUP), 4),
)
FINER = Column("W4A16-32", Scheme(4, True, "group", 32), None)
"""Computed only where it is asked for."""
METHODS: Mapping[str, str] = {
    "round to nearest": "rtn",
    "SmoothQuant": "smooth",
    "Hadamard rotation": "hadamard",
    "AWQ": "awq",
    "GPTQ": "gptq",
    LEFT_OUT: "gptq",
    "Hadamard + GPTQ": "hadamard+gptq",
}
"""Rows of the table -> the words of `Method`."""


@dataclass(frozen=True)
class Cell:
    """A method at some bits; all intervals are over scenes. `gain` and `closer` are None in the first row.

    drop: of the main metric against the float model, in percent. gain: the drop of rounding to nearest minus this
    one's, in points of percent, paired by sample. error: the main metric with the float model's prediction as the
    truth, its distance from the perfect value in percent; None where that is undefined. closer: by how many percent the
    error is smaller than that of rounding to nearest, paired by sample. weights: the error of all rounded weights as
    one vector, a ratio. layers: see `layers_error`.
    """

    method: str
    column: str
    drop: Interval | None
    gain: Interval | None
    error: Interval | None
    closer: Interval | None
    weights: float
    layers: float

    def to_json(self) -> dict[str, Any]:
        found = {name: _plain(getattr(self, name)) for name in ("drop", "gain", "error", "closer")}
        named = {f"{name}_pct": interval for name, interval in found.items()}
        errors = {"weights_error": self.weights, "layers_error": self.layers}
        return {"method": self.method, "column": self.column, **named, **errors}


@dataclass(frozen=True)
class _Scored:
    """The scores of a method against ground truth and against the float model, and the errors that cause them."""

    truth: Mapping[str, Any]
    floats: Mapping[str, Any]
    weights: float
    layers: float


def chosen_columns(names: Sequence[str]) -> list[Column]:
    """Returns the columns of these names, `COLUMNS` without any. Raises PqkError for an unknown one."""
    known = {column.name: column for column in (*COLUMNS, FINER)}
    for name in names:
        if name not in known:
            raise PqkError(f"unknown column {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or list(COLUMNS)


def chosen_rows(words: Sequence[str]) -> list[str]:
    """Returns rounding to nearest and the rows of `METHODS` with these words; all without any.

    left_out is the word of the row that leaves special tokens out. Raises PqkError for an unknown one.
    """
    known = {"left_out" if row == LEFT_OUT else word: row for row, word in METHODS.items()}
    for word in words:
        if word not in known:
            raise PqkError(f"unknown row {word!r}{nearest(word, known)}; known are {', '.join(known)}")
    first, *others = METHODS
    asked = {known[word] for word in words or known}
    return [first, *(row for row in others if row in asked)]


def study_methods(
    request: Request,
    root: Path,
    samples: int,
    calibration: int,
    columns: Sequence[str],
    rows: Sequence[str],
    on_event: OnEvent,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the table as plain data: metric, samples, groups, calibration images, cells (of `Cell.to_json`).

    samples: largest number of test samples. calibration: images for the methods that learn. columns, rows: by name;
    none: see `chosen_columns` and `chosen_rows`. Raises PqkError as a run does.
    """
    asked, named = chosen_columns(columns), chosen_rows(rows)
    experiment = asked_experiment(request, root)
    ctx = context(request, usable_backend("onnxruntime"), root, on_event)
    _, model = load_teacher(request.model, root)
    model.eval()
    found = open_split(ctx, experiment, "test", root, Given(request.scenes))
    bench = opened_bench(experiment, model, found, samples, images=None)
    fed = open_split(ctx, experiment, "calibration", root)
    items = experiment.family.data_part().calibration(fed, experiment.workload, calibration)
    learned = {left: _inputs(bench, [items[k] for k in range(len(items))], left) for left in {False, LEFT_OUT in named}}
    cells: list[Cell] = []
    for column in asked:
        nearest: _Scored | None = None
        for name in named:
            say(f"{name}, {column.name}")
            scored = _scored(bench, column, Method(METHODS[name]), learned[name == LEFT_OUT])
            nearest = nearest or scored
            cells.append(_cell(bench, name, column, scored, nearest))
    return {
        "metric": main_metric(bench).name,
        "samples": bench.count,
        "groups": len({row["group"] for row in bench.scores["samples"]}),
        "calibration_images": items.images,
        "columns": {column.name: {"scheme": column.scheme.name, "emulated": column.emulated} for column in asked},
        "cells": [cell.to_json() for cell in cells],
    }


def methods_text(found: Mapping[str, Any]) -> str:
    """Returns the tables of drops, of errors and of their differences to rounding to nearest, as plain text.

    found: of `study_methods`. An asterisk marks a method that beats rounding to nearest for sure, a minus sign behind
    the interval one that is worse for sure.
    """
    metric, count = found["metric"], f"{found['samples']} samples of {found['groups']} scenes"
    parts = {
        f"Drop in {metric} against ground truth (%), {count}": lambda c: _text(c["drop_pct"], c["gain_pct"]),
        f"Error: {metric} with the float model's prediction as the truth (%), {count}": lambda c: _text(
            c["error_pct"], c["closer_pct"], signed=False
        ),
        "By how many % that error is smaller than that of rounding to nearest, paired by sample": lambda c: _text(
            c["closer_pct"], c["closer_pct"]
        ),
        "Error of the rounded weights themselves, as one vector (%)": lambda c: f"{100 * c['weights_error']:.2f} %",
        "Error of what layers compute of calibration inputs, mean (%)": lambda c: f"{100 * c['layers_error']:.2f} %",
    }
    lines = [line for head, text in parts.items() for line in (head, *_table(found, text), "")]
    lines.append(
        "* better than rounding to nearest for sure: the paired interval of the difference excludes 0; - worse"
    )
    return "\n".join(lines) + "\n"


def _table(found: Mapping[str, Any], text: Callable[[Mapping[str, Any]], str]) -> list[str]:
    from pqk.study.weights.text import table

    columns = list(found["columns"])
    cells = {(cell["method"], cell["column"]): cell for cell in found["cells"]}
    rows = list(dict.fromkeys(cell["method"] for cell in found["cells"]))
    heads = [f"{name}{' (emulated)' if found['columns'][name]['emulated'] else ''}" for name in columns]
    return table(["method", *heads], [[row, *(text(cells[row, name]) for name in columns)] for row in rows])


def _text(shown: Mapping[str, Any] | None, gain: Mapping[str, Any] | None, signed: bool = True) -> str:
    """Returns '+1.20 % [+0.90, +1.50] *'. gain: of the paired difference, positive is better."""
    if shown is None:
        return "-"
    sign, mark = "+" if signed else "", ""
    if gain is not None and gain["low"] is not None:
        mark = " *" if gain["low"] > 0 else " -" if gain["high"] < 0 else ""
    ends = "" if shown["low"] is None else f" [{shown['low']:{sign}.2f}, {shown['high']:{sign}.2f}]"
    return f"{shown['value']:{sign}.2f} %{ends}{mark}"


def _plain(found: Interval | None) -> dict[str, float | None] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def _inputs(bench: Bench, items: Sequence[Sample], left_out: bool) -> dict[str, Inputs]:
    """Captures the inputs of the layers on calibration samples. left_out: as the family's `calibrated` says."""

    def run(model: nn.Module, sample: Sample) -> object:
        with _called(bench.of, model, bench.experiment.workload, left_out) as call:
            return bench.of.predict_part().predict(call, sample, bench.experiment.workload, 0)

    return capture(bench.model, items, run=run)


@contextmanager
def _called(of: Family, model: nn.Module, workload: Workload, left_out: bool) -> Iterator[Call]:
    calibrated = getattr(of.predict_part(), "calibrated", None) if left_out else None
    with in_torch(of.model_part().graphs(model, workload)) as engines:

        def call(graph: str, feeds: Mapping[str, Any], *, reuse: Any = None, stay: bool = False) -> dict[str, Any]:
            found = feeds if calibrated is None else calibrated(graph, feeds, {"special_tokens": "left_out"})
            return engines(graph, found, reuse=reuse, stay=stay)

        yield call


def _scored(bench: Bench, column: Column, method: Method, inputs: Mapping[str, Inputs]) -> _Scored:
    weights = quantize_weights(bench.model, column.scheme, method=method, inputs=inputs)
    asked = None if column.inputs is None else Activations(column.inputs)
    compute = "dequantized" if asked is None else "packed"
    model = quantized_model(bench.model, weights, compute, asked)  # type: ignore[arg-type]
    predictions = list(predicted(bench, model))
    truth = scores_of(bench, predictions)
    floats = scores_of(bench, predictions, truthful=False)
    return _Scored(truth, floats, weights.error(bench.model), layers_error(bench.model, weights, inputs))


def layers_error(model: nn.Module, weights: QuantizedWeights, inputs: Mapping[str, Inputs]) -> float:
    """Returns the mean over layers of the relative error of what a layer computes, by its rounded weight alone.

    inputs: x of the layers, as captured on calibration samples. The error of a layer is |x D^T| / |x W^T| over all of
    them, D the difference of its rounded weight and W, from their sum of x x^T.
    """
    found = []
    for layer, known in inputs.items():
        packed = weights.packed.get(f"{layer}.weight")
        if packed is None:
            continue
        weight = model.get_submodule(layer).weight.detach().float()  # type: ignore[operator]
        pair = [as_matrix(one, packed.axis) for one in (packed.dequantized() - weight, weight)]
        lost, total = (float(((one @ known.gram) * one).sum()) for one in pair)
        if total > 0:
            found.append(max(0.0, lost / total) ** 0.5)
    return sum(found) / len(found) if found else 0.0


def _cell(bench: Bench, name: str, column: Column, scored: _Scored, nearest: _Scored) -> Cell:
    metric = main_metric(bench)
    drop = drop_of(metric, scored.truth, bench.scores, bench.found.truthful)
    error = drop_of(metric, scored.floats, bench.scores, truthful=False)
    gain = None if drop is None or scored is nearest else _gain(bench, metric, scored.truth, nearest.truth)
    closer = None if error is None or scored is nearest else _closer(metric, scored.floats, nearest.floats)
    return Cell(name, column.name, drop, gain, error, closer, scored.weights, scored.layers)


def _gain(bench: Bench, metric: Metric, scores: Mapping[str, Any], nearest: Mapping[str, Any]) -> Interval | None:
    mine, theirs, base = ([row[metric.name] for row in each["samples"]] for each in (scores, nearest, bench.scores))
    groups = [row["group"] for row in scores["samples"]]
    return difference_interval(theirs, mine, base, groups, metric.better == "higher") if any(base) else None


def _closer(metric: Metric, scores: Mapping[str, Any], nearest: Mapping[str, Any]) -> Interval | None:
    mine, theirs = ([abs(row[metric.name] - metric.perfect) for row in each["samples"]] for each in (scores, nearest))
    if not any(theirs):
        return None
    return drop_interval(mine, theirs, [row["group"] for row in scores["samples"]], higher_is_better=True)
