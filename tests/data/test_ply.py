"""Points and colours that are written as PLY and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pqk.data.scenes.ply import read_coloured_points, read_points, write_points
from pqk.errors import PqkError


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(0, 40))
def test_what_is_written_is_read(tmp_path: Path, data: st.DataObject, count: int) -> None:
    points = data.draw(arrays(np.float32, (count, 3), elements=st.floats(width=32)))
    colours = data.draw(arrays(np.uint8, (count, 3)))
    write_points(tmp_path / "a.ply", points, colours)
    found, painted = read_coloured_points(tmp_path / "a.ply")
    np.testing.assert_array_equal(found, points)
    np.testing.assert_array_equal(painted, colours)
    np.testing.assert_array_equal(read_points(tmp_path / "a.ply"), points)


def test_the_file_is_what_other_programs_read(tmp_path: Path) -> None:
    write_points(tmp_path / "a.ply", np.array([[1.0, 2.0, 3.0]]), np.array([[10, 13, 255]], np.uint8))
    head, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert head.decode().splitlines() == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 1",
        "property float x",
        "property float y",
        "property float z",
        "property uchar red",
        "property uchar green",
        "property uchar blue",
    ]
    assert body == b"\x00\x00\x80\x3f\x00\x00\x00\x40\x00\x00\x40\x40\x0a\x0d\xff"


def test_points_without_colours(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
        "property float red\nproperty uchar green\nproperty uchar blue\nend_header\n1 2 3 0.5 4 5\n"
    )
    points, colours = read_coloured_points(tmp_path / "a.ply")
    assert points.tolist() == [[1, 2, 3]] and colours is None


@pytest.mark.parametrize(
    ("points", "colours"),
    [
        (np.zeros((2, 2)), np.zeros((2, 2), np.uint8)),
        (np.zeros((2, 3)), np.zeros((3, 3), np.uint8)),
        (np.zeros((2, 3)), np.zeros((2, 3))),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    with pytest.raises(PqkError, match=r"a\.ply: points \(N, 3\) and colours of that shape in uint8 are written"):
        write_points(tmp_path / "a.ply", points, colours)
    assert list(tmp_path.iterdir()) == []
