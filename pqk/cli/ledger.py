"""Defines the verbs of `pqk ledger`. Every verb imports its work when it runs, as in `pqk.cli.app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pqk.cli.help import group

app = group("Keep evidence: fixed checkpoints, train and eval seeds, frozen deliverables.")

_Results = Annotated[Path | None, typer.Option("--results", help="folder of .tsv files; default: results/")]


@app.command()
def finalize(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CKPT]", help="official .pth, or a folder with config.json")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="folder in outputs/checkpoints; default: its name and sha256")
    ] = None,
    train_seed: Annotated[int | None, typer.Option(min=0, help="for a model card without one")] = None,
    card: Annotated[
        str | None, typer.Option(help="task card that made it, e.g. A1; without CKPT the card's own result is kept")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="without CKPT: as in `pqk run`")] = None,
    quantizer: Annotated[str | None, typer.Option(help="without CKPT: as in `pqk run`")] = None,
    model: Annotated[str | None, typer.Option(help="without CKPT: the Teacher, as in `pqk run`")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="without CKPT: as in `pqk run`")] = None,
) -> None:
    """Keep a checkpoint in outputs/checkpoints, with its sha256 in a model card.

    Without CKPT: the result of --card, as `pqk run` made it with these settings; a quantized one with its graphs.

    Exit codes: 0 ok, 2 not a checkpoint, or the name is taken.
    """
    from pqk.cli.ledger_output import finalize as work

    raise typer.Exit(work(checkpoint, name, train_seed, card, backend, quantizer, model, setting or []))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CKPT]", help="a name in outputs/checkpoints, a folder or a .pth")
    ] = None,
    eval_seeds: Annotated[str, typer.Option(help="0..4, or 0,2,5")] = "0..4",
    backend: Annotated[str | None, typer.Option(help="openvino, onnxruntime, trt, reference or auto")] = None,
    precision: Annotated[
        str | None, typer.Option(help="of a CKPT: fp32 (the default), bf16, ... or int8, by the card's settings")
    ] = None,
    quantizer: Annotated[str | None, typer.Option(help="quantizer of the backend; default: its first")] = None,
    card: Annotated[
        str | None,
        typer.Option(help="task card with the settings; default: the model card's. Without CKPT: its own result"),
    ] = None,
    train_seed: Annotated[
        int | None, typer.Option(min=0, help="for a model card without one; without CKPT: workload.seeds.train")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="override one value, as in `pqk run`")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help=".tsv file; default: results/CKPT.CARD.ENGINE.tsv or results/CARD.BACKEND.tsv"
        ),
    ] = None,
    timing: Annotated[bool, typer.Option(help="also measure pairs per second")] = True,
    json_line: Annotated[bool, typer.Option("--json", help="print the rows as JSON, last line")] = False,
    model: Annotated[str | None, typer.Option(help="without CKPT: the Teacher, as in `pqk run`")] = None,
    train_scenes: Annotated[Path | None, typer.Option(help="without CKPT: as in `pqk run`")] = None,
    train_images: Annotated[Path | None, typer.Option(help="without CKPT: as in `pqk run`")] = None,
    on: Annotated[str | None, typer.Option("--on", help="as in `pqk run`: every eval seed runs by itself")] = None,
    each: Annotated[str | None, typer.Option("--each", help="with --on: as in `pqk run`")] = None,
) -> None:
    """Evaluate a fixed checkpoint under several eval seeds, one row each. Existing rows are kept.

    Without CKPT: the result of --card, the candidate that `pqk run CARD --no-rollback` chooses with these settings.

    Exit codes: 0 ok, 1 a kept node ran in int8, 2 wrong input, 3 backend unavailable.
    """
    from pqk.cli.ledger_output import evaluate as work
    from pqk.cli.spread import spread_of

    raise typer.Exit(
        work(
            checkpoint,
            eval_seeds,
            backend,
            precision,
            quantizer,
            card,
            train_seed,
            setting or [],
            out,
            timing,
            json_line,
            model,
            train_scenes,
            train_images,
            spread_of(on, each),
        )
    )


@app.command()
def manifest(
    results: _Results = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="default: results_manifest.tsv")] = None,
) -> None:
    """Write mean and sample std of all results: per file and train seed, per file, over all files of a recipe.

    Exit codes: 0 ok, 2 wrong input, such as files of different workloads.
    """
    from pqk.cli.ledger_output import manifest as work

    raise typer.Exit(work(results, out))


@app.command()
def freeze(
    name: Annotated[str, typer.Argument(help="folder in deliverables/, which must not exist")],
    files: Annotated[list[Path] | None, typer.Argument(help="the .tsv files; default: all of --results")] = None,
    results: _Results = None,
    plan: Annotated[
        str | None, typer.Option(help="freeze a plan: its ledgers, the records of its runs, its ablations; for `page`")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="with --plan; default: that of the plan's last run")] = None,
) -> None:
    """Write deliverables/NAME: all runs, their statistics, figures, README.md and manifest.tsv with every sha256.

    Exit codes: 0 ok, 2 the name is taken, or the files must not be mixed.
    """
    from pqk.cli.ledger_output import freeze_results as work

    raise typer.Exit(work(name, files or [], results, plan, backend))


@app.command()
def page(
    name: Annotated[str, typer.Argument(help="folder in deliverables/, frozen with --plan")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="the .md file, its figures beside it; default: docs/results.md")
    ] = None,
) -> None:
    """Write the page of a campaign: a row per recipe, figures, ablations, runs that are missing, the commands.

    Exit codes: 0 ok, 1 the deliverable was changed, 2 it does not exist, or was frozen without a plan.
    """
    from pqk.cli.ledger_output import page as work

    raise typer.Exit(work(name, out))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="folder in deliverables/")],
    rerun: Annotated[bool, typer.Option(help="measure one run again")] = True,
    row: Annotated[int, typer.Option(help="the run to measure: its row in runs.tsv, from 1")] = 1,
    tolerance: Annotated[float, typer.Option(help="allowed difference, as a share of the frozen value")] = 1e-3,
    checkpoint: Annotated[str | None, typer.Option(help="path of the checkpoint, when pqk does not find it")] = None,
) -> None:
    """Hash a deliverable again, and measure one of its runs again from the checkpoint.

    Exit codes: 0 nothing differs, 1 something differs, 2 wrong input, 3 backend unavailable.
    """
    from pqk.cli.ledger_output import verify as work

    raise typer.Exit(work(name, rerun, row, tolerance, checkpoint))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.tsv")],
    b: Annotated[Path, typer.Argument(metavar="B.tsv")],
    metric: Annotated[str | None, typer.Option(help="default: the main metric")] = None,
) -> None:
    """Compute B minus A over equal train and eval seeds, with a 95 % interval; 'not distinguishable' if it holds 0.

    Exit codes: 0 ok, 2 fewer than 2 pairs, or runs that must not be compared.
    """
    from pqk.cli.ledger_output import compare as work

    raise typer.Exit(work(a, b, metric))
