"""Compares methods of rounding weights, `study_methods`: rows are methods, columns are bits, cells are drops.

The model is scored on the workload's test samples in torch. W8A8 and W4A4 round the inputs of linear layers as well, in
float: these columns are emulated. Methods that learn from data see calibration samples, never test ones.
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
from pqk.compress.weights.model import quantize_weights, quantized_model
from pqk.compress.weights.schemes import Scheme
from pqk.engines.calls import in_torch
from pqk.families.contract import Call, Family, Given, Sample
from pqk.measure.scores import drop_of
from pqk.recipe.request import Request, asked_experiment, context, load_teacher, usable_backend
from pqk.recipe.stages import open_split
from pqk.settings.workload import Workload
from pqk.stats.intervals import Interval, drop_interval
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
    """drop: of the main metric against the float model, in percent. gain: the drop of rounding to nearest minus this
    one's, in points of percent, paired by sample; None in the first row."""

    method: str
    column: str
    drop: Interval | None
    gain: Interval | None


def study_methods(
    request: Request, root: Path, samples: int, calibration: int, on_event: OnEvent, say: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the table as plain data: metric, samples, calibration images, cells.

    samples: largest number of test samples. calibration: images for the methods that learn. Raises PqkError as a run
    does.
    """
    experiment = asked_experiment(request, root)
    ctx = context(request, usable_backend("openvino"), root, on_event)
    _, model = load_teacher(request.model, root)
    model.eval()
    found = open_split(ctx, experiment, "test", root, Given(request.scenes))
    bench = opened_bench(experiment, model, found, samples, images=None)
    fed = open_split(ctx, experiment, "calibration", root)
    items = experiment.family.data_part().calibration(fed, experiment.workload, calibration)
    learned = {left: _inputs(bench, [items[k] for k in range(len(items))], left) for left in (False, True)}
    cells: list[Cell] = []
    for column in COLUMNS:
        nearest: Mapping[str, Any] | None = None
        for name, words in METHODS.items():
            say(f"{name}, {column.name}")
            scores = _scores(bench, column, Method(words), learned[name == LEFT_OUT])
            nearest = nearest or scores
            cells.append(_cell(bench, name, column, scores, nearest))
    return {
        "metric": main_metric(bench).name,
        "samples": bench.count,
        "calibration_images": items.images,
        "columns": {column.name: {"scheme": column.scheme.name, "emulated": column.emulated} for column in COLUMNS},
        "cells": [
            {"method": c.method, "column": c.column, "drop_pct": _plain(c.drop), "gain_pct": _plain(c.gain)}
            for c in cells
        ],
    }


def table_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the table as aligned lines; an asterisk marks a method that beats rounding to nearest for sure."""
    from pqk.study.weights.text import table

    columns = list(found["columns"])
    cells = {(cell["method"], cell["column"]): cell for cell in found["cells"]}
    rows = list(dict.fromkeys(cell["method"] for cell in found["cells"]))
    heads = [f"{name}{' (emulated)' if found['columns'][name]['emulated'] else ''}" for name in columns]
    return table(["method", *heads], [[row, *(_text(cells[row, name]) for name in columns)] for row in rows])


def _text(cell: Mapping[str, Any]) -> str:
    drop, gain = cell["drop_pct"], cell["gain_pct"]
    if drop is None:
        return "-"
    better = " *" if gain is not None and gain["low"] is not None and gain["low"] > 0 else ""
    ends = "" if drop["low"] is None else f" [{drop['low']:+.2f}, {drop['high']:+.2f}]"
    return f"{drop['value']:+.2f} %{ends}{better}"


def _plain(found: Interval | None) -> dict[str, float | None] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def _inputs(bench: Bench, items: Sequence[Sample], left_out: bool) -> dict[str, Inputs]:
    """Captures the inputs of the linear layers on calibration samples. left_out: as the family's `calibrated` says."""

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


def _scores(bench: Bench, column: Column, method: Method, inputs: Mapping[str, Inputs]) -> dict[str, Any]:
    weights = quantize_weights(bench.model, column.scheme, method=method, inputs=inputs)
    asked = None if column.inputs is None else Activations(column.inputs)
    compute = "dequantized" if asked is None else "packed"
    model = quantized_model(bench.model, weights, compute, asked)  # type: ignore[arg-type]
    return scores_of(bench, predicted(bench, model))


def _cell(bench: Bench, name: str, column: Column, scores: Mapping[str, Any], nearest: Mapping[str, Any]) -> Cell:
    metric = main_metric(bench)
    drop = drop_of(metric, scores, bench.scores, bench.found.truthful)
    if scores is nearest or drop is None:
        return Cell(name, column.name, drop, None)
    mine, theirs, base = ([row[metric.name] for row in each["samples"]] for each in (scores, nearest, bench.scores))
    groups = [row["group"] for row in scores["samples"]]
    # the difference of two drops over one base: sum(nearest - mine) / sum(base)
    shifted = [b + t - m for b, t, m in zip(base, theirs, mine, strict=True)]
    return Cell(name, column.name, drop, drop_interval(shifted, base, groups, metric.better == "higher"))
