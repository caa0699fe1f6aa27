"""Reading and writing weights: official .pth files, hub folders, our own folders, and seeded random networks."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pqk.errors import PqkError, nearest
from pqk.families.build import build_model, empty_model, load_weights
from pqk.families.identify import CONFIG, RANDOM, WEIGHTS, first_line, folder_family, named, read_config
from pqk.families.registry import families, family, names
from pqk.files import atomic_path, check_readable, clear_write_errors, write_json

CARD = "model_card.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def load_model(path: Path | str) -> Any:
    """Load a network in float32 on the CPU, in eval mode, from whatever `path` names.

    path: an official .pth file (a pickled dict with `args` and `model`), a folder with config.json and
    model.safetensors (official hub layout, or written by `save_model`), or "random:NAME" for a named configuration
    with random weights (always the same ones: seed 0).
    The training-only settings of official files are undone: plain patch embedding, landscape_only False.
    Raises PqkError in one sentence for anything that is not such a file: absent, truncated, another pickle, unknown
    settings, or weights with missing, unexpected or wrongly shaped keys.
    """
    if str(path).startswith(RANDOM):
        name = str(path)[len(RANDOM) :]
        of, config = named(name)
        return build_model(of, config, generator=torch.Generator().manual_seed(0)).eval()
    path = Path(path)
    if path.is_dir():
        name, config, weights = _read_folder(path)
        origin = path / WEIGHTS
    elif path.is_file():
        name, config, weights = read_official(path)
        origin = path
    else:
        raise PqkError(f"no such model: {path} is neither a file nor a folder (nor {RANDOM}NAME)")
    try:
        model = empty_model(name, {**config, **family(name).model_part().UNDONE})
    except PqkError as error:
        raise PqkError(f"{path}: {error}") from error
    load_weights(model, weights, str(origin))
    return model.eval()


def model_name(path: Path | str) -> str:
    """The name of a model's file or folder as the user knows it: links are not followed.

    A cache of the Hugging Face Hub links snapshots/REVISION/FILE to a blob that is named by its hash. A folder that is
    such a snapshot has the name of its repository's folder, models--ORGANISATION--NAME.
    """
    absolute = Path(os.path.normpath(Path(path).absolute()))
    if absolute.parent.name == "snapshots" and absolute.parents[1].name.startswith("models--"):
        return absolute.parents[1].name
    return absolute.name


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


def _read_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    config = read_config(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError, OSError) as error:
        raise PqkError(f"{folder / WEIGHTS} is damaged or no safetensors file: {first_line(error)}") from error
    return folder_family(config), config, weights


def read_official(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Family, configuration and weights of an official checkpoint: only tensors, plain data and `_harmless` types."""
    if path.suffix == ".safetensors":
        raise PqkError(f"{path}: give the folder that holds {CONFIG} and {WEIGHTS}, not the weights file")
    check_readable(path)
    try:
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        if "GLOBAL " in str(error):
            culprit = str(error).split("GLOBAL ")[1].split()[0]
            raise PqkError(f"{path} is not safe to read: it holds the type {culprit}, not only tensors") from error
        raise PqkError(f"{path} is damaged or no PyTorch file") from error
    except (RuntimeError, OSError) as error:
        raise PqkError(f"{path} is damaged or no PyTorch file: {first_line(error)}") from error
    except (EOFError, ValueError, LookupError, TypeError, AttributeError) as error:  # from the bytes of a foreign file
        raise PqkError(f"{path} is damaged or no PyTorch file") from error
    for of in families():
        try:
            found = of.model_part().official(content)
        except PqkError as error:
            raise PqkError(f"{path}: {error}") from error
        if found is not None:
            return of.name, *found
    known = ", ".join(names())
    raise PqkError(f"{path} is no official checkpoint of a known family ({known}): its layout is another one")


def _harmless() -> list[Any]:
    """Types beyond torch's own that a checkpoint may hold beside its weights, with the names that pickles call them by.

    argparse.Namespace, as official files keep their settings; numpy's scalars (a best loss); and paths, which become
    pure ones: they name a place and cannot open it, and a Windows path is read on Linux too.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    types = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"}
    paths = [
        (pure, f"{module}.{name}{kind}Path")
        for pure, kind in ((PurePosixPath, "Posix"), (PureWindowsPath, "Windows"))
        for module in ("pathlib", "pathlib._local")
        for name in ("", "Pure")
    ]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *types, *scalars, *paths]
