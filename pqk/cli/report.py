"""Defines the verb `pqk report`. It imports its work when it runs, as in `pqk.cli.app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[CARD|PLAN|DELIVERABLE]", help="what it is about; default: all records in logs/"),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the .html file; default: reports/NAME.html")] = None,
    lang: Annotated[str, typer.Option(help="language of the labels: en or zh")] = "en",
    logs: Annotated[Path | None, typer.Option(help="folder of records; default: logs/")] = None,
    show: Annotated[
        int | None,
        typer.Option(min=2, help="of a card: first compute point maps of so many pictures, of Teacher and candidate"),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="with --show: as in `pqk run`; default: the record's")] = None,
    quantizer: Annotated[str | None, typer.Option(help="with --show: as in `pqk run`; default: the record's")] = None,
    model: Annotated[str | None, typer.Option(help="with --show: the Teacher, as in `pqk run`")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="with --show: as in `pqk run`")] = None,
) -> None:
    """Write one HTML file that opens without a network: verdict, table, charts, parity, point maps, commands.

    Exit codes: 0 ok, 1 a deliverable was changed, 2 wrong input, or no record yet, 3 with --show: predictions of this
    family are no points.
    """
    from pqk.cli.report_output import write_report

    raise typer.Exit(write_report(name, out, lang, logs, show, backend, quantizer, model, setting or []))
