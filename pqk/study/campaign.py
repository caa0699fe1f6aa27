"""Gathers the files of a plan for a deliverable: the planned runs, the records of each, the tables of ablations.

plan.json             each planned run: card, seeds, status, and the record of its candidate
records/*.json        of every run: Teacher, baselines and candidate, as in logs/
ablation/AXIS.*       of a card with a matrix: its table and its figure
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.files import matching
from pqk.recipe.experiment import Experiment, resolve
from pqk.recipe.verdict import drop_limit
from pqk.record.log import read_records, record_filename
from pqk.settings.plan import Step, load_plan, ordered
from pqk.settings.seeds import parse_seeds
from pqk.study.execute_plan import Progressed, asked_backend, progress

Record = dict[str, Any]
RECORDS, ABLATION = "records", "ablation"


def gather(name: str, root: Path, backend: str | None) -> tuple[list[Path], dict[str, bytes]]:
    """Returns the ledgers of a plan, and the other files of its deliverable: contents by relative name.

    backend: default: the backend of the plan's last run, else openvino. Raises PqkError when the plan does not exist or
    has no ledger.
    """
    plan = load_plan(name, root)
    steps = ordered(plan, root)
    backend = backend or asked_backend(plan, root) or "openvino"
    ledgers = [path for path in ledgers_of(steps, backend, root) if path.is_file()]
    if not ledgers:
        raise PqkError(f"plan {name} has no ledger in results/ yet; make them with pqk plan {name} --run")
    logs = root / "logs"
    records = [item.record for item in read_records(logs)] if logs.is_dir() else []
    files: dict[str, bytes] = {}
    rows = []
    for item in progress(plan, steps, root):
        if item.step.card is not None and item.step.card.matrix:
            files |= _ablation(item.step.card.id, root)
            rows.append(_row(item, None, {}))
            continue
        found = _records_of(item.step, records, backend, root)
        named = {f"{RECORDS}/{record_filename(record)}": record for record in found}
        files |= {path: _text(record) for path, record in named.items()}
        rows.append(_row(item, _experiment(item.step, root), named))
    about = {"plan": plan.name, "title": plan.title, "goal": plan.goal, "backend": backend, "rows": rows}
    about["targets"] = [target.model_dump(mode="json") for target in plan.targets]
    return ledgers, {"plan.json": _text(about), **files}


def ledgers_of(steps: Sequence[Step], backend: str, root: Path) -> list[Path]:
    """Returns the paths of a plan's ledgers: one for each card, and one for the Teacher."""
    names = dict.fromkeys(step.id if step.card is None else step.card.id for step in steps if step.eval_seeds)
    return [root / "results" / f"{name}.{backend}.tsv" for name in names]


def _experiment(step: Step, root: Path) -> Experiment | None:
    return None if step.card is None else resolve(step.card, root, settings=step.settings)


def _row(item: Progressed, experiment: Experiment | None, records: dict[str, Record]) -> Record:
    """Returns a planned run as plain data. `records`: by file name; the candidate is the last of them."""
    step = item.step
    seed = experiment.workload.seeds.train if experiment else None
    chosen = [path for path, record in records.items() if record["role"] == "candidate"]
    teachers = [path for path, record in records.items() if record["role"] == "teacher"]
    return {
        "id": step.id,
        "card": step.card.id if step.card else None,
        "combo": step.combo or None,
        "what": step.what,
        "matrix": bool(step.card and step.card.matrix),
        "train_seed": seed,
        "eval_seeds": list(parse_seeds(step.eval_seeds)) if step.eval_seeds else [],
        "drop_limit_pct": drop_limit(experiment.card.recipe, experiment.evaluation.thresholds) if experiment else None,
        "status": item.status,
        "detail": item.detail or None,
        "candidate": chosen[0] if chosen else None,
        "teachers": teachers,
    }


def _records_of(step: Step, records: Sequence[Record], backend: str, root: Path) -> list[Record]:
    """Returns the records of a step's run: Teacher, baselines, candidate; empty without a run with the present configs.

    Of several candidates, such as those of the rollback table, only the newest is returned, with the other rows of its
    run. Records of schema 1.0 have no run_id: then all other rows that belong to the step are returned.
    """
    experiment = _experiment(step, root)
    if experiment is None:
        return []
    asked = {"workload": experiment.workload.sha256, "eval": experiment.evaluation.sha256}
    methods = {name: getattr(experiment, name) for name in ("quant", "prune", "distill", "joint", "reduce")}

    def belongs(record: Record) -> bool:
        hashes = record["hashes"] or {}
        same = record["exp_id"] == experiment.card.id and record["backend"] == backend
        made = {name: spec.sha256 for name, spec in methods.items() if name in hashes}
        if record["quantizer"] is None:
            made.pop("quant", None)  # a model that was not quantized does not depend on the quantization settings
        return same and all(hashes.get(key) == value for key, value in (asked | made).items())

    own = [record for record in records if belongs(record)]
    candidates = sorted((r for r in own if r["role"] == "candidate"), key=lambda r: r["datetime"])
    runs = {r["run_id"] for r in candidates[-1:]} - {None}
    return [r for r in own if r["role"] != "candidate" and (not runs or r["run_id"] in runs)] + candidates[-1:]


def _ablation(card: str, root: Path) -> dict[str, bytes]:
    folder = root / "reports" / "ablation" / card
    found = [path for path in matching(folder, "*.*") if path.suffix in (".csv", ".md", ".png")]
    return {f"{ABLATION}/{path.name}": path.read_bytes() for path in found}


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
