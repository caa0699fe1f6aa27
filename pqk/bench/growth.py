"""Measures how time and memory grow with one setting, such as the number of frames: a table, CSV and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.errors import PqkError
from pqk.files import write_text
from pqk.recipe.request import Request, asked_experiment
from pqk.recipe.runner import run
from pqk.report.style import BESIDE, MARKERS, PALETTE, blank_figure, write_figure
from pqk.stats.latency import percentile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bench_growth(
    card: str,
    backend: str,
    model: str | None,
    over: str,
    values: Sequence[int],
    settings: Mapping[str, Any],
    out: Path,
) -> list[dict[str, Any]]:
    """Runs a card once for each value of the setting `over`, and shows median time and peak memory of every row.

    Each value is a run of its own, so times of two values are milliseconds of different timings: their ratios carry the
    machine's mood, which `disturbed` marks. Writes `out` (.csv) and a figure beside it; prints the table, with JSON as
    the last line. All values are read before the first run; a run that fails later leaves the rows before it in `out`.
    Raises PqkError for fewer than two values, for emulated engines, and as `run` does.
    """
    if len(set(values)) < 2 or len(set(values)) != len(values):
        raise PqkError(f"bench growth needs at least two different values of {over}, got {', '.join(map(str, values))}")
    root = paths.project_root()
    requests = {
        value: Request(card, backend, model=model, settings={**settings, over: value}, qat=False) for value in values
    }
    for request in requests.values():
        asked_experiment(request, root)
    rows: list[dict[str, Any]] = []
    for value, request in requests.items():
        try:
            rows += _measured(value, request, root)
        except PqkError:
            if rows:
                print(f"{over}={value} failed; the rows before it are in {paths.shown(out)}")
            raise
        write_text(out, "\n".join(_lines(rows)) + "\n")
    why = write_figure(out.with_suffix(".png"), lambda: _figure(over, rows))
    _print(over, rows)
    print(f"{paths.shown(out)}" + (f"; no figure: {why}" if why else f"\n{paths.shown(out.with_suffix('.png'))}"))
    print(json.dumps(rows))
    return rows


def _measured(value: int, request: Request, root: Path) -> list[dict[str, Any]]:
    """Runs one value; returns a row for each of its records. Raises PqkError for engines without times."""
    rows: list[dict[str, Any]] = []
    for record in run(request, root, lambda *_: None, print).records:
        if record["t_pair_p50_ms"] is None:
            raise PqkError("bench growth needs times, but these engines are emulated: they have none")
        graphs = {name: times for name, times in record["samples"].items() if name != "pair"}
        rows.append(
            {
                "value": value,
                "row": f"{record['role']} {record['precision']}",
                "p50_ms": record["t_pair_p50_ms"],
                "ram_GB": record["ram_GB"],
                "size_MB": record["size_MB"],
                "disturbed": record["disturbed"],
                **{f"{name}_ms": percentile(times, 50) for name, times in graphs.items()},
            }
        )
    return rows


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines of the CSV; a cell without a value is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells: list[list[Any]] = [names, *([row.get(name) for name in names] for row in rows)]
    return [",".join("" if cell is None else str(cell) for cell in line) for line in cells]


def _print(over: str, rows: Sequence[Mapping[str, Any]]) -> None:
    first = {row["row"]: row for row in reversed(rows)}
    print(f"{over.rpartition('.')[2]:>8} {'row':24} {'p50 ms':>9} {'x first':>8} {'RAM GB':>7} {'x first':>8}")
    for row in rows:
        base = first[row["row"]]
        time, memory = row["p50_ms"] / base["p50_ms"], _ratio(row["ram_GB"], base["ram_GB"])
        ram = "–" if row["ram_GB"] is None else f"{row['ram_GB']:.2f}"
        mark = " disturbed" if row["disturbed"] else ""
        print(f"{row['value']:8} {row['row']:24} {row['p50_ms']:9.1f} {time:8.2f} {ram:>7} {memory:>8}{mark}")


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.2f}"


def _figure(over: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (left, right) = blank_figure(9, 3.6, 2)
    for number, name in enumerate(dict.fromkeys(row["row"] for row in rows)):
        mine = [row for row in rows if row["row"] == name]
        style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)], "label": name}
        left.plot([row["value"] for row in mine], [row["p50_ms"] for row in mine], **style)
        right.plot([row["value"] for row in mine], [row["ram_GB"] for row in mine], **style)
    for panel, what in ((left, "median time of a sample (ms)"), (right, "peak memory (GB)")):
        panel.set_xlabel(over)
        panel.set_ylabel(what)
        panel.set_ylim(bottom=0)
        panel.set_xticks(sorted({row["value"] for row in rows}))
    right.legend(**BESIDE)
    return figure
