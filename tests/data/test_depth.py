"""Depth maps of other types and units, and what renderers write where nothing is."""

from __future__ import annotations

import numpy as np
import pytest

from pqk.data.scenes.depth import measured_depth
from pqk.data.scenes.scene import View
from pqk.errors import PqkError

METRES = np.random.default_rng(0).uniform(0.5, 9, (30, 40)).astype("<f4")


def as_stored(values: np.ndarray, kind: str) -> np.ndarray:
    """What a reader of little-endian float32 sees of values of another type."""
    return values.astype(kind).view("<f4").reshape(values.shape)


@pytest.mark.parametrize(
    ("stored", "cause"),
    [
        (as_stored(METRES, ">f4"), "the bytes are probably in big-endian order"),
        (as_stored(np.full((3, 4), 2.0), ">f4"), "the bytes are probably in big-endian order"),
        (as_stored(1000 * METRES, "<i4"), "probably 32-bit integers, such as millimetres"),
        (as_stored(1000 * METRES, "<u4"), "probably 32-bit integers, such as millimetres"),
        (as_stored(1000 * METRES, ">i4"), "probably big-endian 32-bit integers"),
        (1e6 * METRES, "probably another unit, or a far plane"),
        (np.full((3, 4), 2e5, "<f4"), "probably another unit, or a far plane"),
        (1e-8 * METRES, "probably another type of number"),
        (
            np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8).view("<f4")[..., 0],
            "another type of number",
        ),
    ],
)
def test_numbers_that_are_no_metres(stored: np.ndarray, cause: str) -> None:
    with pytest.raises(PqkError, match=rf"depths lie outside 1e-06 to 100000 m, the first is .*{cause}.*little-endian"):
        measured_depth(stored)


@pytest.mark.parametrize("far", [65504, 65535, 1e10, 1e20, np.inf, np.finfo(np.float32).max, 0, -1, -1e10, 1e6])
@pytest.mark.parametrize("columns", [2, 37])
def test_a_far_plane_is_no_measurement(far: float, columns: int) -> None:
    """Whatever its share of the picture."""
    stored = METRES.copy()
    stored[:, :columns] = far
    expected = METRES.copy()
    expected[:, :columns] = 0
    np.testing.assert_array_equal(measured_depth(stored), expected)


def test_nothing_measured_and_a_few_odd_numbers() -> None:
    for far in (65504, 1e10, np.inf, 0):
        assert not measured_depth(np.full((3, 4), far, "<f4")).any()
    odd = METRES.copy()
    odd[0, :4] = 1e-7, 2e5, 3e6, 1e-40
    assert not measured_depth(odd)[0, :4].any()
    assert (measured_depth(odd)[1:] == METRES[1:]).all()
    edges = np.array([[1e-6, 1e5, 65503]], "<f4")
    np.testing.assert_array_equal(measured_depth(edges), edges)


def test_the_file_is_named(tmp_path) -> None:
    as_stored(METRES, ">f4").tofile(tmp_path / "a.depth")
    view = View("a.png", tmp_path / "a.png", depth_path=tmp_path / "a.depth", size=METRES.shape)
    with pytest.raises(PqkError, match=r"a\.depth: \d+ of \d+ depths lie outside"):
        view.load_depth()
