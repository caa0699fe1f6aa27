"""The Teacher's own scores on the test scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pqk.bench import teacher
from pqk.errors import PqkError


def test_pairs_with_too_little_truth_are_not_scored(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `pqk run`: quality.min_valid_pixels decides; with no pair left it is an error."""
    monkeypatch.chdir(project)
    real, poor = teacher.pair_truth, [0]

    def truth_of(*frames: Any) -> Any:
        found = real(*frames)
        if poor[0] > 0:
            poor[0] -= 1
            found = replace(found, valid1=found.valid1.copy())
            found.valid1[1:] = False
        return found

    monkeypatch.setattr(teacher, "pair_truth", truth_of)
    whole = teacher.bench_teacher(str(tiny_model), False, "x")["pairs"]
    poor[0] = 1
    assert teacher.bench_teacher(str(tiny_model), False, "x")["pairs"] == whole - 1
    poor[0] = 10**6
    with pytest.raises(PqkError, match=r"valid depth pixels \(quality\.min_valid_pixels\)"):
        teacher.bench_teacher(str(tiny_model), False, "x")
