"""Reads the header of a safetensors file: names and shapes of the weights, without torch and without their values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pqk.errors import PqkError, first_line
from pqk.files import check_readable

LONGEST = 2**24
"""Bytes of a header that is read; that of a network with 100 000 weights is about 12 MB long."""
_PREFIX = 8  # bytes of the length before it, the lowest byte first
_BESIDE = "__metadata__"


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight in a safetensors file, by name.

    Raises PqkError for a file that cannot be read, has no such header, or promises more values than it has bits.
    """
    check_readable(path)
    damaged = f"{path} is damaged or no safetensors file"
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_PREFIX), "little")
            size = path.stat().st_size
            if not 0 < length <= size - _PREFIX:
                raise PqkError(f"{damaged}: it has no header")
            if length > LONGEST:
                raise PqkError(f"{path}: its header has {length} bytes; at most {LONGEST} are read")
            header = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise PqkError(f"{damaged}: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise PqkError(f"{damaged}: its header is no JSON") from error
    if not isinstance(header, dict):
        raise PqkError(f"{damaged}: its header is no JSON object")
    return {name: _shape(name, entry, size, damaged) for name, entry in header.items() if name != _BESIDE}


def _shape(name: str, entry: Any, size: int, damaged: str) -> tuple[int, ...]:
    """Returns the shape in the entry of a weight. size: of the file, in bytes."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side <= 8 * size for side in shape):
        raise PqkError(f"{damaged}: {name[:80]!r} has no shape")
    if len(shape) > 64 or math.prod(shape) > 8 * size:
        raise PqkError(f"{damaged}: {name[:80]!r} has more values than the file")
    return tuple(shape)
