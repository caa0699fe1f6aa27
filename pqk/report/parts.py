"""Shows size and time before and after a change, part by part: a table in the terminal, and all parts as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.files import write_text
from pqk.report.cells import DASH, csv_text

if TYPE_CHECKING:
    from rich.console import Console

    from pqk.recipe.block_profile import PartChange

_HEADING = (
    "part",
    "kind",
    "params_before",
    "params_after",
    "f32_MB_before",
    "f32_MB_after",
    "gflops_before",
    "gflops_after",
    "time_before_ms",
    "time_after_ms",
    "time_ratio_least",
    "time_ratio_median",
    "time_ratio_greatest",
    "faster",
)


def print_parts(rows: Sequence[PartChange], console: Console) -> None:
    """Prints a row per kind of part, 80 columns wide: size and time after the cut, and their changes."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title_justify="left")
    table.title = "after the change, part by part (f32 engines)"
    table.add_column("part", no_wrap=True)
    for name in ("M params", "", "GFLOPs", "", "ms", "", "times", "of rounds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.name != row.kind:
            continue
        time = (DASH, "") if row.time_ms is None else (f"{row.time_ms[1]:.1f}", _share(*row.time_ms))
        ratio, spread = DASH, ""
        if row.ratio is not None:
            ratio, spread = f"{row.ratio[1]:.2f}x", f"{row.ratio[0]:.2f}-{row.ratio[2]:.2f}"
        if row.cut and row.faster is False:
            spread += " no faster"
        table.add_row(
            row.name,
            f"{row.params[1] / 1e6:.2f}",
            _share(*row.params),
            f"{row.flops[1] / 1e9:.1f}",
            _share(*row.flops),
            *time,
            ratio,
            spread,
        )
    console.print(table)


def _share(before: float, after: float) -> str:
    """Returns '-37 %', or '' where nothing changed."""
    change = 100 * (after / before - 1) if before else 0.0
    return f"{change:+.0f} %" if round(change) else ""


def write_parts(rows: Sequence[PartChange], path: Path) -> Path:
    """Writes all kinds and parts as CSV, with empty cells where nothing was timed; returns the file.

    FLOPs (two per multiply-add) and milliseconds are those of one pair, two encodings and one decoding; the ratio of
    times is computed within each round, and a part is `faster` when the ratio is below 1 in every round.
    """
    lines: list[list[Any]] = [list(_HEADING)]
    for row in rows:
        sizes = [round(4 * count / 1e6, 6) for count in row.params]
        flops = [round(count / 1e9, 6) for count in row.flops]
        times = [round(ms, 3) for ms in row.time_ms] if row.time_ms else [None, None]
        ratio = [round(value, 4) for value in row.ratio] if row.ratio else [None, None, None]
        lines.append([row.name, row.kind, *row.params, *sizes, *flops, *times, *ratio, row.faster])
    write_text(path, csv_text(lines))
    return path
