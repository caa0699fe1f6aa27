"""Shows the predicted times of a card's rows, and beside them what this machine measured: `pqk profile --predict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.base import Precision, baselines_of
from pqk.bench.predict_speed import ERROR_PCT, Predicted, Predictor, Shaped
from pqk.files import sha256_json, write_json
from pqk.recipe.request import Request
from pqk.record.log import read_records
from pqk.settings.recipe import quantizes
from pqk.store.store import OnEvent


@dataclass(frozen=True)
class Row:
    """A row of a card's results: its model, its precision, and the prediction."""

    shaped: Shaped
    precision: Precision
    predicted: Predicted

    @property
    def engine(self) -> str:
        """Returns the hash by which a record names its engine; of a quantized row, that of its float graphs."""
        return sha256_json({name: graph.sha256 for name, graph in self.shaped.graphs.items()})


def predict_card(request: Request, root: Path, on_event: OnEvent, say: Callable[[str], None]) -> dict[str, Any]:
    """Predicts every row of a card's results; makes no engine of what the card's recipe ends with.

    Returns plain JSON: the rows with predicted p50, its spread and, where logs/ has a record of this machine, the
    measured p50 and the error of the prediction in percent. Raises Unpredictable, and the errors of `pqk run`.
    """
    predictor = Predictor(request, root, on_event, say)
    experiment, floats = predictor.experiment, baselines_of(predictor.backend)
    teacher = Shaped(experiment, predictor.teacher.name, predictor.graphs)
    asked = [(teacher, precision) for precision in floats]
    if experiment.card.recipe:
        shaped = predictor.shaped(experiment)
        own = [] if shaped.graphs == teacher.graphs else [(shaped, precision) for precision in floats]
        asked += own
        if quantizes(experiment.card.recipe):
            asked.append((shaped, Precision.INT8))
    rows = [Row(one, precision, predictor.of_shaped(one, precision)) for one, precision in asked]
    measured = _measured(rows, experiment.card.id, predictor, root)
    return {
        "card": experiment.card.id,
        "backend": predictor.backend.name,
        "device": predictor.ctx.machine["device"],
        "factors": {str(rest): predictor.factor(rest) for rest in dict.fromkeys(row.predicted.rest for row in rows)},
        "disturbed": predictor.disturbed,
        "rows": [_as_data(row, measured.get(number)) for number, row in enumerate(rows)],
    }


def _as_data(row: Row, record: Mapping[str, Any] | None) -> dict[str, Any]:
    found, measured = row.predicted, None if record is None else record["t_pair_p50_ms"]
    return {
        "model": row.shaped.name,
        "precision": str(row.precision),
        "predicted_p50_ms": found.ms,
        "predicted_spread_ms": [found.low, found.high],
        "forms": dict(found.forms),
        "parts": found.parts,
        "measured_p50_ms": measured,
        "measured_at": None if record is None else record["measured_at"],
        "disturbed": None if record is None else record["disturbed"],
        "error_pct": None if measured is None else 100 * (found.ms / measured - 1),
    }


def _measured(rows: list[Row], card: str, predictor: Predictor, root: Path) -> dict[int, dict[str, Any]]:
    """Returns the latest measured record of this machine for each row that has one, by the row's number.

    Records of floats are found by the hash of their graphs. That of an int8 row is of a run that has such a float
    record of the same model.
    """
    if not (root / "logs").is_dir():
        return {}
    machine = predictor.ctx.machine
    mine = [
        one.record
        for one in read_records(root / "logs")
        if one.record["t_pair_p50_ms"] is not None
        and (one.record["backend"], one.record["device"]) == (predictor.backend.name, machine["device"])
        and (one.record["cpu_quota"], one.record["versions"]) == (machine["cpu_quota"], machine["versions"])
    ]
    mine.sort(key=lambda record: str(record["measured_at"]))
    found: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        floats = [r for r in mine if (r["hashes"] or {}).get("engine") == row.engine and r["quantizer"] is None]
        if row.precision is Precision.INT8:
            runs = {r["run_id"] for r in floats}
            keep = list(row.shaped.experiment.quant.ptq.keep_list)
            same = [r for r in mine if r["run_id"] in runs and r["exp_id"] == card and r["precision"] == "int8"]
            floats = [r for r in same if r["keep_list"] == keep and r["model"] == row.shaped.name]
        else:
            floats = [r for r in floats if r["precision"] == str(row.precision)]
        if floats:
            found[number] = floats[-1]
    return found


def write_prediction(found: Mapping[str, Any], folder: Path) -> Path:
    """Writes CARD.predict.json; returns its path."""
    target = folder / f"{found['card']}.predict.json"
    write_json(target, dict(found))
    return target


def print_prediction(found: Mapping[str, Any], console: Any) -> None:
    """Prints a line for each row: predicted p50, its spread, what was measured, and the error."""
    from rich.table import Table

    table = Table(
        title=f"{found['card']} on {found['backend']}: milliseconds of a sample", title_justify="left", box=None
    )
    table.add_column("model", overflow="fold")
    for name in ("precision", "predicted p50", "quartiles", "measured p50", "error %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["rows"]:
        low, high = row["predicted_spread_ms"]
        known = row["measured_p50_ms"] is not None
        table.add_row(
            row["model"],
            row["precision"],
            f"{row['predicted_p50_ms']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['measured_p50_ms']:.1f}{' (disturbed)' if row['disturbed'] else ''}" if known else "–",
            f"{row['error_pct']:+.1f}" if known else "–",
        )
    console.print(table)
    for rest, factor in found["factors"].items():
        said = f"calibrated in {rest} by the Teacher's own time: a yardstick of its parts is {factor:.2f} ms"
        console.print(said, highlight=False)
    if found["disturbed"]:
        console.print("parts were timed while other processes used the cores; run it again on a quiet machine")
    if any(row["measured_p50_ms"] is None for row in found["rows"]):
        console.print(f"– : logs/ has no record of this machine; `pqk run {found['card']}` measures", highlight=False)
    far = [row for row in found["rows"] if row["error_pct"] is not None and abs(row["error_pct"]) > ERROR_PCT]
    for row in far:
        console.print(f"{row['model']} in {row['precision']}: further off than {ERROR_PCT:g} %", highlight=False)
