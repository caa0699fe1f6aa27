"""Checks the configs, task cards, plans and the log schema: the dry run. No model, no data, a second at most."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pqk import paths
from pqk.errors import EXIT_OK, PqkError, nearest
from pqk.families.contract import Family
from pqk.families.registry import family, names
from pqk.recipe.experiment import config_file, config_loaders, resolve
from pqk.settings.card import TEMPLATE, Card, list_cards, load_card, read_card
from pqk.settings.plan import list_plans, load_plan, ordered
from pqk.settings.preset import list_presets, load_expected, load_preset
from pqk.settings.quant import Quant
from pqk.settings.teacher import load_teacher_settings
from pqk.settings.workload import Workload
from pqk.settings.yamlfile import Spec, SpecError

MIN_CALIBRATION = 512
"""Fewest calibration images of the standard configs; cards (ablations) may ask for fewer."""


@dataclass(frozen=True)
class Finding:
    """One problem, as a sentence that names the file, the field and the value."""

    message: str


def dry_run(root: Path) -> list[Finding]:
    """Checks the configs, every card with its overrides and the points of its matrix, the plans, and a virtual record.

    Shape [1, 3, H, W] with H = W in {384, 512, 640}, k at least 1, thresholds in their ranges, all cards load and
    resolve, required cards exist without a circle, plans are complete, and a record with every field follows the log
    schema.
    Returns all problems; an empty list is a pass.
    """
    with contextlib.chdir(root):  # messages and the log schema are relative to the project
        return [Finding(message) for message in _problems(Path.cwd())]


def _problems(root: Path) -> Iterator[str]:
    try:
        teacher = load_teacher_settings(paths.configs(root) / "teacher.yaml")
        of = family(teacher.family)
    except PqkError as error:
        yield from _each(error)
        return
    yield from _beyond_model(teacher)
    others = [name for name in names() if name != of.name and (paths.configs(root) / name).is_dir()]
    families = [of, *map(family, others)]
    right = set()  # families whose configs can be read, so that cards can be resolved with them
    for known in families:
        problems: list[str] = []
        for name, load in config_loaders(known).items():
            try:
                spec = load(config_file(root, known, name))
            except PqkError as error:
                problems += _each(error)
                continue
            yield from _beyond_model(spec)
        yield from problems
        if not problems:
            right.add(known.name)
    cards: dict[str, Card] = {}
    for name in [*list_cards(root), TEMPLATE]:
        path = paths.task_cards(root) / f"{name}.md"
        if name == TEMPLATE and not path.exists():
            continue
        try:
            card = read_card(path) if name == TEMPLATE else load_card(name, root)
            cards[name] = card
            for axis in card.matrix.values():
                if axis.family is not None:
                    family(axis.family)  # raises for a name that there is not
            for meant in families if card.family is None else [family(card.family)]:
                if meant.name in right:
                    _resolve_all(
                        card, root, meant, paths.shown(path), "" if meant is of else f", for {meant.name} models"
                    )
        except PqkError as error:
            yield from _each(error)
    if not cards:
        yield f"{paths.shown(paths.task_cards(root))}: holds no task card"
    yield from _requirements(cards, set(list_cards(root)))
    for name in list_plans(root):
        try:
            ordered(load_plan(name, root), root)
        except PqkError as error:
            yield from _each(error)
    for name in list_presets(root):
        try:
            load_preset(name, root)
            load_expected(name, root)
        except PqkError as error:
            yield from _each(error)
    yield from _virtual_record(root)


def _resolve_all(card: Card, root: Path, of: Family, where: Path | str, whose: str) -> None:
    """Resolves a card and every point of its matrix for models of a family. Raises PqkError, whose messages end so."""
    try:
        resolve(card, root, of=of)
        for axis, point in card.points(of.name):
            settings = card.matrix[axis].points[point]
            resolve(card.at(axis, point), root, of=of, settings=settings, origin=f"{where}: {axis}: {point}")
    except PqkError as error:
        raise SpecError([f"{problem}{whose}" for problem in _each(error)]) from error


def _each(error: PqkError) -> tuple[str, ...]:
    return error.problems if isinstance(error, SpecError) else (str(error),)


def _beyond_model(spec: Spec) -> Iterator[str]:
    """Yields problems with the rules for the standard configs only, which experiments may break."""
    where = paths.shown(spec.source)
    version = str(spec.version)  # type: ignore[attr-defined]
    first = spec.source.read_text(encoding="utf-8-sig").split("\n", 1)[0]
    if not re.match(rf"#\s*v{re.escape(version)}\b", first):
        yield f"{where}:1: the first line must be a comment '# v{version}: what changed', got {first[:60]!r}"
    if isinstance(spec, Workload):
        yield from (f"{where}: {problem}" for problem in spec.problems())
    if isinstance(spec, Quant) and spec.ptq.calibration_images < MIN_CALIBRATION:
        images = spec.ptq.calibration_images
        yield f"{where}: ptq.calibration_images is {images} but must be at least {MIN_CALIBRATION}"


def _requirements(cards: dict[str, Card], known: set[str]) -> Iterator[str]:
    for card in cards.values():
        where = paths.shown(card.source)
        for other in card.requires:
            if other not in known:
                yield f"{where}: requires the card {other!r}, which is not there{nearest(other, known)}"

    def circle(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            return (*path[path.index(name) :], name)
        found = (circle(other, (*path, name)) for other in cards[name].requires if other in cards)
        return next((c for c in found if c), ())

    circles = {frozenset(c): c for c in (circle(name, ()) for name in cards) if c}
    for found in circles.values():
        yield f"task cards require each other in a circle: {' -> '.join(found)}"


def _virtual_record(root: Path) -> Iterator[str]:
    from pqk.record import schema

    path = paths.log_schema(root)
    if not path.is_file():
        yield f"{paths.shown(path)}: no such file"
        return
    try:
        record = schema.empty_record()
        record |= {"exp_id": "devcheck", "role": "candidate", "status": "ok", "measured": "engine"}
        record |= {
            "datetime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "t_pair_p50_ms": 1.0,
        }
        schema.validate(record, where=paths.shown(path))
    except PqkError as error:
        yield str(error)


def main() -> int:
    """Prints PASS, or one line for each problem, as linters do. Returns the exit code: 0, or 2."""
    try:
        root = paths.project_root()
        findings = dry_run(root)
    except PqkError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for finding in findings:
        print(finding.message)
    if findings:
        return PqkError.exit_code
    print(f"PASS: configs, {len(list_cards(root))} task cards and the log schema of {root}")
    return EXIT_OK
