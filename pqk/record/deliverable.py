"""Keeps the runs behind a statement, with statistics, figures and sha256, in one folder that can be checked: `freeze`.

deliverables/NAME/runs.tsv       every run, and the file that it was in
deliverables/NAME/summary.tsv    mean and sample standard deviation: per file and train seed, per file, pooled
deliverables/NAME/figures/       mean and standard deviation of each metric
deliverables/NAME/scores/        the scores of every sample of each run (`pqk.record.pair_scores`)
deliverables/NAME/README.md      description and main numbers
deliverables/NAME/manifest.tsv   sha256 of all of these, and of the checkpoints (which are not copied)

With a plan also the files that `pqk.study.campaign` gathers: plan.json, records/, ablation/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pqk.errors import PqkError
from pqk.files import below, clear_write_errors, sha256_file, whole_folder
from pqk.record.ledger import (
    columns_of,
    headline,
    measured_in,
    read_rows,
    read_runs,
    refuse_mixed,
    summarise_files,
    telling,
    write_summary,
)
from pqk.record.pair_scores import SCORES
from pqk.record.tsv import Kind, Row, markdown_cell, read_table, write_table

MANIFEST = "manifest.tsv"
RUNS = "runs.tsv"
MANIFEST_COLUMNS: dict[str, Kind] = {"kind": "text", "path": "text", "bytes": "int", "sha256": "text"}
_ABOUT = {
    "plan.json": "what was planned, and how far each run is",
    "records": "a record of `pqk run`: Teacher, baseline or candidate",
    "ablation": "a table or figure of the ablations",
}
_SCORES_LINE = (
    f"| `{SCORES}/NAME.tsv` | the scores of a run's samples; NAME is the last part of its `output` in `runs.tsv` |"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")

Draw = Callable[[Sequence[Row], Sequence[Row], Path], list[str]]
"""Draws figures of runs and their summary into a folder; returns the names of the files."""


def safe_name(name: str, what: str) -> str:
    """Returns `name` if it can name a folder anywhere: letters, digits, '.', '_', '-'. Raises PqkError."""
    if not _NAME.fullmatch(name):
        raise PqkError(
            f"{what} {name[:100]!r}: a name is a letter or digit, then up to 79 letters, digits, '.', '_' or '-'"
        )
    return name


def freeze(
    folder: Path,
    tables: Sequence[tuple[Path, Sequence[Row]]],
    commit: str | None,
    draw: Draw,
    more: Mapping[str, bytes] | None = None,
) -> list[str]:
    """Writes the deliverable, whole or not at all; returns notes about runs that were not pooled.

    folder: .../deliverables/NAME, which must not exist. tables: see `ledger.read_results`. commit: of the project, for
    the README. draw: `pqk.report.runs.draw_runs`. more: contents of further files, by relative name. Raises PqkError
    for an unsafe name, for a name that exists, and as `summarise_files` does.
    """
    name = safe_name(folder.name, "deliverable")
    refuse_mixed(tables)
    summary, notes = summarise_files(tables)
    runs: list[Row] = [{"file": path.name, **row} for path, rows in tables for row in rows]
    with whole_folder(folder) as new, clear_write_errors(folder):
        write_table(new / RUNS, {"file": "text", **columns_of(runs)}, runs)
        write_summary(new / "summary.tsv", summary)
        (new / "figures").mkdir()
        drawn = draw(runs, summary, new / "figures")
        for name_of, content in (more or {}).items():
            (new / name_of).parent.mkdir(parents=True, exist_ok=True)
            (new / name_of).write_bytes(content)
        text = _readme(name, runs, summary, notes, drawn, commit, sorted(more or {}))
        (new / "README.md").write_text(text, encoding="utf-8")
        write_table(new / MANIFEST, MANIFEST_COLUMNS, [*_files(new), *_checkpoints(runs)])
    return notes


def _files(folder: Path) -> list[Row]:
    return [
        {
            "kind": "file",
            "path": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in below(folder)
        if path.is_file()
    ]


def _checkpoints(runs: Sequence[Row]) -> list[Row]:
    found = {row["checkpoint_sha256"]: row["checkpoint"] for row in runs}
    return [{"kind": "checkpoint", "path": name, "bytes": None, "sha256": digest} for digest, name in found.items()]


def check_files(folder: Path) -> tuple[list[str], list[Row]]:
    """Hashes every file of a deliverable again. Returns a sentence per difference, and the runs if there is none.

    Raises PqkError when there is no such deliverable, or its manifest cannot be read.
    """
    changed, stated = changed_files(folder)
    said = list(changed.values())
    if said:
        return said, []
    runs = read_runs(folder / RUNS, {"file": "text"})
    return unlisted_checkpoints(stated, runs), runs


def changed_files(folder: Path) -> tuple[dict[str, str], list[Row]]:
    """Hashes every file of a deliverable again. Returns a sentence per changed file by its name, and the manifest.

    Raises PqkError when there is no such deliverable, or its manifest cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        raise PqkError(f"{folder} is not a deliverable: it has no {MANIFEST}")
    stated = read_table(folder / MANIFEST, MANIFEST_COLUMNS, ("kind", "path", "sha256"))
    files = {row["path"]: row for row in stated if row["kind"] == "file"}
    there = {row["path"]: row for row in _files(folder) if row["path"] != MANIFEST}
    said = {name: f"{name} is missing" for name in files if name not in there}
    said |= {name: f"{name} is not in the manifest" for name in there if name not in files}
    for name, row in files.items():
        now = there.get(name, row)
        if now["sha256"] != row["sha256"]:
            said[name] = f"{name} was changed: its sha256 is {now['sha256']}, frozen was {row['sha256']}"
        elif now["bytes"] != row["bytes"]:
            said[name] = f"{name} has {now['bytes']} bytes, the manifest says {row['bytes']}"
    if RUNS not in files:
        said[RUNS] = f"the manifest does not list {RUNS}"
    return said, stated


def unlisted_checkpoints(stated: Sequence[Row], runs: Sequence[Row]) -> list[str]:
    """Returns a sentence per checkpoint of the runs whose sha256 the manifest does not list, or under another name."""
    listed = {row["sha256"]: row["path"] for row in stated if row["kind"] == "checkpoint"}
    used: dict[str, set[str]] = {}
    for row in runs:
        used.setdefault(row["checkpoint_sha256"], set()).add(row["checkpoint"])
    return [
        f"checkpoint {' or '.join(sorted(names))} is not in the manifest"
        for digest, names in used.items()
        if listed.get(digest) not in names
    ]


def differences(row: Row, again: Row, tolerance: float) -> list[str]:
    """Returns a sentence for each metric whose new value differs by more than `tolerance` of the frozen one."""
    said = []
    for name in measured_in([row]):
        old, new = row[name], again.get(name)
        if name in ("fps", "drop_pct"):  # times vary; the drop follows from the main metric
            continue
        if (old is None) != (new is None):
            said.append(f"{name} is {new} now, frozen was {old}")
        elif old is not None and abs(new - old) > tolerance * abs(old):
            relative = f"{abs(new - old) / abs(old):.2g} of it" if old else "it was 0"
            said.append(f"{name} is {new:.8g} now, frozen was {old:.8g} (off by {relative}, allowed {tolerance:g})")
    return said


def label(line: Row) -> str:
    tool = "/".join(line[name] for name in ("backend", "quantizer") if line[name])
    where = {"train_seed": f"train seed {line['train_seed']}", "file": "all seeds", "pooled": "all files"}
    name = f"{line['file'].removesuffix('.tsv')}: " if line["file"] else ""
    emulated = " emulated" if line["measured"] == "emulated" else ""
    text = f"{name}{line['card']} {line['precision']} {tool}{emulated}, {where[line['scope']]}"
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if len(text) <= 90 else f"{text[:89]}…"


# README


def _readme(
    name: str,
    runs: Sequence[Row],
    summary: Sequence[Row],
    notes: Sequence[str],
    figures: Sequence[str],
    commit: str | None,
    more: Sequence[str],
) -> str:
    metrics = headline(runs)
    seeds = {(row["train_seed"], row["eval_seed"]) for row in runs}
    devices = sorted({row["device"] for row in runs})
    commits = sorted({row["commit"] or "unknown" for row in runs})
    listed = [name_of for name_of in more if not name_of.startswith(f"{SCORES}/")]
    parts = [
        f"# {name}",
        "",
        f"Fixed checkpoints: {len(_checkpoints(runs))}. Pairs of train and eval seed: {len(seeds)}. Evaluations: "
        f"{len(runs)}, on {', '.join(map(markdown_cell, devices))}.",
        "",
        _markdown_line(["runs", "n", *(f"{metric}, mean ± std" for metric in metrics)]),
        _markdown_line(["---"] * (2 + len(metrics))),
    ]
    for line in telling(summary):
        parts.append(
            _markdown_line(
                [markdown_cell(label(line)), str(line["n"]), *(mean_std(line, metric) for metric in metrics)]
            )
        )
    parts += [
        "",
        "std is the sample standard deviation over the runs of a line (n - 1 in the denominator), and empty for one "
        "run. Speed (fps, pairs per second) belongs to the device it was measured on.",
        "",
        *(f"- {markdown_cell(note)}" for note in notes),
        *([""] if notes else []),
        "| file | what is in it |",
        "| --- | --- |",
        "| `runs.tsv` | one row per evaluation: seeds, metrics, checkpoint and digests, device, commit |",
        "| `summary.tsv` | mean and std of every metric: per file and train seed, per file, over all files |",
        "| `manifest.tsv` | sha256 of each file here, and of the checkpoints, which are not copied |",
        *(f"| `figures/{figure}` | {figure.removesuffix('.png')}: mean and std, and every run |" for figure in figures),
        *(f"| `{name_of}` | {_ABOUT.get(name_of.partition('/')[0], 'of the plan')} |" for name_of in listed),
        *([_SCORES_LINE] if len(listed) < len(more) else []),
        "",
        "Digests that all runs share:",
        "",
        f"- workload: {runs[0]['workload_sha256']}",
        f"- evaluation: {runs[0]['eval_sha256']}",
        f"- commits of the runs: {', '.join(map(markdown_cell, commits))}",
        f"- commit when it was frozen: {markdown_cell(commit or 'unknown')}",
        "",
        f"Check it: `pqk ledger verify {name}` hashes everything again and repeats one run.",
        "",
    ]
    return "\n".join(parts)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean_std(line: Row, metric: str) -> str:
    mean, std = line.get(f"{metric}_mean"), line.get(f"{metric}_std")
    if mean is None:
        return "–"
    return f"{mean:.5g}{spread(std)}"


def spread(std: float | None) -> str:
    """Returns ' ± 0.012', or '' for none."""
    return "" if std is None else f" ± {std:.2g}" if std < 100 else f" ± {std:.0f}"


def tables_of(files: Sequence[Path]) -> list[tuple[Path, list[Row]]]:
    """Reads named ledgers. Raises PqkError for an empty one, one named twice, and those that must not be mixed."""
    if len({path.name for path in files}) != len(files):
        raise PqkError("two of the files have the same name; a deliverable identifies its runs' files by name")
    tables = [(path, read_rows(path)) for path in files]
    for path, rows in tables:
        if not rows:
            raise PqkError(f"{path} holds no run")
    refuse_mixed(tables)
    return tables
