"""Picture files that Pillow does not write: odd EXIF, 16 bits per channel, turned TIFF, other formats."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION, SHORT = 274, 3
TURNED = (ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0))  # by a quarter to the right
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A block of EXIF with tags (number, type, count, four bytes of value or offset), right or wrong as they are."""
    body = b"".join(struct.pack("<HHL", *tag[:3]) + tag[3] for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + body + struct.pack("<L", 0)


def with_exif(pixels: np.ndarray, kind: str, block: bytes) -> bytes:
    """A JPEG, PNG or WEBP file with a block of EXIF."""
    stream = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(stream, kind, exif=(b"Exif\0\0" if kind == "JPEG" else b"") + block, **lossless)
    return stream.getvalue()


def png16(pixels: np.ndarray) -> bytes:
    """(H,W,C) uint16, C = 1 to 4, as a PNG of 16 bits per channel."""
    height, width, channels = pixels.shape
    header = struct.pack(">LLBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">L", len(d)) + kind + d + struct.pack(">L", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(pixels: np.ndarray, *tags: tuple[int, int, int, bytes], photometric: int = 2) -> bytes:
    """(H,W,3) uint8 or uint16 as an uncompressed TIFF, with more tags."""
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    bits = struct.pack("<HHH", *[8 * pixels.itemsize] * 3)

    def short(value: int) -> bytes:
        return struct.pack("<HH", value, 0)

    entries = [
        (256, SHORT, 1, short(width)), (257, SHORT, 1, short(height)),
        (258, SHORT, 3, struct.pack("<L", 8 + len(data))),
        (259, SHORT, 1, short(1)), (262, SHORT, 1, short(photometric)),
        (273, 4, 1, struct.pack("<L", 8)), (277, SHORT, 1, short(channels)), (278, SHORT, 1, short(height)),
        (279, 4, 1, struct.pack("<L", len(data))), *tags,
    ]  # fmt: skip
    body = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in sorted(entries))
    start = 8 + len(data) + len(bits)
    return b"II*\0" + struct.pack("<L", start) + data + bits + struct.pack("<H", len(entries)) + body + b"\0\0\0\0"
