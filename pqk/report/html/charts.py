"""Makes the charts of the report as plain data for plotly: quality against time, latency, speeds, precision, graphs.

Colours that begin with '@' are names of the page's theme, which its script puts in: `@text`, `@muted`, `@limit`.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pqk.record.schema import columns
from pqk.report.cells import Record, cell_text, interval_of, value_of
from pqk.report.html.reasons import in_language
from pqk.report.html.rows import Words
from pqk.report.plots import (
    PRECISION_COLOURS,
    SHOWN,
    compared,
    pareto_front,
    quality_axis,
    quality_lines,
    span,
    speed_limits,
)
from pqk.report.style import PALETTE

if TYPE_CHECKING:
    from pqk.settings.evaluation import Thresholds

Chart = dict[str, Any]
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left", "hexagon")
_COLOURS = PALETTE[:-1]  # without black, which a dark page swallows
_TIME, _SPEED = "t_pair_p50_ms", "speedup_vs_teacher_f32"
_LOG_RATIO = 10.0
_ROW = 30  # pixels of a bar


def charts_of(
    records: Sequence[Record], labels: Sequence[str], thresholds: Thresholds | None, t: Words
) -> dict[str, list[Chart]]:
    """Returns the charts of each section by its name; an empty list where there is nothing to draw.

    A chart is {id, title, note, height, data, layout}. Only runs that ended well are drawn, of many the newest.
    """
    well = [(r, label) for r, label in zip(records, labels, strict=True) if r["status"] == "ok"]
    chosen, note = _newest(well, t)
    rows, names = [record for record, _ in chosen], [label for _, label in chosen]
    made = {
        "pareto": [pareto(rows, names, thresholds, t)],
        "latency": [latency(rows, names, t), speeds(rows, names, thresholds, t)],
        "executed": [executed(rows, names, t)],
        "graphs": [graphs(rows, names, t)],
    }
    return {
        name: [chart | {"note": f"{chart['note']} {note}".strip()} for chart in found if chart is not None]
        for name, found in made.items()
    }


def _newest(rows: Sequence[tuple[Record, str]], t: Words) -> tuple[list[tuple[Record, str]], str]:
    if len(rows) <= SHOWN:
        return list(rows), ""
    places = sorted(range(len(rows)), key=lambda place: rows[place][0]["datetime"])[-SHOWN:]
    return [rows[place] for place in sorted(places)], t["newest_only"].format(SHOWN, len(rows))


def pareto(records: Sequence[Record], labels: Sequence[str], thresholds: Thresholds | None, t: Words) -> Chart | None:
    """Draws quality against time: speed within the run where every row has it, else milliseconds."""
    timed = [(r, label) for r, label in zip(records, labels, strict=True) if r[_TIME] is not None]
    if not timed:
        return None
    relative = all(record[_SPEED] is not None for record, _ in timed)
    name = _SPEED if relative else _TIME
    quality = quality_axis([record for record, _ in timed])
    rows = [(record, label) for record, label in timed if value_of(record, quality.name) is not None]
    if not rows:
        return None
    points = [(float(record[name]), float(value_of(record, quality.name))) for record, _ in rows]
    sign = -1.0 if relative else 1.0
    front = pareto_front([(sign * x, y) for x, y in points], quality.better == "higher")
    data: list[dict[str, Any]] = []
    if len({points[place] for place in front}) > 1:
        line = [points[place] for place in front]
        data.append(
            _line(
                [x for x, _ in line],
                [y for _, y in line],
                t["front"],
                {"dash": "dash", "color": "@muted", "width": 1.5},
            )
        )
    ends, across = [y for _, y in points], [x for x, _ in points]
    for number, ((record, label), (x, y)) in enumerate(zip(rows, points, strict=True)):
        colour, verdict = _COLOURS[number % len(_COLOURS)], record["verdict"]
        shape = SYMBOLS[number % len(SYMBOLS)]
        found = interval_of(record, quality.name)
        ends += found or ()
        across += interval_of(record, name) or ()
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": [x],
            "y": [y],
            "name": html.escape(label),
            "marker": {
                "symbol": shape + {"fail": "-open", "undecided": "-open-dot"}.get(verdict or "", ""),
                "color": colour,
                "size": 11,
                "line": {"width": 2, "color": colour},
            },
            "hoverinfo": "text",
            "hovertext": _hover(label, record, (name, quality.name)),
        }
        trace |= _bars("y", y, found, colour) | _bars("x", x, interval_of(record, name), colour)
        data.append(trace)
    taught = [record for record, _ in rows]
    limits = quality_lines(taught, quality, thresholds)
    drop = quality.unit == "%"
    low, high = span([*ends, *(value for _, value in limits), *([0.0] if drop else [])], drop)
    if max(across) > _LOG_RATIO * min(across) > 0:
        axis: dict[str, Any] = {"type": "log", "dtick": "D2", "tickformat": "~r"}
    else:
        axis = {"range": list(span(across)), "tickformat": "~r"}
    title = t["drop_short"] if drop else t["metric_axis"].format(_unit(quality), t[quality.better or "lower"])
    layout = {
        "xaxis": {**axis, "title": {"text": t["ratio_axis"] if relative else t["time_axis"]}},
        "yaxis": {"range": [low, high], "title": {"text": html.escape(title)}, "tickformat": "~g", "zeroline": drop},
        "shapes": [_limit("y", value) for _, value in limits],
        "annotations": [_limit_text("y", value, in_language(what, t["language"])) for what, value in limits],
        "showlegend": True,
    }
    note = t["pareto_note"] + ("" if relative else " " + t["caution"])
    return _chart("pareto", t["pareto"], note, max(430, 21 * len(data) + 130), data, layout)


def latency(records: Sequence[Record], labels: Sequence[str], t: Words) -> Chart | None:
    """Draws every raw sample of a row as a dot, and a box of the middle half."""
    rows = [(r, label) for r, label in zip(records, labels, strict=True) if (r["samples"] or {}).get("pair")]
    if not rows:
        return None
    data = []
    for number, (record, label) in enumerate(rows):
        colour = _COLOURS[number % len(_COLOURS)]
        data.append(
            {
                "type": "box",
                "orientation": "h",
                "x": [round(float(value), 3) for value in record["samples"]["pair"]],
                "y": [html.escape(label)] * len(record["samples"]["pair"]),
                "name": html.escape(label),
                "boxpoints": "all",
                "jitter": 0.7,
                "pointpos": 0,
                "marker": {"size": 3, "color": colour, "opacity": 0.6},
                "line": {"width": 1.3, "color": colour},
                "fillcolor": "rgba(0,0,0,0)",
                "hoverinfo": "x+name",
            }
        )
    least = min(min(record["samples"]["pair"]) for record, _ in rows)
    most = max(max(record["samples"]["pair"]) for record, _ in rows)
    wide = most > _LOG_RATIO * least > 0
    axis: dict[str, Any] = {"type": "log", "dtick": "D2"} if wide else {"range": [0, 1.03 * most]}
    layout = {"xaxis": {**axis, "title": {"text": t["latency_axis"]}, "tickformat": "~r"}, "yaxis": _rows_axis(rows)}
    note = f"{t['latency_note']} {t['caution']}"
    return _chart("latency", t["latency"], note, _ROW * len(rows) + 110, data, layout)


def speeds(records: Sequence[Record], labels: Sequence[str], thresholds: Thresholds | None, t: Words) -> Chart | None:
    """Draws the speedups of a row within its run, with their intervals and limits."""
    known = {column.name: column for column in columns()}
    names = {"speedup_vs_teacher_f32": "speed_teacher", "speedup_vs_own_f32": "speed_own"}
    names["speedup_vs_best_float"] = "speed_best"
    rows = [
        (r, label) for r, label in zip(records, labels, strict=True) if any(compared(r, known[name]) for name in names)
    ]
    if not rows:
        return None
    limits = speed_limits([record for record, _ in rows], thresholds)
    data, shapes, seen = [], [], [1.0]
    for number, (name, word) in enumerate(names.items()):
        own = [(place, r, label) for place, (r, label) in enumerate(rows) if compared(r, known[name])]
        if not own:
            continue
        colour, values = _COLOURS[number], [float(record[name]) for _, record, _ in own]
        found = [interval_of(record, name) or (value, value) for (_, record, _), value in zip(own, values, strict=True)]
        seen += [*values, *(end for ends in found for end in ends)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html.escape(t[word]),
                "x": values,
                "y": [place + 0.22 * (number - 1) for place, _, _ in own],
                "marker": {"symbol": SYMBOLS[number], "size": 8, "color": colour},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - x for x, (_, high) in zip(values, found, strict=True)],
                    "arrayminus": [x - low for x, (low, _) in zip(values, found, strict=True)],
                    "color": colour,
                    "thickness": 1.5,
                },
                "hoverinfo": "text",
                "hovertext": [_hover(label, record, (name,)) for _, record, label in own],
            }
        )
        if name in limits:
            what, value = limits[name]
            seen.append(value)
            shapes.append(_limit("x", value, colour))
            line = {"color": colour, "dash": "dot", "width": 1.5}
            data.append(_line([None], [None], html.escape(in_language(what, t["language"])), line))
    shapes.append({**_limit("x", 1.0, "@muted"), "line": {"color": "@muted", "width": 1}})
    layout = {
        "xaxis": {"range": list(span(seen)), "title": {"text": t["speeds_axis"]}, "tickformat": "~r"},
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [html.escape(label) for _, label in rows],
            "range": [len(rows) - 0.5, -0.5],
            "automargin": True,
            "zeroline": False,
        },
        "shapes": shapes,
        "showlegend": True,
        "legend": _ABOVE,
    }
    return _chart("speeds", t["speeds"], "", 38 * len(rows) + 160, data, layout)


def executed(records: Sequence[Record], labels: Sequence[str], t: Words) -> Chart | None:
    """Draws the stacked shares of the precisions that ran."""
    name = "executed_precision"
    rows = [(record, label) for record, label in zip(records, labels, strict=True) if record[name]]
    if not rows:
        return None
    known = {precision for record, _ in rows for precision in record[name]}
    names = [key for key in PRECISION_COLOURS if key in known] + sorted(known - set(PRECISION_COLOURS))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(key),
            "x": [100.0 * record[name].get(key, 0.0) for record, _ in rows],
            "y": [html.escape(label) for _, label in rows],
            "marker": {"color": _precision_colour(key)},
            "hovertemplate": "%{x:.1f} %",
        }
        for key in names
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"range": [0, 100], "title": {"text": t["executed_axis"]}},
        "yaxis": _rows_axis(rows),
        "showlegend": True,
        "legend": _ABOVE,
    }
    return _chart("executed", t["executed"], t["executed_note"], _ROW * len(rows) + 140, data, layout)


def _precision_colour(key: str) -> str:
    colour = PRECISION_COLOURS.get(key, "@muted")
    return "@text" if colour == "#000000" else colour


def graphs(records: Sequence[Record], labels: Sequence[str], t: Words) -> Chart | None:
    """Draws the median time of each graph in a sample, stacked, and the glue between them."""
    rows = [(r, label) for r, label in zip(records, labels, strict=True) if len(_per_graph(r)) > 0]
    if not rows:
        return None
    names = list(dict.fromkeys(name for record, _ in rows for name in _per_graph(record)))
    parts = [_per_graph(record) for record, _ in rows]
    whole = [statistics.median(record["samples"]["pair"]) for record, _ in rows]
    series = {name: [part.get(name, 0.0) for part in parts] for name in names}
    series[t["glue"]] = [max(0.0, total - sum(part.values())) for total, part in zip(whole, parts, strict=True)]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(name),
            "x": values,
            "y": [html.escape(label) for _, label in rows],
            "marker": {"color": "@muted" if name == t["glue"] else _COLOURS[number % len(_COLOURS)]},
            "hovertemplate": "%{x:.1f} ms",
        }
        for number, (name, values) in enumerate(series.items())
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": t["graphs_axis"]}, "rangemode": "tozero", "tickformat": "~r"},
        "yaxis": _rows_axis(rows),
        "showlegend": True,
        "legend": _ABOVE,
    }
    return _chart("graphs", t["blocks"], f"{t['graphs_note']} {t['caution']}", _ROW * len(rows) + 140, data, layout)


def _per_graph(record: Record) -> dict[str, float]:
    """Returns the median time of each graph in a sample, in ms; empty where the raw samples do not fit together.

    A graph that runs several times in a sample has as many times as it has runs, or their sum: both are summed.
    """
    samples = record["samples"] or {}
    rounds = len(samples.get("pair", ()))
    found = {}
    for name, times in samples.items():
        if name in ("pair", "device") or not times or not rounds or len(times) % rounds:
            continue
        runs = len(times) // rounds
        found[name] = statistics.median(sum(times[runs * at : runs * (at + 1)]) for at in range(rounds))
    return found


def intervals(
    name: str,
    title: str,
    rows: Sequence[tuple[str, float, float | None, float | None]],
    axis: str,
    limit: float | None = None,
) -> Chart:
    """Draws values with their intervals, a row each: (label, value, low, high)."""
    values = [value for _, value, _, _ in rows]
    ends = [end for _, _, low, high in rows for end in (low, high) if end is not None]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": values,
            "y": list(range(len(rows))),
            "marker": {"size": 9, "color": _COLOURS[0]},
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [0.0 if high is None else high - value for _, value, _, high in rows],
                "arrayminus": [0.0 if low is None else value - low for _, value, low, _ in rows],
                "color": _COLOURS[0],
                "thickness": 1.5,
            },
            "hoverinfo": "text",
            "hovertext": [html.escape(f"{label}: {_interval(value, low, high)}") for label, value, low, high in rows],
        }
    ]
    lines = [0.0] if limit is None else [0.0, limit]
    layout = {
        "xaxis": {"range": list(span([*values, *ends, *lines], True)), "title": {"text": axis}, "tickformat": "~g"},
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [html.escape(label) for label, *_ in rows],
            "range": [len(rows) - 0.5, -0.5],
            "automargin": True,
            "zeroline": False,
        },
        "shapes": [] if limit is None else [_limit("x", limit)],
    }
    return _chart(name, title, "", _ROW * len(rows) + 100, data, layout)


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:+.2f}" if low is None or high is None else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


_ABOVE = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left", "traceorder": "normal"}


def _chart(
    name: str, title: str, note: str, height: int, data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]
) -> Chart:
    return {"id": name, "title": title, "note": note, "height": height, "data": list(data), "layout": dict(layout)}


def _rows_axis(rows: Sequence[Any]) -> dict[str, Any]:
    return {
        "type": "category",
        "categoryarray": [html.escape(label) for _, label in rows],
        "autorange": "reversed",
        "automargin": True,
    }


def _line(x: Sequence[Any], y: Sequence[Any], name: str, line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "name": name,
        "line": dict(line),
        "hoverinfo": "skip",
    }


def _bars(axis: str, value: float, found: tuple[float, float] | None, colour: str) -> dict[str, Any]:
    if found is None:
        return {}
    low, high = found
    return {
        f"error_{axis}": {
            "type": "data",
            "symmetric": False,
            "array": [high - value],
            "arrayminus": [value - low],
            "color": colour,
            "thickness": 1.5,
        }
    }


def _limit(axis: str, value: float, colour: str = "@limit") -> dict[str, Any]:
    other = "x" if axis == "y" else "y"
    return {
        "type": "line",
        f"{axis}0": value,
        f"{axis}1": value,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "layer": "below",
        "line": {"color": colour, "width": 1.5, "dash": "dot"},
    }


def _limit_text(axis: str, value: float, what: str) -> dict[str, Any]:
    return {
        "xref": "paper",
        "x": 1,
        "xanchor": "right",
        "y": value,
        "yanchor": "bottom",
        "showarrow": False,
        "text": html.escape(what),
        "font": {"size": 11, "color": "@limit"},
        "bgcolor": "@bg",
        "borderpad": 1,
    }


def _unit(column: Any) -> str:
    return column.name if column.unit in ("", "1") else f"{column.name} ({column.unit})"


def _hover(label: str, record: Record, names: Sequence[str]) -> str:
    known = {column.name: column for column in columns()}
    lines = [label]
    for name in names:
        value, found = value_of(record, name), interval_of(record, name)
        column = known.get(name)
        text = f"{value:.5g}" if column is None else cell_text(value, column)
        unit = "" if column is None or column.unit in ("", "1") else f" {column.unit}"
        ends = "" if found is None else f" [{found[0]:.4g}, {found[1]:.4g}]"
        lines.append(f"{name} {text}{unit}{ends}")
    return "<br>".join(html.escape(line) for line in lines)
