"""Writes the files of a study of weights under the names of the lab's documents: `write_study`, `write_comparison`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pqk.files import write_text
from pqk.report.weights import draw_comparison, draw_study
from pqk.study.weights.result import write_results
from pqk.study.weights.text import report


def write_study(results: Mapping[str, Any], out: Path, title: str) -> list[Path]:
    """Writes comprehensive_results.json, _report.txt and _visualizations.png; returns the paths."""
    paths = [out / f"comprehensive_{rest}" for rest in ("results.json", "report.txt", "visualizations.png")]
    write_results(paths[0], results)
    write_text(paths[1], report(results, title))
    draw_study(paths[2], results["rows"], title)
    return paths


def write_comparison(results: Mapping[str, Any], out: Path, title: str) -> list[Path]:
    """Writes comparison_report.json, comparison_summary.txt and comparison_plots.png; returns the paths."""
    paths = [out / f"comparison_{rest}" for rest in ("report.json", "summary.txt", "plots.png")]
    write_results(paths[0], results)
    write_text(paths[1], report(results, title))
    draw_comparison(paths[2], results["rows"], title)
    return paths
