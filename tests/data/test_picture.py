"""Picture files as they come from cameras, editors and the net, through pqk's reader and its copies in two scripts."""

from __future__ import annotations

import importlib.util
import inspect
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pqk.data.scenes import picture
from pqk.data.scenes.picture import read_picture, upright
from pqk.families.bundle import sample_source

sys.path.insert(0, str(Path(__file__).parent))

from picture_toys import EPS, ORIENTATION, TURNED, exif, png16, tiff, with_exif

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
OPENED = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


def written(folder: Path, content: bytes, name: str = "a.jpg") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_odd_exif_turns_a_picture_or_does_nothing(tmp_path: Path, kind: str) -> None:
    """Pillow cannot write 1 in 7 of these blocks again, which its exif_transpose tries; only tag 274 is looked at."""
    drawn = random.Random(1)
    for tag in (0x010E, 0x011A, 0x0128, 0x8769, 0x8825, 0xA005, 0x014A, 0x9286):
        for number in range(14):
            odd = (tag, number, drawn.choice((0, 1, 3, 1000)), struct.pack("<L", drawn.choice((0, 1, 8, 26))))
            block = tiff(PIXELS, TURNED, odd) if kind == "TIFF" else with_exif(PIXELS, kind, exif(TURNED, odd))
            stored, orientation = read_picture(written(tmp_path, block))
            assert (stored.size, orientation, upright(stored, orientation).size) == ((24, 16), 6, (16, 24)), odd


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_no_orientation(tmp_path: Path, kind: str) -> None:
    drawn, found = random.Random(2), set()
    for _ in range(70):
        block = bytearray(exif(TURNED, (0x8769, 4, 1, struct.pack("<L", 38)), (0x011A, 5, 1, struct.pack("<L", 60))))
        for _ in range(drawn.randrange(1, 8)):
            block[drawn.randrange(len(block))] = drawn.randrange(256)
        stored, orientation = read_picture(
            written(tmp_path, with_exif(PIXELS, kind, bytes(block[: drawn.randrange(90)])))
        )
        assert stored.size == (24, 16)
        found.add(orientation)
    assert {1, 6} <= found
    for value in ((2, 4, b"6\0\0\0"), (12, 1, b"\x08\0\0\0"), (3, 1, b"\x09\0\0\0")):
        block = exif((ORIENTATION, *value))
        assert read_picture(written(tmp_path, with_exif(PIXELS, kind, block)))[1] == 1, value


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_turned_tiff_is_read_as_stored(tmp_path: Path, orientation: int, mode: str, compression: str | None) -> None:
    """Pillow turns it while it loads; from a path it also mixes up the sides of an uncompressed one."""
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / "a.tif", tiffinfo={ORIENTATION: orientation}, compression=compression)
    stored, found = read_picture(tmp_path / "a.tif")
    assert found == orientation
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_exif_means(tmp_path: Path, orientation: int) -> None:
    """Tag 274 says on which sides row 0 and column 0 of the stored pixels belong (TIFF 6.0, page 36)."""
    rows = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}[orientation]
    columns = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation]
    stored = np.zeros((4, 6), np.uint8)
    stored[0], stored[:, 0] = 100, 200
    seen = np.asarray(upright(Image.fromarray(stored), orientation))
    side = {"top": seen[0], "bottom": seen[-1], "left": seen[:, 0], "right": seen[:, -1]}
    assert (side[columns] == 200).all() and np.sum(side[rows] == 100) == side[rows].size - 1


@pytest.mark.parametrize("kind", OPENED)
def test_the_content_decides_and_not_the_name(tmp_path: Path, kind: str) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a", kind)
    path = (tmp_path / "a").rename(tmp_path / "a.heic.eps")
    assert np.asarray(read_picture(path)[0]).shape == PIXELS.shape


@pytest.mark.parametrize(
    "kind", ["EPS", "GIF", "PPM", "TGA", "PCX", "ICO", "DDS", "AVIF", "JPEG2000", "text", "nothing"]
)
def test_other_formats_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """An EPS named .jpg would start Ghostscript."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    content = {"EPS": EPS, "text": b"hello", "nothing": b""}.get(kind)
    if content is None:
        try:
            Image.fromarray(PIXELS).save(tmp_path / "x", kind)
        except (KeyError, OSError):
            pytest.skip(f"this Pillow writes no {kind}")
        content = (tmp_path / "x").read_bytes()
    with pytest.raises(ValueError, match=r"a\.jpg: not an image, or not 8-bit JPEG, PNG, WEBP, BMP or TIFF, which are"):
        read_picture(written(tmp_path, content))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_per_channel(tmp_path: Path, channels: int) -> None:
    """Pillow keeps the high byte of colours: a 12-bit picture in 16 bits is nearly black."""
    deep = np.full((8, 8, channels), 4000, np.uint16)
    sentence = r"has 16 bits per channel, not 8-bit pixels; convert it to 8-bit RGB"
    with pytest.raises(ValueError, match=sentence):
        read_picture(written(tmp_path, png16(deep)))
    if channels == 3:
        with pytest.raises(ValueError, match=sentence):
            read_picture(written(tmp_path, tiff(deep)))
        planes = (284, 3, 1, struct.pack("<HH", 2, 0))
        with pytest.raises(ValueError, match=r"16 bits|damaged|not an image"):
            read_picture(written(tmp_path, tiff(deep, planes)))
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="has 32 bits per channel"):
        read_picture(tmp_path / "f.tif")


def test_colours_that_do_not_become_rgb(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pixels of mode LAB; convert it to 8-bit RGB"):
        read_picture(written(tmp_path, tiff(PIXELS, photometric=8)))


@pytest.mark.parametrize("kind", OPENED)
def test_damage_is_one_sentence(tmp_path: Path, kind: str) -> None:
    """Files cut anywhere or with wrong bytes, mostly in their heads: the reader raises nothing but ValueError."""
    Image.fromarray(PIXELS).save(tmp_path / "a", kind)
    whole, drawn, refused = (tmp_path / "a").read_bytes(), random.Random(3), 0
    for _ in range(70):
        content = bytearray(whole)
        for _ in range(drawn.randrange(1, 6)):
            content[int(len(content) * drawn.random() ** 3)] = drawn.randrange(256)
        if drawn.random() < 0.3:
            del content[drawn.randrange(len(content)) :]
        try:
            read_picture(written(tmp_path, bytes(content)))
        except ValueError as error:
            assert str(error).startswith((f"{tmp_path}/a.jpg: ", "cannot read "))
            refused += 1
    assert refused > 5


def test_too_large_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png: the image is too large \(Image size \(196000000 pixels\)"):
        read_picture(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"b\.png: the image does not exist"):
        read_picture(tmp_path / "b.png")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*folder\.jpg: is a directory"):
        read_picture(tmp_path / "folder.jpg")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"^cannot read .*bomb\.png: permission denied$"):
        read_picture(tmp_path / "bomb.png")


def test_the_scripts_read_pictures_with_the_same_code() -> None:
    """edge_eval.py and sample.py run without pqk, so they hold copies."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "edge_eval.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("edge_eval_copy", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("read_picture", "exif_orientation", "upright"):
        source = inspect.getsource(getattr(picture, name))
        assert inspect.getsource(getattr(script, name)) == source
        assert all(source in sample_source(runtime, "a.jpg", 1, "") for runtime in ("openvino", "onnxruntime"))
