"""Reads and writes the points of PLY files (Turk, "The PLY Polygon File Format", 1994).

Text and binary files are read, binary ones are written.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pqk.errors import PqkError
from pqk.files import atomic_path
from pqk.oserrors import cannot_read

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_COLOURS = ("red", "green", "blue")
_ORDER = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}


def read_points(path: Path) -> np.ndarray:
    """Returns x, y and z of the vertices, (N,3) float32, in the unit of the file; other properties are left out.

    Raises PqkError as `read_coloured_points` does.
    """
    return read_coloured_points(path)[0]


def read_coloured_points(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns points (N,3) float32, and their colours (N,3) uint8, or None where the vertices have no red, green and
    blue of 8 bits.

    Raises PqkError that names the file for one that is missing or ends too early, and for a header whose first element
    is not `vertex` with scalar properties x, y and z.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PqkError(cannot_read(path, error)) from error
    head, found, body = data.partition(b"end_header")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not found or lines[:1] != [["ply"]]:
        raise PqkError(f"{path}: no PLY file, whose first line is 'ply' and whose header ends with 'end_header'")
    order = next((_ORDER.get(words[1]) for words in lines if words[:1] == ["format"] and len(words) > 1), None)
    elements = [k for k, words in enumerate(lines) if words[:1] == ["element"]]
    first = lines[elements[0]] if elements else []
    properties = (
        [words for words in lines[elements[0] :][: _next(elements)] if words[:1] == ["property"]] if first else []
    )
    scalar = all(len(words) == 3 and words[1] in _TYPES for words in properties)
    names = [words[-1] for words in properties]
    if order is None or first[1:2] != ["vertex"] or not first[-1].isdigit() or not scalar or not {*"xyz"} <= {*names}:
        raise PqkError(
            f"{path}: the header must give a format and, as its first element, vertex with scalar x, y and z"
        )
    if len(set(names)) != len(names):
        raise PqkError(f"{path}: a property of vertex appears twice in {' '.join(names)}")
    kind = np.dtype([(name, order + _TYPES[words[1]]) for name, words in zip(names, properties, strict=True)])
    body = body[body.find(b"\n") + 1 :]
    count, points = int(first[-1]), np.zeros(0, kind)
    try:
        if order and count:
            points = np.frombuffer(body, kind, count)
        elif body.strip() and count:
            points = np.loadtxt(io.BytesIO(body), kind, max_rows=count, ndmin=1)
    except ValueError as error:
        raise PqkError(f"{path}: the values of the {count} vertices are damaged or not all there") from error
    if len(points) != count:
        raise PqkError(f"{path}: {len(points)} of the {count} vertices are there; copy it again")
    places = np.stack([points[axis].astype(np.float32) for axis in "xyz"], axis=1)
    coloured = all(name in names and kind[name] == np.uint8 for name in _COLOURS)
    return places, np.stack([points[name] for name in _COLOURS], axis=1) if coloured else None


def write_points(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """Writes points (N,3) as float32 and their colours (N,3) uint8, binary little-endian, atomically.

    Raises PqkError for shapes that do not fit, and when the file cannot be written.
    """
    if points.ndim != 2 or points.shape[1] != 3 or colours.shape != points.shape or colours.dtype != np.uint8:
        raise PqkError(
            f"{path}: points (N, 3) and colours of that shape in uint8 are written, not {points.shape} and "
            f"{colours.shape} {colours.dtype}"
        )
    vertices = np.empty(len(points), [(axis, "<f4") for axis in "xyz"] + [(name, "u1") for name in _COLOURS])
    for place, axis in enumerate("xyz"):
        vertices[axis] = points[:, place]
    for place, name in enumerate(_COLOURS):
        vertices[name] = colours[:, place]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(points)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {name}" for name in _COLOURS),
        "end_header",
    ]
    with atomic_path(path) as temporary:
        temporary.write_bytes(("\n".join(header) + "\n").encode() + vertices.tobytes())


def _next(elements: list[int]) -> int | None:
    """Returns how many lines of the header belong to the first element; None where they reach to its end."""
    return elements[1] - elements[0] if len(elements) > 1 else None
