"""Gathers the table of the report: a row per record, with text, interval and sort key of each cell (`table_of`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pqk.record.schema import Column
from pqk.report.cells import (
    DASH,
    Record,
    best_rows,
    cell_text,
    columns_of,
    interval_text,
    printable,
    told_apart,
    tool_text,
    value_of,
)

Cell = dict[str, Any]
Words = Mapping[str, str]
_FILTERS = ("exp", "role", "precision", "toolchain", "verdict")


def labels_of(records: Sequence[Record]) -> list[str]:
    """Returns a short name for each record, in which words that all share are left out; every name occurs once.

    'B1 candidate int8'; with toolchain and train seed where records differ in them, else with a number.
    """
    tools = [tool_text(record) for record in records]
    named = [f"{r['exp_id']} {r['role']} {r['precision'] or ''}".rstrip() for r in records]
    if len({record["backend"] for record in records}) > 1 or len(set(zip(named, tools, strict=True))) > len(set(named)):
        named = [f"{name} {tool}".rstrip() for name, tool in zip(named, tools, strict=True)]
    for key, word in (("train_seed", "seed"), ("eval_seed", "eval seed"), ("model", "")):
        twice = {name for name in named if named.count(name) > 1}
        if len({record[key] for record in records}) > 1:
            named = [
                f"{name} {word} {record[key]}".replace("  ", " ") if name in twice and record[key] is not None else name
                for name, record in zip(named, records, strict=True)
            ]
    seen: dict[str, int] = {}
    found = []
    for name in named:
        seen[name] = seen.get(name, 0) + 1
        found.append(printable(name if seen[name] == 1 else f"{name} ({seen[name]})"))
    return found


def table_of(records: Sequence[Record], labels: Sequence[str], t: Words) -> dict[str, Any]:
    """Returns headings, rows and filters of the table; only columns in which a record has a value.

    A cell is {text, below, sort, best, kind}: `sort` is a number or a text, None sorts last; `below` is the interval.
    """
    rows = list(records)
    mains = {record["main_metric"] for record in rows}
    shown = [column for column in columns_of(rows) if column.short or column.name in mains]
    shown = [column for column in shown if column.group != "identity" and _tells(rows, column)]
    shown.sort(key=lambda column: _rank(column, mains))
    best = best_rows(rows)
    loose = [(t["model"], told_apart(rows, "model")), (t["scenes"], told_apart(rows, "scenes"))]
    seeds = [DASH if record["train_seed"] is None else str(record["train_seed"]) for record in rows]
    loose.append((t["seed"], seeds if len(set(seeds)) > 1 else None))
    headings = [_heading("#", "#"), *(_heading(t[name], t[name]) for name in ("exp", "role", "precision", "toolchain"))]
    headings += [_heading(name, name) for name, found in loose if found]
    headings += [_heading(_title(column), column.description, column.better) for column in shown]
    made = []
    for index, record in enumerate(rows):
        cells = [_cell(str(index + 1), index + 1), _cell(record["exp_id"]), _cell(_word(record["role"], t))]
        cells += [_cell(_asked(record, t), record["precision"] or ""), _cell(tool_text(record) or DASH)]
        cells += [_cell(found[index]) for _, found in loose if found]
        for column in shown:
            cells.append(_value(record, column, index in best.get(column.name, ()), t))
        made.append(
            {
                "cells": cells,
                "keys": _keys(record, t),
                "number": index + 1,
                "state": record["status"],
                "label": labels[index],
            }
        )
    return {"headings": headings, "rows": made, "filters": _filters(made)}


_FIRST = ("verdict", "quality_drop_pct")


def _rank(column: Column, mains: Collection[str | None]) -> int:
    """Returns a sort key: verdict and drop, main metrics, times and speeds, sizes, then the other metrics."""
    if column.name in _FIRST:
        return _FIRST.index(column.name)
    if column.name in mains:
        return 2
    return {"efficiency": 3, "resources": 4, "edge": 5}.get(column.group, 6)


def _tells(rows: Sequence[Record], column: Column) -> bool:
    """Returns whether a column has values, and a column of texts different ones."""
    values = [value_of(record, column.name) for record in rows]
    known = [value for value in values if value not in (None, {}, [])]
    text = column.kind == "string" and column.name != "verdict"
    return bool(known) and not (text and len(set(known)) == 1)


def _heading(text: str, about: str, better: str = "") -> dict[str, str]:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(better, "")
    return {"text": printable(text) + arrow, "about": about}


def _title(column: Column) -> str:
    """Returns the heading of a column with its unit, where the heading does not hold it already."""
    text = column.short or column.name
    unit = "" if column.unit in ("", "1", "x", "%") or column.unit in text.split() else column.unit
    return f"{text} ({unit})" if unit and column.name not in ("size_MB",) else text


def _cell(text: str, sort: Any = None, below: str = "", best: bool = False, kind: str = "text") -> Cell:
    shown = printable(text)
    return {
        "text": shown,
        "sort": shown if sort is None else sort,
        "below": printable(below),
        "best": best,
        "kind": kind,
    }


def _value(record: Record, column: Column, best: bool, t: Words) -> Cell:
    value = value_of(record, column.name)
    if column.name == "verdict":
        return _cell(t[value] if value else DASH, kind="verdict" if value else "text") | {"sort": value}
    if column.name == "executed_precision":
        shares = sorted((value or {}).items(), key=lambda item: -item[1])
        cell = _cell(cell_text(value, column), (value or {}).get("int8", 0.0), kind="shares")
        return cell | {"shares": [{"name": printable(name), "share": share} for name, share in shares if share > 0]}
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    cell = _cell(cell_text(value, column), value if numeric else None, interval_text(record, column), best)
    return cell | {"sort": value if numeric else None if value is None else cell["text"], "kind": _kind(column)}


def _kind(column: Column) -> str:
    return "number" if column.kind in ("number", "integer") else "text"


def _asked(record: Record, t: Words) -> str:
    """Returns the requested precision, with a mark for rows that were emulated, disturbed or did not end well."""
    marks = [t["emulated"]] if record["measured"] == "emulated" else []
    marks += [t["disturbed"]] if record["disturbed"] else []
    marks += [t.get(record["status"], record["status"])] if record["status"] not in ("ok", None) else []
    return ", ".join([record["precision"] or DASH, *marks])


def _word(word: str | None, t: Words) -> str:
    return t.get(word or "", word or DASH)


def _keys(record: Record, t: Words) -> dict[str, str]:
    return {
        "exp": printable(record["exp_id"]),
        "role": printable(_word(record["role"], t)),
        "precision": printable(record["precision"] or DASH),
        "toolchain": printable(tool_text(record) or DASH),
        "verdict": t[record["verdict"]] if record["verdict"] else DASH,
    }


def _filters(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lists to choose from, for each property in which rows differ."""
    found = []
    for place, name in enumerate(_FILTERS):
        values = list(dict.fromkeys(row["keys"][name] for row in rows))
        if len(values) > 1:
            found.append({"name": name, "place": place, "values": values})
    return found
