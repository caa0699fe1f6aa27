"""Finds what a report is about: the records of a card, a plan or a frozen deliverable, and the files beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pqk.errors import CheckFailed, PqkError, nearest
from pqk.files import matching
from pqk.paths import shown
from pqk.record.deliverable import MANIFEST, check_files
from pqk.record.log import Logged, read_records
from pqk.record.pair_scores import scores_in
from pqk.record.tsv import Row
from pqk.report.cells import Record, ordered
from pqk.report.page.recipes import Recipe, recipes_of
from pqk.settings.card import list_cards
from pqk.settings.plan import list_plans, load_plan

PLAN = "plan.json"


@dataclass(frozen=True)
class Found:
    """What a report shows.

    name: of the card, plan or deliverable; None: all records. place: what the report says it was made from. records:
    in the order of the table. files: the file of each record. reports: folders in which parity/, profile/, parts/ and
    ablation/ may lie. cards: whose files count there; None: all. recipes, rows: of a deliverable, with its evaluations.
    """

    name: str | None
    place: str
    records: tuple[Record, ...]
    files: tuple[Path, ...]
    reports: Path
    cards: tuple[str, ...] | None = None
    recipes: tuple[Recipe, ...] = ()
    rows: tuple[Row, ...] = ()
    title: str | None = None

    def holds(self, card: str) -> bool:
        """Returns whether files of a card belong to the report."""
        return self.cards is None or card in self.cards


def find(name: str | None, root: Path, logs: Path | None = None) -> Found:
    """Returns what `name` stands for: a card, a plan or a deliverable, looked up in this order; None: all records.

    Raises PqkError for an unknown name, and with the command to run first where there is no record; CheckFailed for a
    deliverable that was changed.
    """
    folder = logs or root / "logs"
    if name is None:
        kept = read_records(folder) if folder.is_dir() else []
        if not kept:
            raise PqkError(f"no records in {shown(folder)}; first: pqk run B1 --backend openvino")
        return _of_records(None, kept, root, shown(folder), None)
    frozen = _deliverable(name, root)
    cards, plans = list_cards(root), list_plans(root)
    if frozen is not None and name not in (*cards, *plans):
        return _of_deliverable(frozen, root)
    kept = read_records(folder) if folder.is_dir() else []
    recorded = {item.record["exp_id"] for item in kept}
    if name in cards or name in recorded:
        return _of_records(name, kept, root, shown(folder), (name,))
    if name in plans:
        plan = load_plan(name, root)
        chosen = tuple(dict.fromkeys(experiment.id for experiment in plan.experiments))
        return _of_records(name, kept, root, shown(folder), chosen, plan.title)
    frozen_names = _deliverables(root)
    lists = {"cards": cards, "plans": plans, "deliverables": frozen_names}
    told = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in lists.items())
    near = nearest(name, [*cards, *plans, *frozen_names])
    raise PqkError(f"{name[:80]!r} is no card, plan or deliverable here{near}; {told}")


def _of_records(
    name: str | None,
    kept: Sequence[Logged],
    root: Path,
    place: str,
    cards: tuple[str, ...] | None,
    title: str | None = None,
) -> Found:
    mine = [item for item in kept if cards is None or item.record["exp_id"] in cards]
    if not mine:
        is_plan = cards is not None and cards != (name,)
        first = f"pqk plan {name} --run" if is_plan else f"pqk run {name} --backend openvino"
        raise PqkError(f"no record of {name} in {place}; first: {first}")
    files = {json.dumps(item.record, sort_keys=True): item.source for item in mine}
    records = tuple(ordered(item.record for item in mine))
    sources = tuple(files[json.dumps(record, sort_keys=True)] for record in records)
    return Found(name, place, records, sources, root / "reports", cards, title=title)


def _deliverables(root: Path) -> list[str]:
    return [path.name for path in matching(root / "deliverables", "*") if (path / MANIFEST).is_file()]


def _deliverable(name: str, root: Path) -> Path | None:
    """Returns the folder of a deliverable, given by its name or as deliverables/NAME."""
    bare = name.rstrip("/").removeprefix("deliverables/")
    return root / "deliverables" / bare if bare in _deliverables(root) else None


def _of_deliverable(folder: Path, root: Path) -> Found:
    said, rows = check_files(folder)
    if said:
        raise CheckFailed(f"{shown(folder)} is not as it was frozen: {said[0]}")
    kept = read_records(folder / "records") if (folder / "records").is_dir() else []
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8")) if (folder / PLAN).is_file() else None
    recipes: tuple[Recipe, ...] = ()
    if plan is not None:
        named = {f"records/{item.source.name}": item.record for item in kept}
        recipes = tuple(recipes_of(plan, named, rows, scores_in(folder)))
    files = {json.dumps(item.record, sort_keys=True): item.source for item in kept}
    records = tuple(ordered(item.record for item in kept))
    sources = tuple(files[json.dumps(record, sort_keys=True)] for record in records)
    title = plan["title"] if plan is not None else None
    return Found(folder.name, shown(folder), records, sources, folder, None, recipes, tuple(rows), title)


def tables_below(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a folder that match, sorted; names that hold anything but plain characters are left out."""
    return [path for path in matching(folder, pattern) if re.fullmatch(r"[\w.+-]+", path.name) and path.is_file()]
