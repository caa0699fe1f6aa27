"""Charts of a weight study: axes from 0, a log axis only for errors of unlike size, and no time that was not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pqk.report.weights import _relative_errors, _time, draw_comparison, draw_study

METRICS = ("mae", "psnr", "relative_error", "ssim")


def row(name: str, errors: tuple[float, float], engines: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    outputs = {
        output: dict(zip(METRICS, (error, None if error == 0 else 40.0, error, 0.99), strict=True))
        for output, error in zip(("depth", "pose"), errors, strict=True)
    }
    return {"name": name, "size_bytes": 2**20, "compression": 2.0, "outputs": outputs, "engines": engines or []}


def engine(runtime: str, p50: float | None) -> dict[str, Any]:
    return {"runtime": runtime, "p50_ms": p50, "p25_ms": p50 and 0.9 * p50, "p75_ms": p50 and 1.1 * p50}


def test_errors_of_like_size_start_at_0_and_others_have_a_log_axis() -> None:
    axes = Figure().add_subplot()
    _relative_errors(axes, [row("float", (0.0, 0.0)), row("a", (0.010, 0.011)), row("b", (0.0102, 0.0108))])
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0.0
    axes = Figure().add_subplot()
    _relative_errors(axes, [row("a", (0.001, 0.002)), row("b", (0.1, 0.2))])
    assert axes.get_xscale() == "log" and len(axes.get_xticks()) > 5


def test_times_start_at_0_and_every_runtime_has_its_marker() -> None:
    axes = Figure().add_subplot()
    timed = [engine("OpenVINO", 100.0), engine("ONNX Runtime", 101.0), engine("TensorRT", None)]
    _time(axes, [row("float", (0, 0)), row("a", (0.1, 0.1), timed)])
    assert axes.get_xlim()[0] == 0.0 and axes.get_xlim()[1] > 110
    markers = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(markers) == ["OpenVINO", "ONNX Runtime"]
    heights = [float(line.get_ydata()[0]) for line in markers.values()]  # type: ignore[index, arg-type]
    assert heights[0] < 1.0 < heights[1]


@pytest.mark.parametrize("timed", [[], [engine("OpenVINO", 3.0)]])
def test_both_pictures_are_written(timed: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [row("float", (0.0, 0.0)), row("a", (0.01, 0.02), timed)]
    draw_study(tmp_path / "study.png", rows, "title")
    draw_comparison(tmp_path / "short.png", rows, "title")
    sizes = []
    for name in ("study.png", "short.png"):
        with Image.open(tmp_path / name) as picture:
            sizes.append(picture.width)
    assert sizes[0] > sizes[1] > 800
