"""Reads and writes weights: official files, hub folders, our own folders, and seeded random networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pqk.errors import PqkError, first_line, nearest
from pqk.families.build import build_model, empty_model, load_weights
from pqk.families.hub import cached
from pqk.families.identify import CONFIG, RANDOM, WEIGHTS, folder_family, named, read_config
from pqk.families.official import Found, read_official, read_safetensors
from pqk.families.registry import family
from pqk.files import atomic_path, clear_write_errors, write_json

CARD = "model_card.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def load_model(path: Path | str, **settings: Any) -> Any:
    """Loads a network in float32 on the CPU, in eval mode, from whatever `path` names.

    path: an official file (a pickle, .pth or .pt, or bare .safetensors where the weights tell the sizes); a folder with
    config.json and model.safetensors (official hub layout, or written by `save_model`); a name in the hub's local cache
    (`pqk.families.hub`); or "random:NAME" for a named configuration with random weights (always the same ones: seed 0).
    A folder whose config.json names no family is recognised by its weights, whose shapes fill in what it does not say.
    settings: keys of the configuration, laid over the stored ones: load_model("model.pt", enable_track=True). Those of
    a section, as dpt={"features": 64}, leave its other keys as they are.
    The training-only settings of official files are undone: plain patch embedding, landscape_only False.
    Raises PqkError in one sentence for anything that is not such a file: absent, truncated, another pickle, unknown
    settings, or weights with missing, unexpected or wrongly shaped keys.
    """
    if str(path).startswith(RANDOM):
        name = str(path)[len(RANDOM) :]
        of, named_config = named(name)
        return build_model(of, _laid_over(named_config, settings), generator=torch.Generator().manual_seed(0)).eval()
    path = Path(cached(str(path)))
    if path.is_dir():
        name, config, weights = _read_folder(path)
        origin = path / WEIGHTS
    elif path.is_file():
        name, config, weights = read_official(path)
        origin = path
    else:
        raise PqkError(f"no such model: {path} is neither a file nor a folder (nor {RANDOM}NAME)")
    try:
        model = empty_model(name, _laid_over({**config, **family(name).model_part().UNDONE}, settings))
    except PqkError as error:
        raise PqkError(f"{path}: {error}") from error
    load_weights(model, weights, str(origin))
    return model.eval()


def save_model(model: Any, folder: Path | str, dtype: str = "float32", card: dict[str, Any] | None = None) -> Path:
    """Write config.json, model.safetensors and, if given, model_card.json into `folder`; returns the folder.

    Each file is replaced atomically, weights first and configuration last. Tied weights are written once.
    dtype: "float32" or "float16" (half the size; `load_model` converts back to float32).
    Raises PqkError when the folder is not writable or a weight does not fit into float16.
    """
    if dtype not in _DTYPES:
        raise PqkError(f"weights can be saved as {' or '.join(_DTYPES)}, not {dtype!r}{nearest(dtype, _DTYPES)}")
    folder = Path(folder)
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach().to("cpu", _DTYPES[dtype]).contiguous()
            if dtype == "float16" and torch.isinf(weights[name]).any() and not torch.isinf(tensor).any():
                raise PqkError(f"cannot save {folder} as float16: {name} has values beyond 65504")
    with atomic_path(folder / WEIGHTS) as temporary:
        _write_safetensors(weights, temporary)
    if card is not None:
        write_json(folder / CARD, card)
    write_json(folder / CONFIG, {"family": model.family, **model.config})
    return folder


def _write_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library wraps the operating system's errors
        with clear_write_errors(path):
            raise PqkError(f"cannot write {path}: {first_line(error)}") from error


def _read_folder(folder: Path) -> Found:
    config = read_config(folder)
    name = folder_family(folder, config)
    weights = read_safetensors(folder / WEIGHTS)
    if "family" in config:
        return name, config, weights
    try:
        found = family(name).model_part().official(weights)
    except PqkError as error:
        raise PqkError(f"{folder}: {error}") from error
    return name, config if found is None else _laid_over(found[0], config), weights


def _laid_over(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration with the settings in place of its own; those of a section leave its others."""
    merged = {**config, **settings}
    for key, section in settings.items():
        if isinstance(section, Mapping) and isinstance(config.get(key), Mapping):
            merged[key] = {**config[key], **section}
    return merged
