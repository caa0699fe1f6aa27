"""Says where reports lie, and writes the one of a card after its run: `report_after`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pqk import paths
from pqk.errors import first_line

if TYPE_CHECKING:
    from rich.console import Console


def default_place(name: str | None, root: Path) -> Path:
    """Returns reports/NAME.html; of all records reports/report.html."""
    bare = "report" if name is None else name.rstrip("/").removeprefix("deliverables/")
    return root / "reports" / f"{Path(bare).name}.html"


def report_after(card: str, root: Path, errors: Console) -> None:
    """Writes the report of a card that has just been run, and says where it is; a failure is a sentence, no more."""
    from pqk.report.html.page import write_html

    place = default_place(card, root)
    try:
        write_html(card, place, root)
    except Exception as error:  # whatever it is: the records are written, and the exit code is that of the run
        errors.print(f"no report: {first_line(error)}", style="yellow", markup=False, soft_wrap=True)
    else:
        errors.print(f"report: {paths.shown(place)} (open it in a browser)", markup=False, soft_wrap=True)
