"""Reads official checkpoints, pickles and bare safetensors files, without running anything that they hold."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pqk.errors import PqkError, first_line
from pqk.families.header import weight_shapes
from pqk.families.registry import families
from pqk.files import check_readable

Found = tuple[str, dict[str, Any], dict[str, Tensor]]
"""Family, configuration and weights."""


def read_official(path: Path) -> Found:
    """Returns family, configuration and weights of an official checkpoint, a pickle or a bare safetensors file.

    Of a pickle only tensors, plain data and `_harmless` types are read. Raises PqkError in one sentence for a file that
    is damaged, is not safe to read, or is no official checkpoint of any family.
    """
    if path.suffix == ".safetensors":
        _recognised_header(path)
        return _required(recognised(read_safetensors(path), path), path)
    return _required(recognised(read_pickle(path), path), path)


def official_family(path: Path) -> str:
    """Returns the family of an official checkpoint; of safetensors by its header. Raises as `read_official`."""
    return _recognised_header(path)[0] if path.suffix == ".safetensors" else read_official(path)[0]


def recognised(content: Any, path: Path) -> Found | None:
    """Returns family, configuration and weights of what a file holds; None where no family knows it.

    A family whose SIGN is among the names of the weights is asked before the others. Raises PqkError of a family that
    knows the file and finds it damaged.
    """
    for of in sorted(families(), key=lambda of: of.settings_part().SIGN not in _names(content)):
        try:
            found = of.model_part().official(content)
        except PqkError as error:
            raise PqkError(f"{path}: {error}") from error
        if found is not None:
            return of.name, *found
    return None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the weights of a safetensors file. Raises PqkError where it is damaged or is none."""
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError, LookupError, TypeError) as error:
        raise PqkError(f"{path} is damaged or no safetensors file: {first_line(error)}") from error


def read_pickle(path: Path) -> Any:
    """Returns what a pickle of torch holds, with its tensors on the CPU, mapped into memory where they can be.

    Only tensors, plain data and `_harmless` types are read. Raises PqkError in one sentence for any other file.
    """
    check_readable(path)
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        if "GLOBAL " in str(error):
            culprit = str(error).split("GLOBAL ")[1].split()[0]
            raise PqkError(f"{path} is not safe to read: it holds the type {culprit}, not only tensors") from error
        raise PqkError(f"{path} is damaged or no PyTorch file") from error
    except (RuntimeError, OSError) as error:
        raise PqkError(f"{path} is damaged or no PyTorch file: {first_line(error)}") from error
    except (EOFError, ValueError, LookupError, TypeError, AttributeError) as error:  # from the bytes of a foreign file
        raise PqkError(f"{path} is damaged or no PyTorch file") from error


def _recognised_header(path: Path) -> Found:
    """Returns family, configuration and weights without values of a bare safetensors file."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in weight_shapes(path).items()}
    found = recognised(empty, path)
    if found is None:
        raise PqkError(f"{path}: give the folder that holds config.json and model.safetensors, not the weights file")
    return found


def _required(found: Found | None, path: Path) -> Found:
    if found is not None:
        return found
    known = "; ".join(f"one of {of.name} holds {of.model_part().LAYOUT}" for of in families() if of.model_part().LAYOUT)
    raise PqkError(f"{path} is no official checkpoint: {known}")


def _names(content: Any) -> Mapping[Any, Any]:
    """Returns the weights by name, as far as they are where most checkpoints have them."""
    inner = content.get("model") if isinstance(content, Mapping) else None
    return inner if isinstance(inner, Mapping) else content if isinstance(content, Mapping) else {}


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
