"""Runs `pqk ledger eval` on a cluster: every eval seed is a cell, and all of them add their rows to one file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from pqk.errors import PqkError
from pqk.files import check_writable
from pqk.launch.cell import Cell, pqk_command, why_not
from pqk.launch.launch import launcher, run
from pqk.launch.machine import KIND_FILE
from pqk.launch.needs import Needs
from pqk.record.tsv import Row


def evaluate_on(
    name: str,
    words: Sequence[str],
    seeds: Sequence[int],
    root: Path,
    on: str,
    needs: Needs,
    heard: Callable[[Row], None],
    say: Callable[[str], None],
) -> Path:
    """Measures each eval seed as a cell, `pqk ledger eval WORDS --eval-seeds SEED`; returns the file of the rows.

    name: of the folder below outputs/ledgers for the output of the cells. heard: gets each row as it comes back.
    Raises PqkError when a seed has no row in the end; the rows of the others are kept.
    """
    folder = root / "outputs" / "ledgers" / name
    check_writable(folder)
    commands = {f"seed-{seed}": pqk_command("ledger", "eval", *words, "--eval-seeds", str(seed)) for seed in seeds}
    cells = deque(
        Cell(each, (command,), root, folder / f"{each}.log", folder / KIND_FILE) for each, command in commands.items()
    )
    file, failed = None, []

    def more(places: int) -> list[Cell]:
        return [cells.popleft() for _ in range(min(places, len(cells)))]

    with launcher(on, needs, folder, say, say) as launched:
        for done in run(more, launched):
            if done.outcome["exit_code"] != 0 or "ledger" not in done.result:
                failed.append(f"{done.name}: {why_not(done)}")
                say(f"{failed[-1]}")
                continue
            file = Path(done.result["ledger"])
            for row in done.result["rows"]:
                heard(row)
    if failed or file is None:
        raise PqkError(f"{len(failed)} of {len(commands)} eval seeds have no row, first {failed[0]}")
    return file
