"""Lays a preset over a request, shows what it is expected to give, and makes these ranges (`pqk bench expect`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pqk import paths
from pqk.errors import EXIT_OK, PqkError
from pqk.files import write_text
from pqk.recipe.experiment import Experiment, experiment_family, resolve
from pqk.recipe.request import Request
from pqk.record.log import read_records
from pqk.report.expected import expected_text, key_of, matching_entry, print_expected, ranges_of
from pqk.settings.card import load_card
from pqk.settings.preset import expected_path, load_expected, load_preset

Record = dict[str, Any]


def laid_under(request: Request, preset: str, root: Path) -> Request:
    """Returns the request with the preset's settings below its own.

    Raises PqkError for a preset that is not there, or not for the model's family.
    """
    found, of = load_preset(preset, root), experiment_family(request.model, root).name
    if of not in found.families:
        raise PqkError(f"preset {preset} is for {' and '.join(found.families)}; the model is of the family {of}")
    return replace(request, settings={**found.settings, **request.settings})


def show_expected(preset: str, records: Sequence[Record], root: Path, console: Console) -> None:
    """Prints the expected ranges of a preset beside the records of a run, or why there are none."""
    try:
        entry, why = matching_entry(records, load_expected(preset, root))
    except PqkError as error:  # such as a damaged file: the run has its result all the same
        entry, why = None, str(error)
    if entry is None:
        console.print(f"preset {escape(preset)}: {escape(why)}", highlight=False)
    else:
        print_expected(records, entry, console)


def expect(card: str, preset: str, backend: str, logs: Sequence[Path]) -> int:
    """Runs `pqk bench expect`: writes the ranges of measured runs; their file is the last line of stdout."""
    root = paths.project_root()
    asked = resolve(load_card(card, root), root, settings=load_preset(preset, root).settings)
    runs: dict[str, list[Record]] = {}
    for folder in logs or [root / "logs"]:
        for item in read_records(folder):
            if _belongs(item.record, asked, backend):
                runs.setdefault(str(item.record["run_id"]), []).append(item.record)
    if not runs:
        raise PqkError(
            f"no record of {asked.card.id} with preset {preset} and backend {backend}: measure one with "
            f"pqk run {asked.card.id} --preset {preset} --backend {backend}"
        )
    newest = max(runs.values(), key=lambda run: run[-1]["datetime"])
    machine = key_of(newest[-1])["isa"]
    own = [run for run in runs.values() if all(key_of(record)["isa"] == machine for record in run)]
    entry = ranges_of(own)
    others = [known for known in load_expected(preset, root) if known.key != entry.key]
    path = expected_path(preset, root)
    write_text(path, expected_text(preset, [*others, entry]))
    print_expected(newest, entry, Console(stderr=True))
    print(paths.shown(path))
    return EXIT_OK


def _belongs(record: Record, asked: Experiment, backend: str) -> bool:
    """Returns whether a record was measured to its end with these configs."""
    hashes = record["hashes"] or {}
    want = {"workload": asked.workload.sha256, "eval": asked.evaluation.sha256}
    if record["quantizer"] is not None:
        want["quant"] = asked.quant.sha256
    return (
        record["exp_id"] == asked.card.id
        and record["backend"] == backend
        and record["status"] == "ok"
        and record["measured"] == "engine"
        and record["run_id"] is not None
        and all(hashes.get(name) == digest for name, digest in want.items())
    )
