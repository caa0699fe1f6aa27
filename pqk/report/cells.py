"""Formats records for tables, plots and pages: columns, text of cells, order, and short names that differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pqk.record.formulas import escape_splits, holds_formula, safe_text
from pqk.record.schema import Column, columns, load_schema

Record = Mapping[str, Any]

DASH = "–"
_PRECISIONS = ("f32", "tf32", "bf16", "f16", "fp8", "int8", "int4")
_BARE = re.compile(r"[\w.:/%+-]+( [\w.:/%+-]+)*", re.ASCII)  # a CSV cell that needs no quotes


def ordered(records: Iterable[Record]) -> list[Record]:
    """Sorts by experiment (A2 before A10), role (Teacher first), backend, quantizer, precision (f32 first), time.

    Records that are equal in every field, such as one in two logs, count once.
    """
    roles = load_schema()["properties"]["role"]["enum"]

    def key(record: Record) -> tuple[Any, ...]:
        words = re.split(r"([0-9]+)", record["exp_id"])
        natural = [(int(word), "") if index % 2 else (-1, word) for index, word in enumerate(words)]
        precision = record["precision"] or ""
        rank = _PRECISIONS.index(precision) if precision in _PRECISIONS else len(_PRECISIONS)
        return (
            natural,
            roles.index(record["role"]),
            record["backend"] or "",
            record["quantizer"] or "",
            (rank, precision),
            record["datetime"],
            json.dumps(record, sort_keys=True),
        )

    unique = {json.dumps(record, sort_keys=True): record for record in records}
    return sorted(unique.values(), key=key)


def columns_of(records: Iterable[Record]) -> list[Column]:
    """Returns the columns of the schema, with the metrics that only these records' families have after its metrics.

    Units and directions of metrics are those in the records.
    """
    known: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for name, about in (record["metrics"] or {}).items():
            known.setdefault(name, []).append(about)
    shown = columns()
    place = 1 + max(index for index, column in enumerate(shown) if column.metric)
    named = {column.name for column in shown}
    shown[place:place] = [
        Column(name, "quality", "", "", ".4g", "A metric of the model's family.", "number", name, "", False, True)
        for name in known
        if name not in named
    ]
    return [_as_given(column, known[column.name]) if column.name in known else column for column in shown]


def _as_given(column: Column, found: Sequence[Mapping[str, Any]]) -> Column:
    units = dict.fromkeys(about["unit"] or "1" for about in found)
    return replace(column, unit=" or ".join(units), better=found[0]["better"])


def value_of(record: Record, name: str) -> Any:
    """Returns a record's value in a column of `columns_of`; None where it has none."""
    return record[name] if name in record else (record["metrics"] or {}).get(name, {}).get("value")


def headline(records: Iterable[Record]) -> list[Column]:
    """Returns the main metrics, and one metric that improves in the other direction if any: an error and a score."""
    rows = list(records)
    mains = {record["main_metric"] for record in rows}
    found = [c for c in columns_of(rows) if c.metric and any(value_of(record, c.name) is not None for record in rows)]
    chosen = [column for column in found if column.name in mains]
    others = [column for column in found if chosen and column.short and column.better != chosen[0].better]
    return list(dict.fromkeys([*chosen, *others[:1]]))


def cell_text(value: Any, column: Column) -> str:
    """Returns a value for people: numbers in the column's format, shares as 'int8 91 % / bf16 7 %', null as a dash."""
    if value is None or value == {} or value == []:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format(int(value) if column.format == "d" else value, column.format)
    if column.name == "executed_precision":
        return shares_text(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def interval_of(record: Record, name: str) -> tuple[float, float] | None:
    """Returns the 95 % interval (low, high) of a record's column; None where there is none."""
    ends = (record["intervals"] or {}).get(name)
    return None if ends is None else (min(ends), max(ends))


def interval_text(record: Record, column: Column) -> str:
    """Returns an interval for people: '±0.48', or '[+0.10, +1.62]' where its halves differ; '' for none."""
    value, ends = value_of(record, column.name), interval_of(record, column.name)
    if ends is None or not isinstance(value, int | float):
        return ""
    halves = [format(half, column.format.removeprefix("+")) for half in (value - ends[0], ends[1] - value)]
    if halves[0] == halves[1]:
        return f"±{halves[0]}"
    return f"[{ends[0]:{column.format}}, {ends[1]:{column.format}}]"


def value_text(record: Record, column: Column) -> str:
    """Returns a record's value with its interval, for people: '+0.77 ±0.48'."""
    return f"{cell_text(value_of(record, column.name), column)} {interval_text(record, column)}".rstrip()


def with_ends(records: Sequence[Record]) -> tuple[list[Column], list[Record]]:
    """Adds the ends of intervals, NAME_low and NAME_high, after each column of numbers that has any interval."""
    known = {name for record in records for name in record["intervals"] or {}}
    shown: list[Column] = []
    every = columns_of(records)
    for column in every:
        shown.append(column)
        if column.name in known and column.kind in ("number", "integer"):
            shown += [
                replace(
                    column,
                    name=f"{column.name}_{end}",
                    better="",
                    short="",
                    format=column.format if column.kind == "number" else "",
                    description=f"{word} end of the 95 % interval of {column.name}.",
                )
                for end, word in (("low", "Lower"), ("high", "Upper"))
            ]
    rows: list[Record] = []
    for record in records:
        ends: dict[str, float | None] = {}
        for name in known:
            ends[f"{name}_low"], ends[f"{name}_high"] = interval_of(record, name) or (None, None)
        rows.append({**{column.name: value_of(record, column.name) for column in every}, **ends})
    return shown, rows


def shares_text(shares: Mapping[str, float]) -> str:
    """Returns 'int8 91 % / bf16 7 %', the largest first; a share above zero that rounds to it reads '<1 %'."""
    parts = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    return " / ".join(
        f"{name} {'<1' if share < 0.005 else f'{share:.0%}'[:-1]} %" for name, share in parts if share > 0
    )


def best_rows(records: Sequence[Record]) -> dict[str, set[int]]:
    """Returns, for each column with a better direction, the indices of the rows with the best value.

    Only runs with status ok are compared, and only with those on the same scenes, evaluated in the same way. A column
    with fewer than two such rows, or with equal values, has no best.
    """
    fields: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        if record["status"] == "ok":
            fields.setdefault(_judged_on(record), []).append(index)
    best: dict[str, set[int]] = {}
    for column in columns_of(records):
        if not column.better:
            continue
        for indices in fields.values():
            found = {i: value_of(records[i], column.name) for i in indices}
            values = {i: value for i, value in found.items() if value is not None}
            if len(set(values.values())) > 1:
                target = (min if column.better == "lower" else max)(values.values())
                best.setdefault(column.name, set()).update(i for i, value in values.items() if value == target)
    return best


def hash_of(record: Record, name: str) -> str:
    """Returns the sha256 of one of the record's inputs, by name; '' where it is unknown."""
    return str((record["hashes"] or {}).get(name, ""))


def _judged_on(record: Record) -> str:
    """Returns a key that two records must share for their figures to be comparable."""
    reference = record["quality_reference"]
    truth = [reference, record["model"], hash_of(record, "model")] if reference == "teacher" else [reference]
    return json.dumps([record["scenes"], hash_of(record, "scenes"), hash_of(record, "eval"), *truth])


def told_apart(records: Sequence[Record], name: str) -> list[str] | None:
    """Returns each record's 'model' or 'scenes' in a few words, or None when it is the same in all.

    Different ones with the same name get the first digits of their sha256: 'mine 1f3a90'.
    """
    found = []
    for record in records:
        value = record[name]
        if isinstance(value, list):
            value = value[0] + (f" +{len(value) - 1}" if len(value) > 1 else "") if value else None
        found.append((json.dumps(record[name]), value or DASH, hash_of(record, name)))
    if len({(whole, digest) for whole, _, digest in found}) < 2:
        return None
    kinds: dict[str, set[tuple[str, str]]] = {}
    for whole, text, digest in found:
        kinds.setdefault(text, set()).add((whole, digest))
    return [f"{text} {digest[:6]}".strip() if len(kinds[text]) > 1 else text for _, text, digest in found]


def tool_text(record: Record) -> str:
    """Returns 'openvino/nncf', 'openvino', or '' when nothing is known."""
    return "/".join(record[key] for key in ("backend", "quantizer") if record[key])


def row_label(record: Record) -> str:
    """Returns a short name of a record for a plot or a message: 'B1 candidate int8 openvino/nncf'."""
    words = [record["exp_id"], record["role"], record["precision"], tool_text(record)]
    return printable(" ".join(word for word in words if word))


def printable(text: str) -> str:
    """Replaces control characters: a log must not move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Returns rows as CSV: null is empty, text cannot start a formula (see `safe_text`), everything else is JSON."""
    return "".join(",".join(_quoted(_csv_cell(value)) for value in row) + "\n" for row in rows)


def _quoted(text: str) -> str:
    """Quotes all but plain words and numbers, more than RFC 4180 requires: readers split at different characters."""
    return text if not text or _BARE.fullmatch(text) else '"' + text.replace('"', '""') + '"'


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return safe_text(value)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return escape_splits(text) if holds_formula(text) else text
