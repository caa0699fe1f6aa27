"""Reads official checkpoints, pickles of weights and settings, without running anything that they hold."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.errors import PqkError, first_line
from pqk.families.registry import families
from pqk.files import check_readable


def read_official(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Family, configuration and weights of an official checkpoint: only tensors, plain data and `_harmless` types."""
    if path.suffix == ".safetensors":
        raise PqkError(f"{path}: give the folder that holds config.json and model.safetensors, not the weights file")
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
    known = "; ".join(f"one of {of.name} holds {of.model_part().LAYOUT}" for of in families() if of.model_part().LAYOUT)
    raise PqkError(f"{path} is no official checkpoint: {known}")


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
