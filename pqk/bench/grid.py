"""Measures quality and time over a grid of settings, such as steps and precision: a table, CSV and a Pareto figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.errors import PqkError
from pqk.files import write_text
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.runner import run
from pqk.report.cells import csv_text
from pqk.report.style import BESIDE, MARKERS, PALETTE, blank_figure, logarithmic, write_figure
from pqk.stats.latency import percentile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


def bench_grid(
    card: str,
    backend: str,
    model: str | None,
    over: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
    out: Path,
) -> list[Row]:
    """Runs a card for every combination of values, and shows the main metric, time and Pareto front of every row.

    over: settings and their values. Each combination is a run of its own: times of two are milliseconds of different
    timings, which `disturbed` marks. `graphs`: median time of a call of each graph, and calls in a sample. `parts`:
    what these calls take together, as a share of the whole time; what is missing to 1 is the work between them. Writes
    `out` (.csv) and a figure beside it; prints the table, with JSON as the last line. All combinations are read before
    the first run; when one fails later, the rows before it stay in `out`. Raises PqkError for fewer than two
    combinations, and as `run` does.
    """
    points = [dict(zip(over, values, strict=True)) for values in product(*over.values())]
    if len(points) < 2 or len({json.dumps(point) for point in points}) < len(points):
        raise PqkError("bench grid needs at least two different combinations, such as --over SETTING=1,4")
    root = paths.project_root()
    requests = [Request(card, backend, model=model, settings={**settings, **point}, qat=False) for point in points]
    for request in requests:
        asked_experiment(request, root)
    rows: list[Row] = []
    for point, request in zip(points, requests, strict=True):
        try:
            rows += _measured(point, request, root)
        except PqkError:
            if rows:
                print(f"{_told(point)} failed; the rows before it are in {paths.shown(out)}")
            raise
        write_text(out, csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))
    for row in rows:
        row["front"] = on_front(row, rows)
    write_text(out, csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))
    why = write_figure(out.with_suffix(".png"), lambda: _figure(rows, list(over)))
    _print(rows, list(over))
    print(f"{paths.shown(out)}" + (f"; no figure: {why}" if why else f"\n{paths.shown(out.with_suffix('.png'))}"))
    print(json.dumps(rows))
    return rows


def _measured(point: Mapping[str, Any], request: Request, root: Path) -> list[Row]:
    """Runs one combination; returns a row for each of its records. Raises PqkError for engines without times."""
    rows: list[Row] = []
    for record in run(request, root, lambda *_: None, print).records:
        if record["t_pair_p50_ms"] is None:
            raise PqkError("bench grid needs times, but these engines are emulated: they have none")
        metric = record["main_metric"]
        samples = record["samples"]
        rounds, whole = len(samples["pair"]), record["t_pair_p50_ms"]
        graphs = {
            name: {"p50_ms": percentile(times, 50), "calls": len(times) / rounds}
            for name, times in samples.items()
            if name != "pair"
        }
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
                "p50_ms": whole,
                "graphs": graphs,
                "parts": sum(each["p50_ms"] * each["calls"] for each in graphs.values()) / whole,
                "size_MB": record["size_MB"],
                "disturbed": record["disturbed"],
                "front": None,
            }
        )
    return rows


def on_front(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other row is at least as good and as fast, and better in one of the two."""
    sign = 1 if row["better"] == "higher" else -1

    def beats(other: Mapping[str, Any]) -> bool:
        good, fast = sign * (other["value"] - row["value"]), row["p50_ms"] - other["p50_ms"]
        return good >= 0 and fast >= 0 and (good > 0 or fast > 0)

    return not any(beats(other) for other in rows if other is not row)


def _told(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in point.items())


def _print(rows: Sequence[Row], over: Sequence[str]) -> None:
    names = [name.rpartition(".")[2] for name in over]
    print(
        " ".join(f"{name:>8}" for name in names), f"{'row':16} {rows[0]['metric']:>8} {'p50 ms':>9} {'parts':>6} front"
    )
    for row in rows:
        marks = ("*" if row["front"] else "") + (" disturbed" if row["disturbed"] else "")
        values = " ".join(f"{row[name]!s:>8}" for name in over)
        print(f"{values} {row['row']:16} {row['value']:8.3f} {row['p50_ms']:9.1f} {row['parts']:6.2f} {marks}".rstrip())


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
            text = ", ".join(str(row[each]) for each in over)
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
