"""Keeps point maps of Teacher and candidate as a small file, and turns it into what the report's 3D view needs.

points (2,N,3)    of the Teacher and of the candidate, in the frame of the first camera, in the Teacher's unit
colours (N,3)     of the pixels that they belong to, uint8
error (N,)        distance of the two, percent of the depth of the Teacher's point
images, maps      (V,h,w,3) uint8 and (V,h,w): the pictures, and the error of their pixels; NaN where there is none
about             JSON: engine (sha256 of the candidate's graphs), labels, scene, names, total, sure, scale
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pqk.files import atomic_path
from pqk.report.cells import printable

_COLOURS = "magma"  # of errors, as in the figures of `pqk show`
_PERCENTILE = 98  # of the errors: where the colours end
_NOTHING = 255  # place in the palette of pixels without an error
_ARRAYS = ("points", "colours", "error", "images", "maps")


@dataclass(frozen=True, eq=False)
class PointMaps:
    """The arrays of the module's docstring."""

    points: np.ndarray
    colours: np.ndarray
    error: np.ndarray
    images: np.ndarray
    maps: np.ndarray
    about: dict[str, Any]


def write_points(path: Path, maps: PointMaps) -> Path:
    """Writes point maps atomically; returns the path."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        arrays = {name: getattr(maps, name) for name in _ARRAYS}
        np.savez_compressed(stream, about=np.array(json.dumps(maps.about)), **arrays)
    return path


def read_points(path: Path) -> PointMaps | None:
    """Returns the point maps of a file; None where it is damaged or not one of `write_points`."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            arrays = {name: kept[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return PointMaps(**arrays, about=about) if isinstance(about, dict) else None


def scene_of(maps: PointMaps, name: str) -> dict[str, Any]:
    """Returns the data of a 3D view: arrays as base64, pictures and error maps, ranges shared by both sides."""
    known = maps.error[np.isfinite(maps.error)]
    most = max(float(np.percentile(known, _PERCENTILE)), 1e-6) if known.size else 1.0
    about = maps.about
    low, high = np.percentile(maps.points[0], (1, 99), axis=0)
    margin = 0.05 * max(float((high - low).max()), 1e-6)  # of the widest side: a wall is flat
    inside = ((maps.points >= low - margin) & (maps.points <= high + margin)).all(axis=2)
    sides = [
        {
            "label": printable(str(label)),
            "points": _base64(points[kept].astype("<f4")),
            "colours": _base64(maps.colours[kept].astype(np.uint8)),
            "error": _base64(maps.error[kept].astype("<f4")),
        }
        for label, points, kept in zip(about["labels"], maps.points, inside, strict=True)
    ]
    pictures = [
        {
            "name": printable(str(picture)),
            "image": _address(image),
            "map": _address(*_coloured(error, most)),
            "mean": float(np.nanmean(error)) if np.isfinite(error).any() else None,
        }
        for picture, image, error in zip(about["names"], maps.images, maps.maps, strict=True)
    ]
    return {
        "id": name,
        "scene": printable(str(about["scene"])),
        "sides": sides,
        "ranges": [[float(a), float(b)] for a, b in zip(low - margin, high + margin, strict=True)],
        "most": most,
        "mean": float(known.mean()) if known.size else None,
        "pictures": pictures,
        "colorscale": _colorscale(),
        "drawn": maps.points.shape[1],
        "total": int(about["total"]),
        "sure": int(about["sure"]),
        "scale": f"{float(about['scale']):.4g}",
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _address(pixels: np.ndarray, palette: bytes | None = None) -> str:
    """Returns a picture as a data address: a JPEG of (h,w,3), or a PNG of (h,w) places in a palette."""
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    if palette is None:
        picture.save(stream, format="JPEG", quality=88)
    else:
        picture.putpalette(palette)
        picture.save(stream, format="PNG", optimize=True, transparency=_NOTHING)
    kind = "jpeg" if palette is None else "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _colorscale() -> list[list[Any]]:
    """Returns the colours of errors at 11 places from 0 to 1, as plotly reads them."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [[place / 10, to_hex(colormaps[_COLOURS](place / 10))] for place in range(11)]


def _coloured(error: np.ndarray, most: float) -> tuple[np.ndarray, bytes]:
    """Returns an error map (h,w) as places in a palette (h,w), `_NOTHING` where there is none, and the palette."""
    from matplotlib import colormaps

    places = np.clip(np.nan_to_num(error) / most, 0, 1) * (_NOTHING - 1)
    shown = np.where(np.isfinite(error), np.round(places), _NOTHING).astype(np.uint8)
    colours = colormaps[_COLOURS](np.linspace(0, 1, _NOTHING), bytes=True)[:, :3]
    return shown, np.concatenate([colours, [[255, 255, 255]]]).astype(np.uint8).tobytes()
