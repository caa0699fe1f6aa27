"""Gathers what lies beside the records: parity and its ranking, time per part, ablations; commands and environment."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.oserrors import cannot_read
from pqk.report.cells import DASH, Record, printable
from pqk.report.html.charts import Chart, intervals
from pqk.report.html.rows import Words
from pqk.report.html.sources import Found, tables_below

_SHOWN_NODES = 12
_PARITY = (
    ("side", "side"),
    ("against", "against"),
    ("measured", "run_as"),
    ("executed", "executed"),
    ("metric", ""),
    ("metric_drop_pct", "drop %"),
    ("t_pair_p50_ms", "p50 ms"),
    ("size_MB", "MB"),
    ("points", "points_rel"),
    ("values", "values_rel"),
    ("moved", "moved"),
)
"""Columns of a level of parity, and the names of their headings; those of the last three are `_worst`."""
_PART_COLUMNS: tuple[str, ...] = (
    "part",
    "params_before",
    "params_after",
    "gflops_before",
    "gflops_after",
    "time_before_ms",
)
_PART_COLUMNS += ("time_after_ms", "time_ratio_least", "time_ratio_median", "time_ratio_greatest")


Table = dict[str, Any]


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Table:
    """Returns a plain table; numbers get six significant digits at most, null a dash."""
    return {
        "title": printable(title),
        "note": note,
        "headings": [printable(heading) for heading in headings],
        "rows": [[_text(value) for value in row] for row in rows],
    }


def _text(value: Any) -> dict[str, Any]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or value == "":
        return {"text": DASH, "number": False}
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return {"text": printable(text), "number": number}


def parity_of(found: Found, t: Words) -> list[dict[str, Any]]:
    """Returns per card with a parity report: verdicts, a table per level, and the ranking of --explain or None."""
    cards = []
    for path in tables_below(found.reports / "parity", "*.json"):
        data = _json(path)
        if not (isinstance(data, dict) and isinstance(data.get("card"), str) and found.holds(data["card"])):
            continue
        levels = []
        for verdict in _list(data, "verdicts"):
            rows = [row for row in _list(data, "rows") if row.get("level") == verdict.get("level")]
            lines = [{**row, **_worst(row)} for row in rows]
            shown = [(name, word) for name, word in _PARITY if any(line.get(name) is not None for line in lines)]
            headings = [str(data.get("metric")) if name == "metric" else t.get(word, word) for name, word in shown]
            cells = [[line.get(name) for name, _ in shown] for line in lines]
            levels.append(
                {
                    "level": printable(str(verdict.get("level"))),
                    "verdict": printable(t.get(str(verdict.get("verdict")), str(verdict.get("verdict")))),
                    "kind": {"agree": "pass", "differ": "fail"}.get(str(verdict.get("verdict")), "undecided"),
                    "sentences": [printable(str(said)) for said in verdict.get("sentences") or ()],
                    "table": table("", headings, cells),
                    "notes": [f"{row.get('side')}: {row['note']}" for row in rows if row.get("note")],
                }
            )
        cards.append(
            {"card": printable(data["card"]), "levels": levels, "explained": _explained(data.get("explanation"))}
        )
    return cards


def _worst(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the largest relative error of outputs of points and of plain values, and of points the share that moved.

    Only an output of points has a share that moved.
    """
    outputs = [name.removesuffix(".relative") for name in row if name.endswith(".relative")]
    found: dict[str, list[float]] = {"points": [], "values": [], "moved": []}
    for name in outputs:
        relative, moved = row[f"{name}.relative"], row.get(f"{name}.moved")
        if relative is not None:
            found["values" if moved is None else "points"].append(float(relative))
        if moved is not None:
            found["moved"].append(100.0 * float(moved))
    return {name: max(values) if values else None for name, values in found.items()}


def _explained(explanation: Any) -> list[dict[str, Any]] | None:
    """Returns the ranking of each side: its sentence, and parts and nodes with their share of the final error."""
    if not isinstance(explanation, dict):
        return None
    sides = []
    for side, found in explanation.items():
        ranked = []
        for kind in ("groups", "nodes"):
            rows = [row for row in found.get(kind) or () if isinstance(row.get("of_all"), int | float)]
            ranked.append(
                [
                    {
                        "graph": printable(str(r.get("graph"))),
                        "name": printable(str(r.get("name"))),
                        "share": r["of_all"],
                    }
                    for r in rows[:_SHOWN_NODES]
                ]
            )
        parted = [f"{g}: {said}" for g, said in (found.get("parted") or {}).items() if said]
        sides.append(
            {
                "side": printable(side),
                "sentence": printable(str(found.get("sentence") or "")),
                "parted": [printable(text) for text in parted],
                "ranked": [rows for rows in ranked if rows],
            }
        )
    return sides


def blocks_of(found: Found, t: Words) -> list[Table]:
    """Returns the tables of `reports/parts` and `reports/profile`: time and size of every kind of part."""
    tables = []
    for path in tables_below(found.reports / "parts", "*.csv"):
        card = path.stem.rpartition("-")[0]
        if not found.holds(card):
            continue
        heading, *rows = _csv(path)
        if not {"part", "kind"} <= set(heading):
            continue
        lines = [dict(zip(heading, row, strict=False)) for row in rows]
        kinds = [line for line in lines if line["part"] == line["kind"]]
        shown = [name for name in _PART_COLUMNS if name in heading and any(line.get(name) for line in kinds)]
        cells = [[_number(line.get(name, "")) for name in shown] for line in kinds]
        tables.append(
            table(path.stem, [t["part"] if name == "part" else name for name in shown], cells, t["parts_note"])
        )
    for path in tables_below(found.reports / "profile", "*.json"):
        data = _json(path)
        if not (isinstance(data, dict) and "parts" in data and found.holds(str(data.get("card")))):
            continue
        rows_ = [
            [
                name,
                row.get("gflop"),
                row.get("f32_ms"),
                row.get("int8_ms"),
                _ratio(row.get("f32_ms"), row.get("int8_ms")),
            ]
            for section in ("parts", "classes")
            for name, row in data[section].items()
        ]
        said = " ".join(f"{str(sentence).rstrip('.')}." for sentence in data.get("why") or ())
        title = f"{data.get('card')} {data.get('backend')}"
        headings = [t["part"], "GFLOP", "f32 ms", "int8 ms", "f32 / int8"]
        tables.append(table(title, headings, rows_, f"{t['profile_note']} {printable(said)}"))
    return tables


def _ratio(first: float | None, second: float | None) -> float | None:
    return round(first / second, 3) if first is not None and second else None


def ablations_of(found: Found, t: Words) -> list[dict[str, Any]]:
    """Returns per axis a table and, where points have a drop, a chart; of reports/ablation/CARD or a deliverable."""
    base = found.reports / "ablation"
    folders = [base, *(path for path in sorted(base.iterdir()) if path.is_dir())] if base.is_dir() else []
    made: list[dict[str, Any]] = []
    for folder in folders:
        if folder != base and not found.holds(folder.name):
            continue
        for path in tables_below(folder, "*.csv"):
            heading, *rows = _csv(path)
            if not heading or heading[0] != "point":
                continue
            lines = [dict(zip(heading, row, strict=False)) for row in rows]
            shown = [name for name in heading if not name.endswith(("_low", "_high"))]
            cells = [[_with_ends(line, name) for name in shown] for line in lines]
            title = path.stem if folder == base else f"{folder.name} {path.stem}"
            cards = table(title, [t["point"], *shown[1:]], cells)
            made.append({"table": cards, "chart": _drops(f"ablation-{len(made)}", title, lines, t)})
    return made


def _drops(name: str, title: str, lines: Sequence[Mapping[str, str]], t: Words) -> Chart | None:
    column = "quality_drop_pct"
    rows = [
        (line["point"], value, _float(line.get(f"{column}_low")), _float(line.get(f"{column}_high")))
        for line in lines
        if (value := _float(line.get(column))) is not None
    ]
    return intervals(name, title, rows, t["drop_axis"]) if rows else None


def _with_ends(line: Mapping[str, str], name: str) -> Any:
    value, low, high = (_number(line.get(key, "")) for key in (name, f"{name}_low", f"{name}_high"))
    if isinstance(value, float) and isinstance(low, float) and isinstance(high, float):
        return f"{value:.4g} [{low:.4g}, {high:.4g}]"
    return value


def _float(text: str | None) -> float | None:
    value = _number(text or "")
    return float(value) if isinstance(value, int | float) else None


def _number(text: str) -> Any:
    """Returns a number of a CSV cell, else its text, without the apostrophe before what might be a formula."""
    try:
        value = float(text)
    except ValueError:
        return text.removeprefix("'")
    return int(value) if text.lstrip("-").isdigit() else value


def evidence_of(
    records: Sequence[Record], labels: Sequence[str], files: Sequence[Path], t: Words
) -> list[dict[str, Any]]:
    """Returns per row the command that makes it again, and the digests, seeds and versions that it was made from."""
    made = []
    for record, label, file in zip(records, labels, files, strict=True):
        facts: list[tuple[str, Any]] = [("run_id", record["run_id"]), ("measured_at", record["measured_at"])]
        facts += [("datetime", record["datetime"]), ("commit", record["commit"])]
        facts += [("measured_commit", record["measured_commit"]), ("workload", record["workload_version"])]
        facts += [("eval", record["eval_version"]), ("train_seed", record["train_seed"])]
        facts += [("eval_seed", record["eval_seed"]), ("model", record["model"])]
        facts += [(f"sha256 {name}", digest) for name, digest in sorted((record["hashes"] or {}).items())]
        facts += [("notes", record["notes"]), ("file", file.name)]
        made.append(
            {
                "label": label,
                "command": command_of(record),
                "given": record["command"] is not None,
                "checkout": _checkout(record),
                "facts": [(name, printable(str(value))) for name, value in facts if value is not None],
            }
        )
    return made


def command_of(record: Record) -> str:
    """Returns the command that made a record; of one before schema 2.1 what it tells: card, toolchain, seeds."""
    if record["command"] is not None:
        return printable(record["command"])
    words = ["pqk", "run", record["exp_id"]]
    words += ["--backend", record["backend"]] if record["backend"] else []
    words += ["--quantizer", record["quantizer"]] if record["quantizer"] else []
    train, evaluation = record["train_seed"], record["eval_seed"]
    if train is not None and train == evaluation:
        words += ["--seed", str(train)] if train else []
    else:
        words += ["--set", f"workload.seeds.train={train}"] if train else []
        words += ["--set", f"workload.seeds.eval={evaluation}"] if evaluation else []
    return printable(shlex.join(words))


def _checkout(record: Record) -> str | None:
    commit = record["measured_commit"] or record["commit"]
    if not commit or commit.endswith("-dirty"):
        return None
    return printable(shlex.join(["git", "checkout", commit]))


def environments_of(records: Sequence[Record], t: Words) -> list[dict[str, Any]]:
    """Returns each machine with its versions, and the numbers of the rows that were measured there."""
    found: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(records, 1):
        machine = {"device": record["device"], **(record["machine"] or {})}
        if record["cpu_quota"] is not None:
            machine.setdefault("cpu_quota", record["cpu_quota"])
        key = json.dumps([machine, record["versions"]], sort_keys=True)
        known = found.setdefault(key, {"machine": machine, "versions": record["versions"] or {}, "rows": []})
        known["rows"].append(number)
    return [
        {
            "rows": _ranges(each["rows"]),
            "machine": [(printable(str(k)), printable(_plain(v))) for k, v in each["machine"].items() if v is not None],
            "versions": [(printable(str(k)), printable(_plain(v))) for k, v in each["versions"].items()],
        }
        for each in found.values()
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ranges(numbers: Sequence[int]) -> str:
    """Returns '1-3, 5'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _list(data: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [item for item in data.get(name) or () if isinstance(item, dict)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error
    except (ValueError, RecursionError):
        return None  # no report of pqk: the section says that there is none


def _csv(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return [row for row in csv.reader(stream) if row] or [[]]
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error
    except (ValueError, csv.Error):
        return [[]]
