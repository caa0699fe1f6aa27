"""The plots of the report: trade-off, latency, executed precision, ablation; drawn without a display."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pqk.files import atomic_path
from pqk.record.schema import Column, columns
from pqk.report.table import Record, cell_text, row_label, shares_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color), told apart with every common colour blindness; the yellow
# is left out, it is too faint on white. Seven colours and nine markers give 63 different pairs.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
PRECISION_COLOURS = {
    "int4": "#CC79A7",
    "int8": "#D55E00",
    "fp8": "#000000",
    "f16": "#009E73",
    "bf16": "#56B4E9",
    "tf32": "#E69F00",
    "f32": "#0072B2",
}
_LABEL_LENGTH = 44
_ABLATION = re.compile(r"(H|Ablation)\b", re.IGNORECASE)
_LOG_RATIO = 10.0  # a time axis that spans more than this is logarithmic


def draw_plots(records: Sequence[Record], folder: Path | str) -> tuple[list[Path], list[str]]:
    """Draw the plots for which there is data; return the files written and one sentence per plot left out.

    Only runs with status ok are drawn. A plot of an earlier call that has no data any more is removed.
    """
    drawings: dict[str, Callable[[Sequence[Record]], Figure | str]] = {
        "tradeoff": tradeoff,
        "latency": latency,
        "precision": precision,
        "ablation": ablation,
    }
    import matplotlib

    ended_well = [record for record in records if record["status"] == "ok"]
    written, left_out = [], []
    for name, draw in drawings.items():
        path = Path(folder) / f"{name}.png"
        # A label is data: "$" in it is no formula.
        with matplotlib.rc_context({"text.parse_math": False, "font.size": 10}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure = draw(ended_well)
            if isinstance(figure, str):
                path.unlink(missing_ok=True)
                left_out.append(f"{path.name} is left out: {figure}")
                continue
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
            written.append(path)
    return written, left_out


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool = False) -> list[int]:
    """Indices of the points (x to be low; y low, or high when `higher_is_better`) that none dominates, by rising x.

    A point dominates another when it is at least as good in both and better in one; of equal points all stay.
    """
    sign = -1.0 if higher_is_better else 1.0
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if not front or sign * points[index][1] < sign * points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def tradeoff(records: Sequence[Record]) -> Figure | str:
    """Median pair time against the main quality metric, one marker per record, with the Pareto front."""
    chosen = Counter(record["main_metric"] for record in records if record["main_metric"])
    quality = _column(chosen.most_common(1)[0][0] if chosen else "absrel")
    time = _column("t_pair_p50_ms")
    rows = [record for record in records if record[time.name] is not None and record[quality.name] is not None]
    if not rows:
        return f"no record has both {time.name} and {quality.name}"
    figure, (axes,) = blank_figure(8.0, max(4.8, 0.26 * len(rows) + 1.5))
    points = [(record[time.name], record[quality.name]) for record in rows]
    front = pareto_front(points, quality.better == "higher")
    if len({points[index] for index in front}) > 1:
        axes.plot(*zip(*(points[i] for i in front), strict=True), "--", color="#777777", linewidth=1.2, zorder=1)
    handles = []
    for index, record in enumerate(rows):
        colour = PALETTE[index % len(PALETTE)]
        failed = record["verdict"] == "fail"
        handles += axes.plot(
            *points[index],
            MARKERS[index % len(MARKERS)],
            color=colour,
            markerfacecolor="white" if failed else colour,
            markersize=9,
            markeredgewidth=1.6,
            linestyle="none",
        )
    _time_axis(axes, [x for x, _ in points])
    axes.set_xlabel(axis_label(time) + _caution(rows))
    axes.set_ylabel(axis_label(quality))
    axes.margins(0.08)
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.set_title("quality against time (hollow: failed its verdict; dashed: Pareto front)", fontsize=10, loc="left")
    # The leading space keeps a label that begins with "_" in the legend.
    labels = [f" {_label(record)}{_speed(record, ', ')}" for record in rows]
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    return figure


def latency(records: Sequence[Record]) -> Figure | str:
    """Bars of the median pair time, with a whisker up to the 95th percentile."""
    p50, p95 = _column("t_pair_p50_ms"), _column("t_pair_p95_ms")
    rows = [record for record in records if record[p50.name] is not None]
    if not rows:
        return f"no record has {p50.name}"
    figure, (axes,) = _bars(rows)
    times = [record[p50.name] for record in rows]
    tails = [max(record[p95.name] or 0.0, record[p50.name]) for record in rows]
    whiskers = [[0.0] * len(rows), [tail - time for tail, time in zip(tails, times, strict=True)]]
    axes.barh(range(len(rows)), times, color=PALETTE[5], height=0.62)
    axes.errorbar(times, range(len(rows)), xerr=whiskers, fmt="none", ecolor="#333333", capsize=3, linewidth=1.2)
    for index, (record, tail) in enumerate(zip(rows, tails, strict=True)):
        axes.annotate(
            cell_text(record[p50.name], p50) + _speed(record, "  "),
            (tail, index),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(0, max(tails) * 1.15 or 1.0)
    axes.set_xlabel(f"{axis_label(p50)}, whisker: {p95.name}{_caution(rows)}")
    return figure


def precision(records: Sequence[Record]) -> Figure | str:
    """Stacked shares of the precision that was executed."""
    name = "executed_precision"
    rows = [record for record in records if record[name]]
    if not rows:
        return f"no record has {name}"
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
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(names), frameon=False)
    return figure


def ablation(records: Sequence[Record]) -> Figure | str:
    """The records of the ablation study (class H): quality drop and, when timed, the median pair time."""
    rows = [record for record in records if _ABLATION.match(record["combo"] or "")]
    drawn = [_column("quality_drop_pct"), _column("t_pair_p50_ms")]
    drawn = [column for column in drawn if any(record[column.name] is not None for record in rows)]
    if not rows:
        return "no record of an ablation (combo H or Ablation)"
    if not drawn:
        return "no record of an ablation (combo H or Ablation) has quality_drop_pct or t_pair_p50_ms"
    figure, axes = _bars(rows, len(drawn))
    for axis, column, colour in zip(axes, drawn, PALETTE, strict=False):
        values = [record[column.name] or 0.0 for record in rows]
        axis.barh(range(len(rows)), values, color=colour, height=0.62)
        low, high = min(0.0, *values), max(0.0, *values)
        axis.axvline(0.0, color="#333333", linewidth=0.8)
        for index, record in enumerate(rows):
            end = values[index]
            axis.annotate(
                cell_text(record[column.name], column),
                (end, index),
                xytext=(-4 if end < 0 else 4, 0),
                textcoords="offset points",
                va="center",
                ha="right" if end < 0 else "left",
            )
        room = 0.22 * (high - low or 1.0)
        axis.set_xlim(low - (room if low < 0 else 0.0), high + room)
        axis.set_xlabel(axis_label(column))
    return figure


def _speed(record: Record, before: str) -> str:
    """'1.13x f32' behind `before`; '' where it was not measured, or is the measure itself."""
    speed = record["speedup_vs_own_f32"]
    return "" if speed is None or record["precision"] == "f32" else f"{before}{speed:.2f}x f32"


def _caution(rows: Sequence[Record]) -> str:
    """A line for the time axis: milliseconds of runs at different moments must not be divided by each other."""
    shown = any(_speed(record, "") for record in rows)
    return "\nms are of each row's own run; x f32 is the ratio within one interleaved run" if shown else ""


def blank_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(rows: Sequence[Record], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of horizontal bars, the first record on top, its labels beside the first panel."""
    figure, axes = blank_figure(8.0 if panels == 1 else 10.5, max(1.8, 0.42 * len(rows) + 1.1), panels)
    for number, axis in enumerate(axes):
        axis.set_yticks(range(len(rows)), [_label(record) if number == 0 else "" for record in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.grid(True, axis="x", color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _time_axis(axes: Axes, times: Sequence[float]) -> None:
    if min(times) > 0 and max(times) / min(times) > _LOG_RATIO:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def axis_label(column: Column) -> str:
    arrow = {"lower": ", lower is better", "higher": ", higher is better"}.get(column.better, "")
    unit = f" ({column.unit})" if column.unit not in ("", "1") else ""
    return f"{column.name}{unit}{arrow}"


def _column(name: str) -> Column:
    return next(column for column in columns() if column.name == name)


def _label(record: Record) -> str:
    text = row_label(record)
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "…"
