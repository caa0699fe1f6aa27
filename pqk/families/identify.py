"""Tells which family a model belongs to; of folders and named networks without importing torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pqk.errors import PqkError, first_line, nearest
from pqk.families.header import weight_shapes
from pqk.families.hub import cached
from pqk.families.registry import families, names
from pqk.files import check_readable

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a model folder."""
RANDOM = "random:"
"""Begins the name of a configuration that gets random weights."""


def family_of(path: Path | str) -> str:
    """Returns the name of the family of whatever `load_model` takes. Raises PqkError as that does."""
    if str(path).startswith(RANDOM):
        return named(str(path)[len(RANDOM) :])[0]
    path = Path(cached(str(path)))
    if path.is_dir():
        return folder_family(path, read_config(path))
    if path.is_file():
        from pqk.families.official import official_family

        return official_family(path)
    raise PqkError(f"no such model: {path} is neither a file nor a folder (nor {RANDOM}NAME)")


def model_name(path: Path | str) -> str:
    """The name of a model's file or folder as the user knows it: links are not followed.

    A cache of the Hugging Face Hub links snapshots/REVISION/FILE to a blob that is named by its hash. A folder that is
    such a snapshot has the name of its repository's folder, models--ORGANISATION--NAME.
    """
    absolute = Path(os.path.normpath(Path(path).absolute()))
    if absolute.parent.name == "snapshots" and absolute.parents[1].name.startswith("models--"):
        return absolute.parents[1].name
    return absolute.name


def named(name: str) -> tuple[str, Mapping[str, Any]]:
    """Returns family and configuration of a named network. Raises PqkError for an unknown one."""
    known = {name: (of.name, config) for of in families() for name, config in of.settings_part().NAMED.items()}
    if name not in known:
        raise PqkError(f"unknown random model {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a model folder. Raises PqkError where the folder lacks a file or it is damaged."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise PqkError(f"{folder} is not a model folder: it has no {name}")
        check_readable(folder / name)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))  # Infinity is accepted, as the hub writes it
    except (ValueError, RecursionError) as error:
        raise PqkError(f"{folder / CONFIG} is not valid JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise PqkError(f"{folder / CONFIG} must hold one JSON object")
    return config


def folder_family(folder: Path, config: Mapping[str, Any]) -> str:
    """Returns the family that a stored configuration names; without one, as on the hub, that of the weights.

    Weights that have the SIGN of no family count as those of the first built-in one. Raises PqkError where the header
    of the weights cannot be read.
    """
    if "family" in config:
        return str(config["family"])
    found = weight_shapes(folder / WEIGHTS)
    return next((of.name for of in families() if of.settings_part().SIGN in found), names()[0])
