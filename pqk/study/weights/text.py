"""Writes a study of weight quantization as plain text, `report`: aligned tables, grades, advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pqk.study.weights.closeness import METRICS

_HEADS = {
    "mae": "MAE",
    "mse": "MSE",
    "rmse": "RMSE",
    "psnr": "PSNR dB",
    "ce": "CE",
    "cosine": "cosine",
    "relative_error": "rel. error",
    "ssim": "SSIM",
}
DASH = "-"


def report(results: Mapping[str, Any], title: str) -> str:
    """Returns the report; results: as in `pqk.study.weights.result`."""
    rows, model, data, machine = (results[key] for key in ("rows", "model", "data", "machine"))
    lines = [
        title,
        "=" * len(title),
        f"model    {model['name']} ({model['family']}, {model['parameters'] / 1e6:.1f} M parameters)",
        f"data     {data['about']}",
        f"machine  {machine['device']}, {' '.join(machine['isa'])}",
        f"made     {results['made']}, commit {results['commit'] or DASH}",
        "",
        *_section("Size", _sizes(rows)),
    ]
    if any(row["engines"] for row in rows):
        lines += _section("Engines", _engines(rows))
    lines += _notes(rows, results["notes"])
    for output in next((row["outputs"] for row in rows if row["outputs"]), {}):
        lines += _section(f"{output}: against the float model", _closeness(rows, output))
    if any(row["quality"] for row in rows):
        lines += _section("Quality against ground truth", _quality(rows))
    lines += _section("Grades", _grades(rows))
    lines += [results["grades_from"], "", "Advice", "------"]
    for advice in results["advice"]:
        lines += [
            f"{advice['scenario']}: {advice['chosen'] or 'none'}",
            f"  {advice['why']}",
            f"  rule: {advice['rule']}",
        ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Returns aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in [head, *body]) for k in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(head), "  ".join("-" * width for width in widths), *map(line, body)]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, "-" * len(title), *lines, ""]


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["scheme", "MiB", "smaller", "of theory", "quantized in s"]
    body = []
    for row in rows:
        theory = row["theory_bytes"]
        body.append(
            [
                row["name"],
                f"{row['size_bytes'] / 2**20:.2f}",
                f"{row['compression']:.2f}x",
                DASH if theory is None else f"{row['size_bytes'] / theory:.4f}",
                _number(row["quantize_s"], ".2f"),
            ]
        )
    return table(head, body)


def _engines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each engine of each row; ratios are against the float engine of the same runtime."""
    head = ["scheme", "runtime", "MiB", "p50 ms", "p25 to p75", "x its float engine", "worst rel. error"]
    body = []
    for row in rows:
        for engine in row["engines"]:
            timed = engine["p50_ms"] is not None
            body.append(
                [
                    row["name"],
                    engine["runtime"] + (" (emulated)" if engine["measured"] == "emulated" else ""),
                    f"{engine['size_bytes'] / 2**20:.2f}",
                    _number(engine["p50_ms"], ".1f"),
                    f"{engine['p25_ms']:.1f} to {engine['p75_ms']:.1f}" if timed else DASH,
                    _interval(engine["speedup"]),
                    DASH if engine["relative_error"] is None else f"{100 * engine['relative_error']:.3g} %",
                ]
            )
    return table(head, body)


def _notes(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> list[str]:
    said = [f"{row['name']}: {row['compute']}" + (f"; {row['note']}" if row["note"] else "") for row in rows]
    by_what: dict[str, list[str]] = {}
    for row in rows:
        for engine in row["engines"]:
            by_what.setdefault(f"engine {engine['runtime']}: {engine['what']}", []).append(row["name"])
    engines = [f"{what} ({', '.join(names)})" for what, names in by_what.items()]
    return ["Computed as", *(f"  {line}" for line in [*said, *engines, *notes]), ""]


def _closeness(rows: Sequence[Mapping[str, Any]], output: str) -> list[str]:
    body = [
        [row["name"], *(_number(row["outputs"][output][metric], ".4g") for metric in METRICS)]
        for row in rows
        if row["outputs"]
    ]
    return table(["scheme", *(_HEADS[metric] for metric in METRICS)], body)


def _quality(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(next(row["quality"] for row in rows if row["quality"]))
    body = [
        [row["name"], *(_number(row["quality"][name], ".4g") for name in names), _interval(row["drop_pct"], "%")]
        for row in rows
        if row["quality"]
    ]
    return table(["scheme", *names, "drop"], body)


def _grades(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    graded = [row for row in rows if row["grades"]]
    names = list(graded[0]["grades"]) if graded else []
    metrics = [metric for metric in METRICS if any(row["grades"][name][metric] for row in graded for name in names)]
    body = [
        [f"{row['name']} {name}", *(row["grades"][name][metric] or DASH for metric in metrics)]
        for row in graded
        for name in names
    ]
    return table(["scheme and output", *(_HEADS[metric] for metric in metrics)], body)


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def _interval(found: Mapping[str, float | None] | None, unit: str = "") -> str:
    """Returns '1.20 [1.18, 1.22]', with a unit behind the value."""
    if found is None:
        return DASH
    sign = "+" if unit == "%" else ""
    value = f"{found['value']:{sign}.2f}{unit}"
    return value if found["low"] is None else f"{value} [{found['low']:{sign}.2f}, {found['high']:{sign}.2f}]"
