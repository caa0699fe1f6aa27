"""Writes the Teacher's baseline report: its quality, efficiency and resources in every float precision.

The fields are those of the lab's experiment table (section 1: quality, efficiency, resources), from the records alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pqk.files import write_text
from pqk.record.log import record_filename
from pqk.record.schema import Column
from pqk.record.tsv import markdown_cell
from pqk.report.cells import DASH, Record, columns_of, interval_of, ordered, value_of

_SECTIONS = {"quality": "Quality", "efficiency": "Efficiency", "resources": "Resources"}
_ALWAYS = ("t_pair_p50_ms", "t_pair_p95_ms", "t_scene_s", "pairs_per_sec", "vram_GB", "params_M", "size_MB", "flops_G")
"""Fields that the lab's table asks for: shown also where they were not measured."""


def write_baseline(records: Sequence[Record], path: Path) -> Path:
    """Writes the report of the Teacher's rows of one run; the file is replaced."""
    write_text(path, baseline_text(records))
    return path


def baseline_text(records: Sequence[Record]) -> str:
    """Returns the report as Markdown: a column per precision, a dash where nothing was measured."""
    rows = ordered(records)
    first, known = rows[0], columns_of(rows)
    machine = first["machine"] or {}
    about = {
        "model": first["model"],
        "family": first["family"],
        "device": first["device"],
        "instruction sets": machine.get("isa"),
        "cores": machine.get("cores"),
        "backend": first["backend"],
        "workload, evaluation": f"v{first['workload_version']}, v{first['eval_version']}",
        "evaluated": f"{first['pairs']} samples of {len(first['scenes'] or ())} groups, eval seed {first['eval_seed']}",
        "quality against": first["quality_reference"],
        "main metric": first["main_metric"],
        "measured at": first["measured_at"] or first["datetime"],
        "commit": first["commit"],
        "run": first["run_id"],
    }
    lines = ["# Teacher baseline", ""]
    lines += ["Written by `scripts/baseline_eval.py` from the records of one run. What was not measured is a dash.", ""]
    lines += ["| what | value |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in about.items()]
    for group, title in _SECTIONS.items():
        shown = [column for column in known if column.group == group and _is_shown(column, rows)]
        head = ["field", "unit", *(_cell(row["precision"]) for row in rows)]
        lines += ["", f"## {title}", "", _line(head), _line(["---"] * len(head))]
        for column in shown:
            unit = "" if column.unit == "1" else column.unit
            lines.append(_line([f"`{column.name}`", unit, *(_value(row, column) for row in rows)]))
    lines += [
        "",
        "In brackets the 95 % interval: of a metric over groups, of a time over rounds. Speeds are medians of ",
    ]
    lines[-1] += "paired ratios."
    if any(row["disturbed"] for row in rows):
        lines += ["", "The timing was disturbed by other processes: its milliseconds are not to be quoted."]
    lines += ["", "## Evidence", "", _line(["record", "sha256 of the model"]), _line(["---", "---"])]
    lines += [
        _line([f"`logs/{record_filename(dict(row))}`", _cell((row["hashes"] or {}).get("model"))]) for row in rows
    ]
    versions = ", ".join(f"{name} {version}" for name, version in (first["versions"] or {}).items())
    return "\n".join([*lines, "", f"Versions: {_cell(versions)}", ""])


def _is_shown(column: Column, rows: Sequence[Record]) -> bool:
    if column.kind not in ("number", "integer"):
        return False
    return column.name in _ALWAYS or any(value_of(row, column.name) is not None for row in rows)


def _value(record: Record, column: Column) -> str:
    value, ends = value_of(record, column.name), interval_of(record, column.name)
    if value is None:
        return DASH
    text = format(int(value) if column.format == "d" else value, column.format)
    return text if ends is None else f"{text} [{ends[0]:{column.format}}, {ends[1]:{column.format}}]"


def _cell(value: object) -> str:
    return DASH if value is None else markdown_cell(str(value)) or DASH


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
