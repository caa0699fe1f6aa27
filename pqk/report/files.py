"""Writes the files of the report, `write_reports`: summary.csv and summary.json, the workbook, the plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pqk import paths
from pqk.errors import PqkError
from pqk.files import atomic_path, write_json
from pqk.record.log import read_records
from pqk.record.schema import columns
from pqk.report.cells import Record, csv_text, ordered, with_ends
from pqk.report.plots import draw_plots
from pqk.report.workbook import write_workbook

if TYPE_CHECKING:
    from pqk.settings.evaluation import Thresholds


@dataclass(frozen=True)
class Places:
    """Paths of the reports: three files and a folder."""

    table: Path
    summary_csv: Path
    summary_json: Path
    plots: Path

    @classmethod
    def in_folder(cls, folder: Path) -> Places:
        """Returns all paths under their usual names in one folder."""
        return cls(folder / "result_table.xlsx", folder / "summary.csv", folder / "summary.json", folder / "plots")

    @classmethod
    def of_project(cls, root: Path) -> Places:
        """Returns the paths in `report` of configs/eval.yaml, below the project's root; without it, in reports/."""
        from pqk.settings.evaluation import load_common

        file = paths.configs(root) / "eval.yaml"
        if not file.is_file():
            return cls.in_folder(root / "reports")
        report, _ = load_common(file)
        return cls(root / report.table, root / report.summary_csv, root / report.summary_json, root / report.plots)


def thresholds_of(root: Path) -> Thresholds | None:
    """Returns the thresholds of the project's configs/eval.yaml; None where there is no such file."""
    from pqk.settings.evaluation import load_common

    file = paths.configs(root) / "eval.yaml"
    return load_common(file)[1] if file.is_file() else None


def all_records(logs_folder: Path | str) -> list[Record]:
    """Returns all records of a folder, ordered. Raises PqkError when one is invalid or there is none."""
    records = ordered(item.record for item in read_records(logs_folder))
    if not records:
        raise PqkError(f"no records in {logs_folder}: run an experiment first")
    return records


def write_reports(
    records: Sequence[Record],
    reports: Places | Path,
    say: Callable[[str], None] = lambda sentence: None,
    thresholds: Thresholds | None = None,
) -> list[Path]:
    """Writes the summary as CSV and JSON, the workbook and the plots; returns the files written.

    reports: the paths, or a folder for all of them. say: gets a sentence with the reason for each plot, and for records
    of a plot, that are left out. thresholds: drawn as lines in the plots. The same records give the same bytes of CSV
    and JSON.
    """
    places = reports if isinstance(reports, Places) else Places.in_folder(reports)
    write_csv(places.summary_csv, records)
    names = [column.name for column in columns()]
    write_json(places.summary_json, [{name: record[name] for name in names} for record in records])
    write_workbook(places.table, records)
    plots, left_out = draw_plots(records, places.plots, thresholds)
    for sentence in left_out:
        say(sentence)
    return [places.summary_csv, places.summary_json, places.table, *plots]


def write_csv(path: Path | str, records: Sequence[Record]) -> None:
    """Writes one row per record, one column per field; null is empty, lists and objects are JSON, numbers are exact.

    A column with an interval in any record is followed by the two ends, NAME_low and NAME_high.
    """
    shown, rows = with_ends(records)
    names = [column.name for column in shown]
    with atomic_path(path) as temporary:
        temporary.write_bytes(csv_text([names, *([row[name] for name in names] for row in rows)]).encode())
