"""Runs `pqk report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pqk import paths
from pqk.cli.report_file import default_place
from pqk.cli.run_output import _progress, refuse_options, settings_of
from pqk.errors import EXIT_OK, PqkError
from pqk.report.html.page import write_html


def write_report(
    name: str | None,
    out: Path | None,
    language: str,
    logs: Path | None,
    show: int | None,
    backend: str | None,
    quantizer: str | None,
    model: str | None,
    settings: Sequence[str],
) -> int:
    """Writes a report and prints its path; with `show`, computes the point maps of its card first.

    Raises PqkError as `write_html` and `point_maps` do, and for options that only go with --show.
    """
    root = paths.project_root()
    if show is None:
        given = {"--backend": backend, "--quantizer": quantizer, "--model": model, "--set": settings or None}
        refuse_options("it goes with --show", given)
    else:
        _point_maps(name, root, logs, show, backend, quantizer, model, settings)
    written = write_html(name, out or default_place(name, root), root, language, logs)
    print(paths.shown(written))
    return EXIT_OK


def _point_maps(
    name: str | None,
    root: Path,
    logs: Path | None,
    most: int,
    backend: str | None,
    quantizer: str | None,
    model: str | None,
    settings: Sequence[str],
) -> None:
    from pqk.report.html.sources import find
    from pqk.show.points import chosen_record, point_maps

    found = find(name, root, logs)
    if name is None or found.cards != (name,):
        raise PqkError("--show computes the point maps of one card: name it, such as pqk report B1 --show 4")
    record = chosen_record(found.records, backend, quantizer)
    errors = Console(stderr=True, highlight=False)
    said = lambda line: print(line, file=sys.stderr)  # noqa: E731
    folder = found.reports / "show"
    written = point_maps(record, most, folder, root, model, settings_of(list(settings)), _progress(errors), said)
    print(paths.shown(written), file=sys.stderr)
