"""Runs the verbs of `pqk ledger`, and prints their results in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pqk import paths, result
from pqk.cli.spread import Spread
from pqk.errors import EXIT_CHECK_FAILED, EXIT_OK, PqkError
from pqk.files import check_writable, sha256_file
from pqk.launch.cell import placed
from pqk.record import comparison, ledger
from pqk.record import deliverable as freeze
from pqk.record.pair_scores import files_of, scores_here
from pqk.record.tsv import Row
from pqk.report.cells import printable
from pqk.report.drops import drop_of
from pqk.report.runs import draw_runs
from pqk.settings.seeds import parse_seeds

if TYPE_CHECKING:
    from pqk.study.ledger_eval import Asked


def finalize(
    checkpoint: str | None,
    name: str | None,
    train_seed: int | None,
    card: str | None,
    backend: str | None,
    quantizer: str | None,
    model: str | None,
    settings: list[str],
) -> int:
    """Runs `pqk ledger finalize`: keeps a checkpoint, or a card's own result; its folder is the last line of stdout."""
    from pqk.study.checkpoints import FINALIZED, finalize, folder_of

    root = paths.project_root()
    check_writable(folder_of(root))
    if checkpoint is not None:
        if backend or quantizer or model or settings:
            raise PqkError("--backend, --quantizer, --model and --set are for a card's own result: leave out the CKPT")
        kept, new = finalize(checkpoint, root, name, train_seed, card)
    else:
        from pqk.cli.run_output import _progress, choose_backend, settings_of
        from pqk.study.ledger_eval import Asked, Bench, finalize_result

        errors = Console(stderr=True, highlight=False)
        asked = Asked(
            None,
            backend=choose_backend(backend),
            quantizer=quantizer,
            card=card,
            train_seed=train_seed,
            settings=settings_of(settings),
            model=model,
        )
        kept, new = finalize_result(Bench(asked, root, _progress(errors), say=_teller(errors)), name, root)
    about = kept.card[FINALIZED]
    print(f"{'kept' if new else 'was kept already'}: {printable(kept.name)}")
    print(f"sha256 {about['checkpoint_sha256']}")
    if kept.result is not None:
        print(f"graphs of {kept.result['lowered']}, float checkpoint sha256 {kept.result['float_sha256']}")
    print(f"{about['params']:,} parameters, train seed {about['train_seed']}, task card {about['card'] or 'unknown'}")
    print(paths.shown(folder_of(root) / about["name"]))
    return EXIT_OK


def evaluate(
    checkpoint: str | None,
    seeds: str,
    backend: str | None,
    precision: str | None,
    quantizer: str | None,
    card: str | None,
    train_seed: int | None,
    settings: list[str],
    out: Path | None,
    timed: bool,
    as_json: bool,
    model: str | None,
    train_scenes: Path | None,
    train_images: Path | None,
    spread: Spread | None = None,
) -> int:
    """Runs `pqk ledger eval`: a line per run, mean and std; the last line of stdout is the file (or rows as JSON)."""
    from pqk.cli.run_output import _progress, choose_backend, settings_of
    from pqk.study.checkpoints import plain_name
    from pqk.study.ledger_cells import evaluate_on
    from pqk.study.ledger_eval import Asked, evaluate_seeds

    root = paths.project_root()
    errors = Console(stderr=True, highlight=False)
    asked = Asked(
        checkpoint,
        parse_seeds(seeds),
        choose_backend(backend),
        precision,
        quantizer,
        card,
        train_seed,
        settings_of(settings),
        timed,
        model,
        train_scenes,
        train_images,
    )
    rows: list[Row] = []

    def say(row: Row, note: str) -> None:
        rows.append(row)
        speed = "" if row["fps"] is None else f", {row['fps']:.4g} pairs/s"
        how = " (emulated)" if row["measured"] == "emulated" else ""
        drop = "" if row["drop_pct"] is None else f", drop {row['drop_pct']:+.2f} %"
        metric = row["main_metric"]
        errors.print(
            f"[bold]eval seed {row['eval_seed']}[/]: {metric} {row[metric]:.5g}{drop}"
            f"{speed}{how}{f' [dim]({note})[/]' if note else ''}"
        )

    if spread is None:
        file = evaluate_seeds(asked, out, root, _progress(errors), say, _teller(errors))
        result.note(ledger=str(file), rows=rows)
    else:
        words = _cell_words(asked, settings, out)
        name = plain_name(Path(checkpoint).name if checkpoint else str(card))
        file = evaluate_on(name, words, asked.eval_seeds, root, *spread, lambda row: say(row, ""), _teller(errors))
        rows.sort(key=lambda row: row["eval_seed"])
    for name in ledger.headline(rows):
        found = ledger.stat([row[name] for row in rows if row.get(name) is not None])
        errors.print(f"{name} {found.mean:.5g}{freeze.spread(found.std)} (mean ± sample std, n = {found.n})")
    drop = drop_of(rows, (), lambda row: None)
    if drop is not None and drop.interval.half is not None:
        errors.print(f"drop {escape(drop.text)} %, 95 % interval over {drop.over}")
    print(json.dumps(rows, allow_nan=False, ensure_ascii=False) if as_json else paths.shown(file))
    return EXIT_OK


def _teller(errors: Console) -> Callable[[str], None]:
    return lambda text: errors.print(f"  [green]✓[/] {escape(text)}")


def _cell_words(asked: Asked, settings: Sequence[str], out: Path | None) -> list[str]:
    """Returns the words of `pqk ledger eval` that measure one eval seed, without the seed."""
    given = {
        "--backend": asked.backend,
        "--precision": asked.precision,
        "--quantizer": asked.quantizer,
        "--card": asked.card,
        "--train-seed": asked.train_seed,
        "--out": None if out is None else out.resolve(),
        "--model": placed(asked.model),
        "--train-scenes": placed(asked.train_scenes),
        "--train-images": placed(asked.train_images),
    }
    words = [] if asked.checkpoint is None else [str(placed(asked.checkpoint))]
    words += [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return [*words, *(word for item in settings for word in ("--set", item)), *([] if asked.timed else ["--no-timing"])]


def manifest(results: Path | None, out: Path | None) -> int:
    """Runs `pqk ledger manifest`: mean and std per file and train seed; the file is the last line of stdout."""
    root = paths.project_root()
    tables = ledger.read_results(results or root / "results")
    summary, notes = ledger.summarise_files(tables)
    target = out or root / "results_manifest.tsv"
    if target.suffix != ".tsv" or target.resolve().parent == tables[0][0].resolve().parent:
        raise PqkError(f"--out {target}: choose a .tsv file outside the folder of results, else it is read as a result")
    ledger.write_summary(target, summary)
    runs = [row for _, rows in tables for row in rows]
    _show(summary, runs)
    for note in notes:
        print(printable(note))
    print(paths.shown(target))
    return EXIT_OK


def _show(summary: Sequence[Row], runs: Sequence[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    main, *others = ledger.headline(runs)
    names = [main, *(name for name in others if ledger.is_higher_better(runs[0], name))]
    for heading in ("runs", "n", *names):
        table.add_column(heading, justify="left" if heading == "runs" else "right", overflow="fold")
    for line in ledger.telling(summary):
        cells = [freeze.label(line), str(line["n"]), *(freeze.mean_std(line, name) for name in names)]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)


def freeze_results(
    name: str, files: Sequence[Path], results: Path | None, plan: str | None = None, backend: str | None = None
) -> int:
    """Runs `pqk ledger freeze`; the deliverable's folder is the last line of stdout."""
    from pqk.recipe.request import commit_of
    from pqk.study.campaign import gather

    root = paths.project_root()
    folder = root / "deliverables" / freeze.safe_name(name, "deliverable")
    if files and results:
        raise PqkError("give either files or --results, not both")
    if plan and (files or results):
        raise PqkError("--plan chooses its files: give neither files nor --results")
    if backend and not plan:
        raise PqkError("--backend goes with --plan")
    more: dict[str, bytes] = {}
    if plan:
        files, more = gather(plan, root, backend)
    tables = freeze.tables_of(files) if files else ledger.read_results(results or root / "results")
    scores, gone = files_of([row for _, rows in tables for row in rows], root)
    for note in [*freeze.freeze(folder, tables, commit_of(), draw_runs, more | scores), *gone]:
        print(printable(note))
    print(f"sha256 of {freeze.MANIFEST}: {sha256_file(folder / freeze.MANIFEST)}")
    print(paths.shown(folder))
    return EXIT_OK


def page(name: str, out: Path | None) -> int:
    """Runs `pqk ledger page`; the page is the last line of stdout, its figures the lines before it."""
    from pqk.report.page.page import write_page

    root = paths.project_root()
    folder = root / "deliverables" / freeze.safe_name(name, "deliverable")
    for path in write_page(folder, out or root / "docs" / "results.md"):
        print(paths.shown(path))
    return EXIT_OK


def verify(name: str, rerun: bool, line: int, tolerance: float, checkpoint: str | None) -> int:
    """Runs `pqk ledger verify`: hashes everything again, then measures one run again; 1 when something differs."""
    root = paths.project_root()
    folder = root / "deliverables" / freeze.safe_name(name, "deliverable")
    if not 0 <= tolerance < 1:
        raise PqkError(f"--tolerance {tolerance}: a share of the frozen value, from 0 to below 1")
    errors = Console(stderr=True, highlight=False)
    said, runs = freeze.check_files(folder)
    print(f"{freeze.MANIFEST}: sha256 {sha256_file(folder / freeze.MANIFEST)}")
    if said:
        for sentence in said:
            print(f"differs: {printable(sentence)}")
        return EXIT_CHECK_FAILED
    print(f"all files are as they were frozen; {len(runs)} runs")

    from pqk.study.checkpoints import folder_of, here, open_checkpoint

    known = here(root)
    used = {row["checkpoint_sha256"]: printable(row["checkpoint"]) for row in runs}
    changed = [used[digest] for digest in used if digest not in known and (folder_of(root) / used[digest]).is_dir()]
    for digest, checkpoint_name in used.items():
        if checkpoint_name in changed:
            print(f"differs: checkpoint {checkpoint_name}: its bytes in outputs/checkpoints are not those of {digest}")
        else:
            print(f"checkpoint {checkpoint_name}: {'as it was' if digest in known else 'not here, not hashed'}")
    if changed:
        return EXIT_CHECK_FAILED
    if not rerun:
        return EXIT_OK
    if not 1 <= line <= len(runs):
        raise PqkError(f"--row {line}: {name} has the rows 1 to {len(runs)}")
    row = runs[line - 1]
    if checkpoint is None and row["checkpoint_sha256"] not in known:
        raise PqkError(
            f"checkpoint {row['checkpoint']} ({row['checkpoint_sha256']}) is neither in outputs/checkpoints nor in "
            f"models; {_how_to_keep(row)}, name it with --checkpoint, or only hash with --no-rerun"
        )

    from pqk.cli.run_output import _progress
    from pqk.study.ledger_eval import measure_again

    found = open_checkpoint(checkpoint or known[row["checkpoint_sha256"]], root)
    seeds = f"train seed {row['train_seed']}, eval seed {row['eval_seed']}"
    what = f"row {line}: {seeds}, {row['precision']} on {row['backend']}"
    errors.print(f"{escape(what)}, measured again from {escape(paths.shown(found.path))}")
    again = measure_again(row, found, root, _progress(errors))
    for sentence in freeze.differences(row, again, tolerance):
        print(f"differs: {printable(sentence)}")
        said.append(sentence)
    if said:
        if again["device"] != row["device"]:
            print(printable(f"this is another device ({again['device']}) than the row's ({row['device']})"))
        if again["scenes_sha256"] != row["scenes_sha256"]:
            print("the images differ too: their sha256 is not the same")
        return EXIT_CHECK_FAILED
    metric = row["main_metric"]
    print(f"{printable(what)}: {metric} {again[metric]:.8g} again, frozen was {row[metric]:.8g}")
    return EXIT_OK


def _how_to_keep(row: Row) -> str:
    if row["lowered"] is None:
        return "keep it there with pqk ledger finalize"
    return (
        "its graphs are made again, and kept there, by "
        f"pqk ledger finalize --card {row['card']} --train-seed {row['train_seed']} --backend {row['backend']}"
    )


def compare(a: Path, b: Path, metric: str | None) -> int:
    """Runs `pqk ledger compare`: prints the difference with its interval, in one sentence."""
    scores = scores_here(paths.project_root())
    found = comparison.compare((a, ledger.read_rows(a)), (b, ledger.read_rows(b)), metric, scores)
    print(f"A {printable(paths.shown(a))}: mean {found.mean_a:.6g}")
    print(f"B {printable(paths.shown(b))}: mean {found.mean_b:.6g}")
    for interval in found.intervals:
        print(
            f"B - A over {interval.n} {interval.unit}: {interval.mean:+.6g}, "
            f"95 % interval {interval.low:+.6g} .. {interval.high:+.6g}"
        )
    for note in found.notes:
        print(printable(note))
    print(found.sentence)
    return EXIT_OK
