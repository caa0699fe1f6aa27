"""Measures quality and time over a grid of settings, such as steps and precision: a table, CSV and a Pareto figure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pqk import paths
from pqk.errors import PqkError
from pqk.files import write_text
from pqk.measure.noise import disturbances
from pqk.recipe.candidate import Candidate
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.runner import run
from pqk.report.cells import DASH, csv_text
from pqk.report.style import BESIDE, MARKERS, PALETTE, blank_figure, logarithmic, write_figure
from pqk.stats.latency import percentile, speedup
from pqk.store import worker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
MODEL = "model"
"""The key of a point that is no setting."""
WHOLE = ("pair", "device")
"""Names in the raw samples of a record that are of a whole sample and not of one graph's calls."""


def bench_grid(
    card: str,
    backend: str,
    model: str | None,
    over: Mapping[str, Sequence[Any]],
    also: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    out: Path,
) -> list[Row]:
    """Runs a card for every combination of values, and shows the main metric, time and Pareto front of every row.

    over: settings and their values. also: more points, each settings and, under 'model', another model. At last all
    engines of all points are timed side by side in one process, so that their times may be compared; `speed` is the
    ratio to the first row, with its interval. `graphs`: median time of a call of each graph, and calls in a sample.
    `parts`: see `share_in_graphs`. Writes `out` (.csv) and a figure beside it; prints the table, with JSON as the last
    line. All points are read before the first run; when one fails later, the rows before it stay in `out`, with the
    times of their own runs. Raises PqkError for fewer than two points, and as `run` does.
    """
    points = [dict(zip(over, values, strict=True)) for values in product(*over.values())] + [dict(p) for p in also]
    if len(points) < 2 or len({json.dumps(point, sort_keys=True) for point in points}) < len(points):
        raise PqkError("bench grid needs at least two different combinations, such as --over SETTING=1,4")
    root = paths.project_root()
    requests = [
        Request(
            card,
            backend,
            model=point.get(MODEL, model),
            settings={**settings, **{name: value for name, value in point.items() if name != MODEL}},
            qat=False,
        )
        for point in points
    ]
    for request in requests:
        asked_experiment(request, root)
    names = list(dict.fromkeys(name for point in points for name in point))
    candidates: list[Candidate] = []
    rows: list[Row] = []
    for point, request in zip(points, requests, strict=True):
        try:
            candidates.append(run(request, root, lambda *_: None, print))
            rows += _rows({name: point.get(name) for name in names}, candidates[-1])
        except PqkError:
            if rows:
                print(f"{_told(point)} failed; the rows before it are in {paths.shown(out)}")
            raise
        write_text(out, csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))
    _time_together(rows, candidates)
    for row in rows:
        row["front"] = on_front(row, rows)
    write_text(out, csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))
    why = write_figure(out.with_suffix(".png"), lambda: _figure(rows, names))
    _print(rows, names)
    print(f"{paths.shown(out)}" + (f"; no figure: {why}" if why else f"\n{paths.shown(out.with_suffix('.png'))}"))
    print(json.dumps(rows))
    return rows


def _rows(point: Mapping[str, Any], candidate: Candidate) -> list[Row]:
    """Returns a row for each record of a run, with the times of that run. Raises PqkError for engines without times."""
    rows: list[Row] = []
    for record in candidate.records:
        if record["t_pair_p50_ms"] is None:
            raise PqkError("bench grid needs times, but these engines are emulated: they have none")
        metric = record["main_metric"]
        told = record["metrics"].get(metric, {})
        rows.append(
            {
                **point,
                "row": f"{record['role']} {record['precision']}",
                "metric": metric,
                "value": told.get("value"),
                "low": (told.get("interval") or [None, None])[0],
                "high": (told.get("interval") or [None, None])[1],
                "better": told.get("better"),
                **_times(record["samples"]),
                "speed": None,
                "speed_low": None,
                "speed_high": None,
                "size_MB": record["size_MB"],
                "disturbed": record["disturbed"],
                "front": None,
            }
        )
    return rows


def _times(samples: Mapping[str, Sequence[float]]) -> Row:
    """Returns the columns of raw samples: `p50_ms`, `graphs` and `parts`."""
    graphs = {
        name: {"p50_ms": percentile(times, 50), "calls": len(times) / len(samples["pair"])}
        for name, times in samples.items()
        if name not in WHOLE
    }
    return {"p50_ms": percentile(samples["pair"], 50), "graphs": graphs, "parts": share_in_graphs(samples)}


def _time_together(rows: Sequence[Row], candidates: Sequence[Candidate]) -> None:
    """Times the engines of all rows side by side, each fed by its own workload, and puts the times into the rows."""
    first = candidates[0].experiment
    named = [
        (replace(variant, name=f"{number} {variant.name}"), each.experiment.fed["workload"])
        for number, each in enumerate(candidates)
        for variant in each.variants
    ]
    efficiency = first.evaluation.efficiency
    print(f"timing {len(named)} engines side by side")
    found = worker.call(
        "timing",
        {
            **first.fed,
            "samples": candidates[0].validation.to_json(),
            "variants": [variant.to_json() for variant, _ in named],
            "workloads": [workload for _, workload in named],
            "efficiency": efficiency.model_dump(mode="json"),
            "groups": False,
        },
    )
    if disturbed := disturbances(found["timing"], efficiency.max_load, efficiency.max_drift_pct):
        print(f"warning: the timing was disturbed: {'; '.join(disturbed)}")
    base = found["variants"][named[0][0].name]["sample"]
    for number, (row, (variant, _)) in enumerate(zip(rows, named, strict=True)):
        timed = found["variants"][variant.name]
        ratio = speedup(base, timed["sample"])
        ends = ratio.ends() if number else None  # the first row is 1.00 times as fast as itself by definition
        low, high = ends or (None, None)
        row |= _times({"pair": timed["sample"], **timed["graphs"]})
        row |= {"speed": ratio.value, "speed_low": low, "speed_high": high, "disturbed": bool(disturbed)}


def share_in_graphs(samples: Mapping[str, Sequence[float]]) -> float | None:
    """Returns the share of a sample's time that passes in calls of its graphs: the median over rounds.

    What is missing to 1 is the work between the calls. samples: raw milliseconds of the samples under 'pair', and of
    every call by graph, in the order of the rounds. None where the rounds do not have equally many calls.
    """
    whole = np.asarray(samples["pair"])
    calls = [np.asarray(times) for name, times in samples.items() if name not in WHOLE]
    if any(len(times) % len(whole) for times in calls):
        return None
    inside = sum(times.reshape(len(whole), -1).sum(axis=1) for times in calls)
    return float(np.median(inside / whole))


def on_front(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other row is at least as good and as fast, and better in one of the two."""
    if row["value"] is None:
        return False
    sign = 1 if row["better"] == "higher" else -1

    def beats(other: Mapping[str, Any]) -> bool:
        good, fast = sign * (other["value"] - row["value"]), row["p50_ms"] - other["p50_ms"]
        return good >= 0 and fast >= 0 and (good > 0 or fast > 0)

    return not any(beats(other) for other in rows if other is not row and other["value"] is not None)


def _told(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in point.items())


def _print(rows: Sequence[Row], over: Sequence[str]) -> None:
    names = [name.rpartition(".")[2] for name in over]
    print(
        " ".join(f"{name:>8}" for name in names),
        f"{'row':16} {rows[0]['metric']:>8} {'p50 ms':>9} {'x first':>8} {'parts':>6} front",
    )
    for row in rows:
        marks = ("*" if row["front"] else "") + (" disturbed" if row["disturbed"] else "")
        values = " ".join(f"{_shown(row[name]):>8}" for name in over)
        parts = "     –" if row["parts"] is None else f"{row['parts']:6.2f}"
        times = f"{row['p50_ms']:9.1f} {row['speed']:8.2f}"
        value = "       –" if row["value"] is None else f"{row['value']:8.3f}"
        print(f"{values} {row['row']:16} {value} {times} {parts} {marks}".rstrip())


def _shown(value: Any) -> str:
    """Returns a value of a point; of a path only its name, without the digits of a checkpoint's hash."""
    return DASH if value is None else re.sub(r"-[0-9a-f]{8}$", "", str(value).rpartition("/")[2])


def _figure(rows: Sequence[Row], over: Sequence[str]) -> Figure:
    """Draws the metric over the time of a sample: a series for each row of the record, the front as a line."""
    figure, (axes,) = blank_figure(7, 4.2)
    front = sorted((row for row in rows if row["front"]), key=lambda row: row["p50_ms"])
    axes.plot([row["p50_ms"] for row in front], [row["value"] for row in front], color="0.7", zorder=1, label="front")
    for number, name in enumerate(dict.fromkeys(row["row"] for row in rows)):
        mine = [row for row in rows if row["row"] == name]
        colour, x = PALETTE[number % len(PALETTE)], [row["p50_ms"] for row in mine]
        faces = ["white" if row["disturbed"] else colour for row in mine]
        marker = MARKERS[number % len(MARKERS)]
        axes.scatter(x, [row["value"] for row in mine], c=faces, edgecolors=colour, marker=marker, label=name, zorder=2)
        for row in mine:
            if row["low"] is not None:
                axes.vlines(row["p50_ms"], row["low"], row["high"], color=colour, linewidth=1, alpha=0.6)
            text = ", ".join(_shown(row[each]) for each in over if row[each] is not None)
            beside = {"xytext": (-5, -9), "ha": "right"} if number % 2 else {"xytext": (5, 4)}
            axes.annotate(text, (row["p50_ms"], row["value"]), textcoords="offset points", fontsize=7, **beside)
    logarithmic(axes)
    axes.margins(x=0.14)
    hollow = "; hollow: disturbed" if any(row["disturbed"] for row in rows) else ""
    named = ", ".join(name.rpartition(".")[2] for name in over)
    axes.set_xlabel(f"median time of a sample (ms); labels: {named}{hollow}")
    axes.set_ylabel(rows[0]["metric"])
    axes.legend(**BESIDE)
    return figure
