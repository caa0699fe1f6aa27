"""Reads pictures: opens known formats, refuses damaged files, and turns pictures as EXIF says.

The one place that decides this. The functions need Pillow only: an export's sample.py is written with their source, and
scripts/edge_eval.py, which must run without pqk, holds a copy that a test compares with them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError


def read_picture(path: Path | str) -> tuple[Image.Image, int]:
    """Returns the pixels of a picture as they are stored, and its orientation: EXIF tag 274, 1 to 8, else 1.

    JPEG (with MPO), PNG, WEBP, BMP and TIFF are opened, recognised by their content whatever the name of the file:
    other readers of Pillow start programs (EPS) or crash on damaged files. Of several pictures in a file the first
    counts.
    Raises ValueError in one sentence for a file that cannot be read, is no such picture, is damaged, is too large
    (Pillow's limit, 179 million pixels), has more than 8 bits per channel, or has no colours that become RGB.
    """
    image: Any
    try:
        with Path(path).open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken EXIF, and about pictures half as large as the limit
            # A stream, as Pillow may map the file of a path into memory, and then mixes up the sides of a turned TIFF.
            with Image.open(stream, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF")) as image:
                bits, orientation = 8, 1
                if image.format == "TIFF":
                    bits, orientation = max(image.tag_v2.get(258, (1,))), exif_orientation(image)
                    image.load_end = lambda: None  # would turn the pixels
                elif image.format == "PNG" and any(";16" in str(tile) for tile in image.tile):
                    bits = 16
                image.load()
                if image.format != "TIFF":  # a PNG may have its EXIF behind the pixels
                    orientation = exif_orientation(image)
                stored = image.copy()
    except FileNotFoundError:
        raise ValueError(f"{path}: the image does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image, or not 8-bit JPEG, PNG, WEBP, BMP or TIFF, which are read") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ValueError(f"{path}: the image is too large ({str(error) or 'out of memory'})") from None
    except Exception as error:  # what Pillow raises for a damaged file is not limited to a few kinds
        if isinstance(error, OSError) and error.strerror:  # from the system
            raise ValueError(f"cannot read {path}: {error.strerror.lower()}") from None
        raise ValueError(f"{path}: the image is damaged ({str(error) or type(error).__name__})") from None
    if bits > 8 or stored.mode[0] in "IF":
        raise ValueError(f"{path}: the image has {bits} bits per channel, not 8-bit pixels; convert it to 8-bit RGB")
    if stored.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        raise ValueError(f"{path}: the image has pixels of mode {stored.mode}; convert it to 8-bit RGB")
    return stored, orientation


def exif_orientation(image: Image.Image) -> int:
    """Returns EXIF tag 274 of an open picture, 1 to 8; 1 where there is none or EXIF is broken. Reads no other tag."""
    try:
        found = image.getexif().get(274)
    except Exception:  # what Pillow raises for broken EXIF is not limited to a few kinds
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Returns a stored picture as its orientation (EXIF tag 274) asks to look at it."""
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
