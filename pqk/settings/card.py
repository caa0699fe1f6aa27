"""Reads task cards, one experiment each, Markdown with YAML front matter, from schedule/TaskCards: `load_card`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pqk import paths
from pqk.errors import PqkError, nearest
from pqk.files import matching
from pqk.settings.recipe import check_stages, combo_of
from pqk.settings.yamlfile import Section, Spec, parse_yaml, read_text, validate

ID_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"
TEMPLATE = "TEMPLATE"
ABLATION = "Ablation"
_NOT_CARDS = {TEMPLATE, "README"}

CardId = Annotated[str, Field(pattern=ID_PATTERN)]
AxisName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
PointName = Annotated[str, Field(min_length=1, max_length=60)]


class Overrides(Section):
    """Changes to the configs for this card alone: nested or dotted keys."""

    workload: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)
    quant: dict[str, Any] = Field(default_factory=dict)
    distill: dict[str, Any] = Field(default_factory=dict)
    prune: dict[str, Any] = Field(default_factory=dict)
    joint: dict[str, Any] = Field(default_factory=dict)
    reduce: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_later_groups(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out groups that came later where they are empty: cards without them keep the sha256 that they had."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "reduce" or value}


class Budget(Section):
    """The budget of the card."""

    gpu_hours: Annotated[float, Field(gt=0, le=10_000)]


OfFamily = Annotated[str | None, Field(min_length=1, max_length=40)]


def _without_family(values: dict[str, Any]) -> dict[str, Any]:
    """Drops a family that is not given: sha256 sums from before there was one stay as they are."""
    return {name: value for name, value in values.items() if name != "family" or value is not None}


class Axis(Section):
    """One question of an ablation: its points differ in the named settings alone, for example
    {"128": {quant.ptq.calibration_images: 128}, "256": ...}. `recipe`: another one than the card's. family: of the
    models that it asks of, where its settings fit no other.
    """

    recipe: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    family: OfFamily = None
    points: Annotated[dict[PointName, dict[str, Any]], Field(min_length=1, max_length=100)]

    @field_validator("recipe")
    @classmethod
    def _known_stages(cls, stages: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if stages is None else check_stages(stages)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_family(handler(self))


class Card(Spec):
    """The front matter of a task card. `thresholds` and `stop_loss` change eval.yaml's sections of the same name.

    A card may tighten a line freely; loosening one needs its reason under `exceptions`, keyed by the dotted name.
    A card with a `matrix` is an ablation: one experiment for every point of every axis. family: of the models that the
    card is for, where its overrides fit no other; cards without one keep the sha256 that they had.
    """

    id: CardId
    title: Annotated[str, Field(min_length=1, max_length=200)]
    combo: Annotated[str, Field(min_length=1, max_length=40)]
    recipe: Annotated[tuple[str, ...], Field(strict=False)]
    goal: Annotated[str, Field(min_length=1)]
    family: OfFamily = None
    requires: Annotated[tuple[CardId, ...], Field(strict=False)] = ()
    overrides: Overrides = Field(default_factory=Overrides)
    thresholds: dict[str, float] = Field(default_factory=dict)
    stop_loss: dict[str, float | int] = Field(default_factory=dict)
    exceptions: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    matrix: Annotated[dict[AxisName, Axis], Field(max_length=50)] = Field(default_factory=dict)
    budget: Budget
    status: Literal["planned", "running", "done", "stopped"]
    _prose: str = PrivateAttr(default="")

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_family(handler(self))

    @field_validator("recipe")
    @classmethod
    def _known_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        return check_stages(stages)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.combo not in (combo_of(self.recipe), ABLATION):
            raise ValueError(
                f"combo is {self.combo!r} but must be {combo_of(self.recipe)!r}, as its recipe says, or {ABLATION!r}"
            )
        if self.matrix and self.combo != ABLATION:
            raise ValueError(f"a card with a matrix is of combo {ABLATION!r}, not {self.combo!r}")
        if self.id in self.requires:
            raise ValueError(f"requires names the card itself, {self.id!r}")
        return self

    def points(self, of: str | None = None) -> list[tuple[str, str]]:
        """Returns (axis, point) of the matrix, in the order of the card; of: of the axes for models of this family."""
        axes = {axis: found for axis, found in self.matrix.items() if of is None or found.family in (None, of)}
        return [(axis, point) for axis, found in axes.items() for point in found.points]

    def at(self, axis: str, point: str, of: str | None = None) -> Card:
        """Returns the card of one point: its name after the id, the axis' recipe, no matrix.

        of: the model's family. `resolve` lays its settings over it. Raises PqkError for an axis or a point that the
        matrix does not have, and for an axis for models of another family.
        """
        if axis not in self.matrix:
            known = ", ".join(self.matrix) or "none"
            raise PqkError(f"card {self.id} has no axis {axis!r}{nearest(axis, self.matrix)}; axes: {known}")
        found = self.matrix[axis]
        if of is not None and found.family not in (None, of):
            raise PqkError(f"axis {axis} of card {self.id} is for models of family {found.family!r}, not {of!r}")
        if point not in found.points:
            raise PqkError(f"axis {axis} of card {self.id} has no point {point!r}{nearest(point, found.points)}")
        return self.model_copy(
            update={"id": f"{self.id} {axis}: {point}", "recipe": found.recipe or self.recipe, "matrix": {}}
        )

    @property
    def prose(self) -> str:
        """Returns the Markdown after the front matter."""
        return self._prose


def list_cards(root: Path | None = None) -> list[str]:
    """Returns the ids of the cards in schedule/TaskCards, sorted, without the template and a README."""
    folder = paths.task_cards(root or paths.project_root())
    stems = (path.stem for path in matching(folder, "*.md"))
    return sorted(stem for stem in stems if re.match(ID_PATTERN, stem) and stem not in _NOT_CARDS)


def load_card(name: str | Path, root: Path | None = None) -> Card:
    """Reads a card by its id ('B1'), or by the path of a .md file inside the project's schedule/TaskCards.

    Raises PqkError when there is no such card, it lies elsewhere, or its front matter is invalid.
    """
    base = root or paths.project_root()
    folder = paths.task_cards(base)
    text = str(name)
    if text.endswith(".md"):
        path = Path(text)
        if not path.is_absolute() and not path.exists() and (base / path).exists():
            path = base / path
    elif re.fullmatch(ID_PATTERN, text) and "\n" not in text:
        path = folder / f"{text}.md"
    else:
        raise PqkError(
            f"card {text!r} is not a card's id: a letter, then up to 31 letters, digits, '_' or '-'"
            f"{nearest(text, list_cards(base))}"
        )
    resolved = path.resolve()
    if resolved.parent != folder.resolve():
        raise PqkError(f"card {text!r} lies outside {paths.shown(folder)}; move it there")
    if path.stem in _NOT_CARDS:
        raise PqkError(f"{path.stem}.md is not a card; copy {TEMPLATE}.md to a new name and fill it in")
    if not path.is_file():
        known = list_cards(base)
        raise PqkError(
            f"there is no card {path.stem!r} in {paths.shown(folder)}{nearest(path.stem, known)}; "
            f"cards: {', '.join(known) or 'none'}"
        )
    return read_card(path)


def read_card(path: Path) -> Card:
    """Reads one card file; its id must be the file's name without .md. Raises PqkError."""
    where = paths.shown(path)
    lines = read_text(path).splitlines()
    if not lines or lines[0].rstrip() != "---":
        raise PqkError(f"{where}:1: a card begins with YAML front matter between two lines '---'")
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        raise PqkError(f"{where}: the front matter has no closing line '---'")
    document = parse_yaml("\n".join(lines[1:end]) + "\n", where, first_line=2)
    card = validate(Card, document, path)
    if card.id != path.stem:
        line = document.lines[("id",)]
        raise PqkError(f"{where}:{line}: id is {card.id!r} but must be {path.stem!r}, as the file is named")
    card._prose = "\n".join(lines[end + 1 :]).strip() + "\n"
    return card
