"""Draws the plots of the report, `draw_plots`: trade-off, latency, executed precision, ablation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pqk.record.schema import Column, columns
from pqk.report.cells import (
    DASH,
    Record,
    cell_text,
    columns_of,
    interval_of,
    interval_text,
    row_label,
    shares_text,
    value_of,
    value_text,
)
from pqk.report.style import (
    ABOVE,
    BESIDE,
    FRONT,
    MARKERS,
    PALETTE,
    THRESHOLD_COLOUR,
    blank_figure,
    error_bar,
    grid,
    label_rows,
    logarithmic,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pqk.settings.evaluation import Thresholds

PRECISION_COLOURS = {
    "int4": "#CC79A7",
    "int8": "#D55E00",
    "fp8": "#000000",
    "f16": "#009E73",
    "bf16": "#56B4E9",
    "tf32": "#E69F00",
    "f32": "#0072B2",
}
SHOWN = 40  # records that a plot names: more make it unreadable, and large
LEAST_DROP_SPAN = 1.0  # percent: an axis of drops is at least so wide, or as wide as its thresholds
_LEAST_SPAN = 0.02  # of the median: an axis of other values is at least so wide
_LABEL_LENGTH = 44
_DROP = "quality_drop_pct"
_SPEEDS = ("speedup_vs_teacher_f32", "speedup_vs_own_f32", "speedup_vs_best_float")
_ABLATION = re.compile(r"(H|Ablation)\b", re.IGNORECASE)
_LOG_RATIO = 10.0  # a time axis that spans more than this is logarithmic

Say = Callable[[str], None]
Line = tuple[str, float]
"""A threshold: its label, and its value."""


def draw_plots(
    records: Sequence[Record], folder: Path | str, thresholds: Thresholds | None = None
) -> tuple[list[Path], list[str]]:
    """Draws the plots for which there is data; returns the files written and a sentence per plot or records left out.

    Only runs with status ok are drawn, the newest if there are many. thresholds: those of the evaluation, drawn as
    lines. An old plot that has no data any more is removed.
    """
    drawings: dict[str, Callable[[Sequence[Record], Thresholds | None, Say], Figure | str]] = {
        "tradeoff": tradeoff,
        "latency": latency,
        "precision": precision,
        "ablation": ablation,
    }
    ended_well = [record for record in records if record["status"] == "ok"]
    written: list[Path] = []
    said: list[str] = []
    for name, draw in drawings.items():
        path = Path(folder) / f"{name}.png"
        nothing = write_figure(path, partial(draw, ended_well, thresholds, said.append))
        if nothing is None:
            written.append(path)
        else:
            said.append(f"{path.name} is left out: {nothing}")
    return written, said


def _unheard(sentence: str) -> None:
    """Ignores the sentences about left-out records, for a caller that draws a single figure."""


def _newest(rows: Sequence[Record], name: str, say: Say) -> list[Record]:
    """Returns the newest rows, at most `SHOWN`, in their original order."""
    if len(rows) <= SHOWN:
        return list(rows)
    say(f"{name}.png shows the {SHOWN} newest of {len(rows)} records; --logs FOLDER draws others")
    chosen = sorted(range(len(rows)), key=lambda index: rows[index]["datetime"])[-SHOWN:]
    return [rows[index] for index in sorted(chosen)]


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool = False) -> list[int]:
    """Returns the indices of the points that no other dominates, by rising x. Lower x is better, and so is lower y, or
    higher y when `higher_is_better`.

    A point dominates another when it is at least as good in both and better in one; equal points are all kept.
    """
    sign = -1.0 if higher_is_better else 1.0
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if not front or sign * points[index][1] < sign * points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def tradeoff(records: Sequence[Record], thresholds: Thresholds | None = None, say: Say = _unheard) -> Figure | str:
    """Draws quality against median pair time, one marker per record, with the Pareto front and the limits.

    Quality is the drop if any record has an interval of it, else the main metric. With many records all are drawn as
    dots, and only the front and the newest are named.
    """
    time = _column("t_pair_p50_ms")
    quality = quality_axis([record for record in records if record[time.name] is not None] or records)
    scored = [record for record in records if value_of(record, quality.name) is not None]
    rows = [record for record in scored if record[time.name] is not None]
    if not rows:
        return f"no record has both {time.name} and {quality.name}"
    points = [(record[time.name], value_of(record, quality.name)) for record in rows]
    front = pareto_front(points, quality.better == "higher")
    named = _named(rows, front)
    figure, (axes,) = blank_figure(8.0, max(4.8, 0.26 * len(named) + 1.5))
    if len(named) < len(rows):
        say(f"tradeoff.png names {len(named)} of {len(rows)} records, the front and the newest; dots are the others")
        others = [points[index] for index in sorted(set(range(len(rows))) - set(named))]
        axes.plot(*zip(*others, strict=True), ".", color="#BBBBBB", markersize=4, zorder=0)
    if len({points[index] for index in front}) > 1:
        axes.plot(*zip(*(points[i] for i in front), strict=True), **FRONT)
    handles = []
    ends: list[float] = [y for _, y in points]
    across: list[float] = [x for x, _ in points]
    for number, index in enumerate(named):
        record, colour = rows[index], PALETTE[number % len(PALETTE)]
        interval = interval_of(record, quality.name)
        if interval is not None:
            error_bar(axes, points[index][0], interval, colour, upright=True)
            ends += interval
        of_time = interval_of(record, time.name)
        if of_time is not None:
            error_bar(axes, points[index][1], of_time, colour)
            across += of_time
        handles += axes.plot(
            *points[index],
            MARKERS[number % len(MARKERS)],
            color=colour,
            fillstyle="bottom" if record["verdict"] == "undecided" else "full",
            markerfacecolor="white" if record["verdict"] == "fail" else colour,
            markerfacecoloralt="white",
            markersize=9,
            markeredgewidth=1.6,
            linestyle="none",
        )
    lines = quality_lines(rows, quality, thresholds)
    for number, (_, value) in enumerate(lines):
        dashes = (0, (1 + 2 * number, 2))
        handles.append(axes.axhline(value, color=THRESHOLD_COLOUR, linewidth=1.3, linestyle=dashes, zorder=1.6))
    relative = quality.unit == "%"
    axes.set_ylim(span([*ends, *(value for _, value in lines), *([0.0] if relative else [])], relative))
    if not _log_time(axes, across):
        axes.set_xlim(span(across))
    axes.set_xlabel(axis_label(time) + _caution(rows))
    axes.set_ylabel(axis_label(quality))
    grid(axes)
    bars = "; bars: 95 % interval" if len(ends) + len(across) > 2 * len(points) else ""
    axes.set_title(
        f"quality against time (hollow: failed its verdict; half: undecided; dashed: Pareto front{bars})",
        fontsize=9,
        loc="left",
    )
    # The leading space keeps a label that begins with "_" in the legend.
    labels = [f" {_label(rows[index])}{_speed(rows[index], ', ')}" for index in named]
    labels += [f" {what}" for what, _ in lines]
    axes.legend(handles, labels, **BESIDE)
    return figure


def quality_axis(rows: Sequence[Record]) -> Column:
    """Returns the column that quality is drawn by: the drop where any record has its interval, else the main metric."""
    if any(interval_of(record, _DROP) and record[_DROP] is not None for record in rows):
        return _column(_DROP)
    known = {column.name: column for column in columns_of(rows)}
    chosen = Counter(record["main_metric"] for record in rows if record["main_metric"] in known)
    return known[chosen.most_common(1)[0][0] if chosen else _DROP]


def _named(rows: Sequence[Record], front: Sequence[int]) -> list[int]:
    """Returns the indices of the rows that the legend names: all, or the front and then the newest."""
    if len(rows) <= SHOWN:
        return list(range(len(rows)))
    newest = sorted(set(range(len(rows))) - set(front), key=lambda index: rows[index]["datetime"], reverse=True)
    return sorted([*front, *newest][:SHOWN])


def quality_lines(rows: Sequence[Record], quality: Column, thresholds: Thresholds | None) -> list[Line]:
    """Returns the allowed drops, on an axis of drops or, where all rows have the same Teacher, of the metric."""
    drops = drop_lines(rows, thresholds)
    if quality.name == _DROP:
        return drops
    taught = {value_of(r, quality.name) for r in rows if r["role"] == "teacher" and r["precision"] == "f32"}
    if len(taught) != 1 or any(record["quality_reference"] == "teacher" for record in rows):
        return []
    teacher, sign = taught.pop(), -1 if quality.better == "higher" else 1
    return [(f"{what} on the Teacher", teacher * (1 + sign * value / 100)) for what, value in drops]


def drop_lines(rows: Sequence[Record], thresholds: Thresholds | None) -> list[Line]:
    """Returns the allowed drops of the recipes of these rows, each value once, with the recipes that it is for."""
    if thresholds is None:
        return []
    own = {"Q-only": thresholds.quality_drop_q_only_pct, "P-only": thresholds.quality_drop_p_only_pct}
    found: dict[float, list[str]] = {}
    for record in rows:
        if record["role"] == "candidate":
            combo = record["combo"]
            name = combo if combo in own else "mainline"
            names = found.setdefault(own.get(combo, thresholds.quality_drop_mainline_pct), [])
            names.extend([] if name in names else [name])
    return [(f"limit: drop of {value:g} % ({', '.join(names)})", value) for value, names in sorted(found.items())]


def latency(records: Sequence[Record], thresholds: Thresholds | None = None, say: Say = _unheard) -> Figure | str:
    """Draws bars of the median pair time with a whisker up to the 95th percentile, and speeds with their intervals."""
    p50, p95 = _column("t_pair_p50_ms"), _column("t_pair_p95_ms")
    rows = [record for record in records if record[p50.name] is not None]
    if not rows:
        return f"no record has {p50.name}"
    rows = _newest(rows, "latency", say)
    speeds = [column for column in map(_column, _SPEEDS) if any(compared(record, column) for record in rows)]
    figure, panels = _bars(rows, 2 if speeds else 1)
    axes = panels[0]
    times = [record[p50.name] for record in rows]
    tails = [max(record[p95.name] or 0.0, record[p50.name]) for record in rows]
    axes.barh(range(len(rows)), times, color=PALETTE[5], height=0.62)
    long = [index for index, record in enumerate(rows) if record[p95.name] is not None]
    if long:
        whiskers = [[0.0] * len(long), [tails[index] - times[index] for index in long]]
        at = [times[index] for index in long]
        axes.errorbar(at, long, xerr=whiskers, fmt="none", ecolor="#333333", capsize=3, linewidth=1.2)
    intervals = [interval_of(record, p50.name) for record in rows]
    ends = [tail if each is None else max(tail, each[1]) for tail, each in zip(tails, intervals, strict=True)]
    for index, (record, end, interval) in enumerate(zip(rows, ends, intervals, strict=True)):
        if interval is not None:
            error_bar(axes, index, interval, PALETTE[0])
        axes.annotate(
            cell_text(record[p50.name], p50) + _speed(record, "  ", False),
            (end, index),  # behind whisker and interval
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(0, max(ends) * (1.4 if speeds else 1.15) or 1.0)
    axes.set_xlabel(f"{axis_label(p50)}{f', whisker: {p95.name}' if long else ''}{_caution(rows)}")
    if speeds:
        _speeds(panels[1], rows, speeds, thresholds)
    return figure


def compared(record: Record, column: Column) -> bool:
    """Returns whether a speedup compares a row with another row: a row in f32 is its own f32."""
    mine = record["precision"] == "f32" and (record["role"] == "teacher" or column.name != "speedup_vs_teacher_f32")
    return record[column.name] is not None and not mine


def _speeds(axes: Axes, rows: Sequence[Record], speeds: Sequence[Column], thresholds: Thresholds | None) -> None:
    """Draws each row's speedups as marks with their intervals, and their thresholds as lines."""
    asked = speed_limits(rows, thresholds)
    seen = [1.0]
    for number, column in enumerate(speeds):
        colour, place = PALETTE[number], 0.22 * (number - (len(speeds) - 1) / 2)
        own = [(index + place, record) for index, record in enumerate(rows) if compared(record, column)]
        values = [record[column.name] for _, record in own]
        axes.plot(values, [y for y, _ in own], MARKERS[number], color=colour, markersize=5, label=f" {column.short}")
        seen += values
        for y, record in own:
            interval = interval_of(record, column.name)
            if interval is not None:
                error_bar(axes, y, interval, colour)
                seen += interval
        if column.name in asked:
            what, value = asked[column.name]
            axes.axvline(value, color=colour, linewidth=1.3, linestyle=(0, (1 + 2 * number, 2)), label=f" {what}")
            seen.append(value)
    axes.set_xlim(span(seen))
    axes.set_xlabel("speed (x), higher is better; bars: 95 % interval")
    axes.legend(**BESIDE)


def speed_limits(rows: Sequence[Record], thresholds: Thresholds | None) -> dict[str, Line]:
    """Returns the least speedups that quantized rows must reach, by column; empty where no row is quantized."""
    if thresholds is None or not any(record["quantizer"] for record in rows):
        return {}
    reduction, slack = thresholds.t_pair_p50_reduction_pct, thresholds.not_slower_than_best_float_pct
    text = f"limit: {slack:g} % slower than best float" if slack else "limit: not slower than best float"
    return {
        "speedup_vs_own_f32": (f"limit: {reduction:g} % below own f32", 1 / (1 - reduction / 100)),
        "speedup_vs_best_float": (text, 1 / (1 + slack / 100)),
    }


def precision(records: Sequence[Record], thresholds: Thresholds | None = None, say: Say = _unheard) -> Figure | str:
    """Draws the stacked shares of the executed precisions."""
    name = "executed_precision"
    rows = [record for record in records if record[name]]
    if not rows:
        return f"no record has {name}"
    rows = _newest(rows, "precision", say)
    figure, (axes,) = _bars(rows)
    known = {precision for record in rows for precision in record[name]}
    names = [key for key in PRECISION_COLOURS if key in known] + sorted(known - set(PRECISION_COLOURS))
    left = [0.0] * len(rows)
    for number, key in enumerate(names):
        share = [100.0 * record[name].get(key, 0.0) for record in rows]
        colour = PRECISION_COLOURS.get(key, "#BBBBBB")
        hatch = "" if key in PRECISION_COLOURS else ("//", "..", "xx")[number % 3]
        axes.barh(range(len(rows)), share, left=left, color=colour, hatch=hatch, height=0.62, label=f" {key}")
        left = [a + b for a, b in zip(left, share, strict=True)]
    for index, record in enumerate(rows):
        axes.annotate(
            shares_text(record[name]),
            (100.0, index),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of matmul and convolution FLOPs (%)")
    axes.legend(**ABOVE, ncols=len(names))
    return figure


def ablation(records: Sequence[Record], thresholds: Thresholds | None = None, say: Say = _unheard) -> Figure | str:
    """Draws the records of the ablation study (class H): drop with its interval and, when timed, median pair time."""
    rows = [record for record in records if _ABLATION.match(record["combo"] or "")]
    drawn = [_column(_DROP), _column("t_pair_p50_ms")]
    drawn = [column for column in drawn if any(record[column.name] is not None for record in rows)]
    if not rows:
        return "no record of an ablation (combo H or Ablation)"
    if not drawn:
        return "no record of an ablation (combo H or Ablation) has quality_drop_pct or t_pair_p50_ms"
    rows = _newest(rows, "ablation", say)
    figure, axes = _bars(rows, len(drawn))
    for axis, column, colour in zip(axes, drawn, PALETTE, strict=False):
        bars_of(axis, rows, column, colour, drop_lines(rows, thresholds) if column.name == _DROP else [])
    return figure


def bars_of(axis: Axes, rows: Sequence[Record | None], column: Column, colour: str, lines: Sequence[Line] = ()) -> None:
    """Draws a column as horizontal bars from 0, each with its interval and its value as text.

    rows: from top to bottom; None, or a record without a value, is a dash. lines: thresholds.
    """
    axis.axvline(0.0, color="#333333", linewidth=0.8)
    seen = [0.0]
    texts = [DASH if record is None else value_text(record, column) for record in rows]
    for index, record in enumerate(rows):
        value = None if record is None else record[column.name]
        interval = None if record is None or value is None else interval_of(record, column.name)
        axis.barh([index], [value or 0.0], color=colour, height=0.62)
        if interval is not None:
            error_bar(axis, index, interval, "#333333")
        seen += [value or 0.0, *(interval or ())]
        axis.annotate(
            texts[index],
            (max(0.0, value or 0.0, *(interval or ())), index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )
    for what, value in lines:
        axis.axvline(value, color=THRESHOLD_COLOUR, linewidth=1.3, linestyle=":", label=f" {what}")
    if lines:
        axis.legend(**ABOVE)
    low, high = span([*seen, *(value for _, value in lines)], column.unit == "%")
    share = min(0.6, 0.024 * max(map(len, texts)))  # of the panel, for the texts
    axis.set_xlim(low if min(seen) < 0 else 0.0, high + (high - low) * share / (1 - share))
    axis.set_xlabel(axis_label(column))


def span(values: Sequence[float], relative: bool = False) -> tuple[float, float]:
    """Returns the ends of an axis: all values and a margin, at least so wide that noise does not fill the plot.

    relative: the values are drops in percent.
    """
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    least = LEAST_DROP_SPAN if relative else _LEAST_SPAN * abs(middle) or 1.0
    half = max(high - low, least) * 0.54
    return (low + high) / 2 - half, (low + high) / 2 + half


def _speed(record: Record, before: str, interval: bool = True) -> str:
    """Returns '1.13x own f32' after `before`, with its interval; '' where not measured, or for the f32 row itself."""
    column = _column("speedup_vs_own_f32")
    speed = record[column.name]
    if speed is None or record["precision"] == "f32":
        return ""
    return f"{before}{speed:.2f}x own f32 {interval_text(record, column) if interval else ''}".rstrip()


def _caution(rows: Sequence[Record]) -> str:
    """Returns a line for the time axis: milliseconds of runs at different moments must not be divided by each other."""
    shown = any(_speed(record, "") for record in rows)
    return "\nms are of each row's own run; x own f32 is the ratio within one interleaved run" if shown else ""


def _bars(rows: Sequence[Record], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure of horizontal bars, the first record on top, labels beside the first panel."""
    figure, axes = blank_figure(8.0 if panels == 1 else 10.5, max(1.8, 0.42 * len(rows) + 1.1), panels)
    for number, axis in enumerate(axes):
        label_rows(axis, [_label(record) if number == 0 else "" for record in rows])
        grid(axis, horizontal=False)
    return figure, axes


def _log_time(axes: Axes, times: Sequence[float]) -> bool:
    """Makes the axis of time logarithmic where the times differ by much; returns whether it did."""
    if not (min(times) > 0 and max(times) / min(times) > _LOG_RATIO):
        return False
    logarithmic(axes)
    axes.margins(x=0.08)
    return True


def axis_label(column: Column) -> str:
    arrow = {"lower": ", lower is better", "higher": ", higher is better"}.get(column.better, "")
    unit = f" ({column.unit})" if column.unit not in ("", "1") else ""
    return f"{column.name}{unit}{arrow}"


def _column(name: str) -> Column:
    return next(column for column in columns() if column.name == name)


def _label(record: Record) -> str:
    text = row_label(record)
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "…"
