"""Reads presets, settings laid over a card's for another length of run, and what was measured with them.

configs/presets/NAME.yaml            the settings, as after --set
configs/presets/NAME.expected.yaml   ranges by card, backend and instruction set, written by `pqk bench expect`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pqk import paths
from pqk.errors import PqkError, nearest
from pqk.files import matching
from pqk.settings.card import CardId
from pqk.settings.yamlfile import Section, Spec, load_spec

_EXPECTED = ".expected"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class Preset(Spec):
    """Settings of a run by dotted names; those of the command line go over them. families: that have them all."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    title: Text
    families: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    settings: Annotated[dict[str, Any], Field(min_length=1)]

    @property
    def name(self) -> str:
        """Returns the file's name without .yaml."""
        return self._source.stem


class Range(Section):
    """The range of a column of one row of a run: lowest and highest that it may be."""

    role: Literal["teacher", "baseline", "candidate"]
    precision: Text
    column: Text
    low: float
    high: float


class Expected(Section):
    """What a card gave with a preset: on which machine, when, in how many runs, and made from what."""

    card: CardId
    backend: Text
    isa: Text
    device: Text
    cores: Annotated[int, Field(ge=1)]
    measured: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    runs: Annotated[int, Field(ge=1)]
    teacher_sha256: Sha256
    workload_sha256: Sha256
    eval_sha256: Sha256
    ranges: Annotated[tuple[Range, ...], Field(strict=False, min_length=1)]

    @property
    def key(self) -> tuple[str, ...]:
        """Returns what tells two entries of a file apart."""
        return self.card, self.backend, self.isa, self.teacher_sha256


class ExpectedFile(Spec):
    """The measured ranges of a preset."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    expected: Annotated[tuple[Expected, ...], Field(strict=False)]


def presets_folder(root: Path) -> Path:
    """Returns the folder of the presets."""
    return paths.configs(root) / "presets"


def list_presets(root: Path) -> list[str]:
    """Returns the names of the presets, sorted."""
    stems = [path.stem for path in matching(presets_folder(root), "*.yaml")]
    return [stem for stem in stems if not stem.endswith(_EXPECTED)]


def load_preset(name: str, root: Path) -> Preset:
    """Reads a preset by its name. Raises PqkError when there is none of that name, or it is invalid."""
    known = list_presets(root)
    if name not in known:
        where = paths.shown(presets_folder(root))
        raise PqkError(f"no preset {name!r} in {where}{nearest(name, known)}; presets: {', '.join(known) or 'none'}")
    return load_spec(Preset, presets_folder(root) / f"{name}.yaml", None, "", "preset")


def expected_path(name: str, root: Path) -> Path:
    """Returns where the measured ranges of a preset are kept."""
    return presets_folder(root) / f"{name}{_EXPECTED}.yaml"


def load_expected(name: str, root: Path) -> tuple[Expected, ...]:
    """Returns the measured ranges of a preset; empty where none were measured. Raises PqkError for an invalid file."""
    path = expected_path(name, root)
    if not path.is_file():
        return ()
    return load_spec(ExpectedFile, path, None, "", "expected").expected
