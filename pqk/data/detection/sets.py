"""Opens detection sets by the names that a YAML file gives them: `open_set`.

street:
  kind: coco                  # coco, lvis, objects365, voc or crowdhuman
  images: street/images       # folders and files are relative to the folder of this file
  annotations: street/train.json
voc07-test:
  kind: voc
  images: VOC2007/JPEGImages
  annotations: VOC2007/Annotations
  names: VOC2007/ImageSets/Main/test.txt     # optional, as is `classes`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pqk.data.detection.coco import read_coco
from pqk.data.detection.crowdhuman import read_crowdhuman
from pqk.data.detection.sample import DetectionSet
from pqk.data.detection.voc import CLASSES, read_voc
from pqk.errors import PqkError, nearest
from pqk.paths import shown
from pqk.settings.yamlfile import Document, Spec, parse_yaml, read_text, validate


class SetSpec(Spec):
    """Where a set lies and how it is read. skip_missing: leave out images whose picture is not there."""

    kind: Literal["coco", "lvis", "objects365", "voc", "crowdhuman"]
    images: str = Field(min_length=1)
    annotations: str = Field(min_length=1)
    skip_missing: bool = False
    names: str | None = Field(default=None, min_length=1)  # voc only: a file with the names that count
    classes: Annotated[tuple[str, ...] | None, Field(strict=False, min_length=1)] = None  # voc only
    box: Literal["full", "visible", "head"] | None = None  # crowdhuman only


ONLY = {"names": "voc", "classes": "voc", "box": "crowdhuman"}
"""Keys that only one kind has."""


def read_sets(file: Path) -> dict[str, SetSpec]:
    """Returns the sets of a YAML file by name. Raises PqkError with one sentence for what is missing or unknown."""
    document = parse_yaml(read_text(file), shown(file))
    found = {}
    for name, values in document.values.items():
        lines = {key[1:]: line for key, line in document.lines.items() if key[0:1] == (name,)}
        place = f"{document.where}:{document.lines[(name,)]}"
        if not isinstance(values, dict):
            raise PqkError(f"{place}: {name} must be a mapping with kind, images and annotations")
        found[name] = validate(SetSpec, Document(values, document.where, lines), file, prefix=f"{name}.")
        for key, kind in ONLY.items():
            if key in values and found[name].kind != kind:
                line = document.lines[(name, key)]
                raise PqkError(f"{document.where}:{line}: {name}.{key} is for kind {kind} only, not {found[name].kind}")
    if not found:
        raise PqkError(f"{document.where}: names no set")
    return found


def open_set(name: str, file: Path) -> DetectionSet:
    """Returns the set that a YAML file has under a name.

    Raises PqkError for an unknown name, a malformed file, and whatever the reader of the set's kind raises.
    """
    sets = read_sets(file)
    if name not in sets:
        raise PqkError(f"{shown(file)}: has no set {name!r}{nearest(name, sets)}; it has {', '.join(sets)}")
    spec, folder = sets[name], file.parent
    images, annotations = folder / spec.images, folder / spec.annotations
    if spec.kind == "voc":
        listed = None if spec.names is None else folder / spec.names
        return read_voc(annotations, images, listed, spec.classes or CLASSES, name, spec.skip_missing)
    if spec.kind == "crowdhuman":
        return read_crowdhuman(annotations, images, spec.box or "full", name, spec.skip_missing)
    return read_coco(annotations, images, spec.kind, name, spec.skip_missing)
