"""Runs `pqk verify`, and prints what is wrong with a deliverable."""

from __future__ import annotations

import json
from pathlib import Path

from pqk import paths
from pqk.errors import PqkError
from pqk.record.deliverable import MANIFEST, safe_name
from pqk.record.verify import RULES, verify
from pqk.report.cells import printable
from pqk.result import note


def run_verify(name: str, as_json: bool) -> int:
    """Checks a deliverable; a line per fault, the most telling first. Returns the exit code of its rule, or 0.

    name: a folder in deliverables/, or the path of a folder. Raises PqkError when it is no deliverable.
    """
    folder = folder_of(name)
    found = verify(folder)
    shown = printable(paths.shown(folder))
    if as_json:
        faults = [{"rule": f.rule, "exit_code": RULES[f.rule], "sentence": f.sentence} for f in found.faults]
        counts = {"files": found.files, "runs": found.runs, "scored": found.scored, "records": found.records}
        print(json.dumps({"deliverable": shown, "exit_code": found.exit_code, "faults": faults, **counts}))
    else:
        for fault in found.faults:
            print(f"{fault.rule}: {printable(fault.sentence)}")
        if not found.faults:
            print(
                f"{shown}: {found.files} files, {found.runs} runs, {found.scored} of them with the scores of their "
                f"samples, {found.records} records: nothing differs"
            )
    if found.faults:
        note(why=found.faults[0].sentence)
    return found.exit_code


def folder_of(name: str) -> Path:
    """Returns the folder of a deliverable. Raises PqkError for a name that is none, and a folder that is not there."""
    path = Path(name)
    if (path / MANIFEST).is_file():
        return path
    if path.is_dir() or "/" in name:
        raise PqkError(f"{name} is not a deliverable: it has no {MANIFEST}")
    return paths.project_root() / "deliverables" / safe_name(name, "deliverable")
