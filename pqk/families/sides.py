"""Checks the sizes of images that a family is taught with: `check_sides`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pqk import paths
from pqk.errors import PqkError
from pqk.families.contract import Family
from pqk.settings.yamlfile import Spec


def check_sides(of: Family, spec: Spec, prefix: str = "") -> None:
    """Raises PqkError for a size of training images that is no multiple of the family's patch, naming the file."""
    patch = of.settings_part().PATCH
    for name, side in _sides(spec.model_dump(mode="json")).items():
        if side % patch:
            raise PqkError(
                f"{paths.shown(spec.source)}: {prefix}{name} is {side} but must be a multiple of {patch}, the side of "
                f"a patch of the family {of.name}"
            )


def _sides(settings: Mapping[str, Any]) -> dict[str, int]:
    """Returns every `Side` of settings given as plain data, by dotted name."""
    found: dict[str, int] = {}
    for name, value in settings.items():
        if name in ("size", "fold_size") and isinstance(value, int):
            found[name] = value
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, Mapping):
                found |= {f"{name}.{rest}": side for rest, side in _sides(part).items()}
    return found
