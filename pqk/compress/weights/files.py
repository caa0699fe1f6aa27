"""Writes quantized weights to one safetensors file, and reads them: `save_weights` and `load_weights`.

The file holds the packed tensors as NAME::codes, NAME::scale, NAME::zero_point and NAME::smooth, everything else under
its own name, and one text of metadata, `pqk`: JSON with schemes, shapes and a sha256 over all of it. Equal weights give
equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqk.compress.weights.model import QuantizedWeights
from pqk.compress.weights.packed import PackedTensor
from pqk.compress.weights.schemes import Scheme
from pqk.errors import PqkError, first_line
from pqk.files import atomic_path, check_readable, clear_write_errors

KEY = "pqk"
FORMAT = "pqk quantized weights"
VERSION = 1
PARTS = ("codes", "scale", "zero_point", "smooth")
_SEPARATOR = "::"


def save_weights(weights: QuantizedWeights, path: Path | str) -> Path:
    """Writes the weights to a file, which is whole or absent; returns its path.

    Raises PqkError when it cannot be written, a name holds '::', or `about` is no JSON.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for name in (*weights.packed, *weights.rest):
        if _SEPARATOR in name:
            raise PqkError(f"{name} cannot be saved: its name holds '{_SEPARATOR}'")
    for name, packed in weights.packed.items():
        tensors |= {f"{name}{_SEPARATOR}{part}": tensor for part, tensor in packed.tensors().items()}
    tensors |= weights.rest
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    schemes = list(dict.fromkeys(packed.scheme for packed in weights.packed.values()))
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "float_bytes": weights.float_bytes,
        "tied": weights.tied,
        "about": weights.about,
        "schemes": [scheme.to_json() for scheme in schemes],
        "packed": {name: _described(packed, schemes) for name, packed in weights.packed.items()},
    }
    try:
        meta["sha256"] = _digest(meta, tensors)
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise PqkError(f"what is said about the weights is no JSON: {first_line(error)}") from error
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={KEY: text})
        except SafetensorError as error:  # the library wraps the operating system's errors
            with clear_write_errors(path):
                raise PqkError(f"cannot write {path}: {first_line(error)}") from error
    return path


def load_weights(path: Path | str) -> QuantizedWeights:
    """Returns the weights of a file that `save_weights` wrote, on the CPU.

    Raises PqkError in one sentence for a file that is absent, damaged (a single changed bit too), or another one.
    """
    path = Path(path)
    check_readable(path)
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, OSError, LookupError, TypeError, RuntimeError) as error:
        raise PqkError(f"{path} is damaged or no safetensors file: {first_line(error)}") from error
    if text is None:
        raise PqkError(f"{path} holds no quantized weights of pqk: its metadata has no {KEY!r}")
    try:
        return _read(text, tensors)
    except PqkError as error:
        raise PqkError(f"{path}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise PqkError(f"{path} is damaged: its description of the weights cannot be read") from error


def _read(text: str, tensors: dict[str, Tensor]) -> QuantizedWeights:
    meta = json.loads(text)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise PqkError("these are no quantized weights of pqk")
    if meta.get("version") != VERSION:
        raise PqkError(f"version {meta.get('version')} of the file format; this pqk reads version {VERSION}")
    expected = meta.pop("sha256", None)
    if expected != _digest(meta, tensors):
        raise PqkError("the file is damaged: its sha256 is not that of its content")
    schemes, packed = [Scheme.from_json(each) for each in meta["schemes"]], {}
    for name, (scheme, shape, axis, rotation, method) in meta["packed"].items():
        parts = {part: tensors.pop(f"{name}{_SEPARATOR}{part}", None) for part in PARTS}
        packed[name] = PackedTensor(
            schemes[scheme],
            tuple(shape),
            axis,
            rotation=rotation,
            method=method,
            **parts,  # type: ignore[arg-type]
        )
        packed[name].check()
    missing = sorted(set(meta["tied"].values()) - {*packed, *tensors})
    if missing:
        raise PqkError(f"the file lacks {missing[0]}")
    return QuantizedWeights(packed, tensors, meta["tied"], meta["about"], meta["float_bytes"])


def _described(packed: PackedTensor, schemes: Sequence[Scheme]) -> list[Any]:
    """Returns scheme (its place in `schemes`), shape, axis, rotation and method: short, as there are many."""
    return [schemes.index(packed.scheme), list(packed.shape), packed.axis, packed.rotation, packed.method]


def _digest(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of the metadata in canonical form, and of name, type, shape and bytes of every tensor."""
    found = hashlib.sha256(json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for piece in _pieces(tensor):
            found.update(piece)
    return found.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yields the bytes of a contiguous tensor on the CPU, without a copy."""
    if tensor.numel():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
