"""Defines the command line. Every verb imports its work when it runs, so that `pqk --help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pqk.cli.bench import app as bench_app
from pqk.cli.help import finish, group
from pqk.cli.ledger import app as ledger_app
from pqk.cli.report import report
from pqk.cli.study import app as study_app
from pqk.command import given_command

_ABOUT = "A bench for compressing feed-forward 3D transformers."
app = group(_ABOUT)
train_app = group("Train models.")
data_app = group("Make scenes and sets of images with boxes.")
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(ledger_app, name="ledger")
app.add_typer(study_app, name="study")


def _say_version(asked: bool) -> None:
    if asked:
        from pqk import __version__

        print(f"pqk {__version__}")
        raise typer.Exit


@app.callback(help=_ABOUT)
def _pqk(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


_Quantizer = Annotated[str | None, typer.Option(help="quantizer of the backend; default: its first")]
_Model = Annotated[str | None, typer.Option(help="as in `pqk run`; default: the shipped one")]
_Setting = Annotated[list[str] | None, typer.Option("--set", help="override one value, as in `pqk run`")]
_Json = Annotated[bool, typer.Option("--json", help="print everything as one JSON object, last line")]
_Scenes = Annotated[Path | None, typer.Option(help="folder of scenes with ground truth")]
_Images = Annotated[Path | None, typer.Option(help="folder of photographs")]
_On = Annotated[
    str | None, typer.Option("--on", help="local (the default), ray[:ADDRESS], slurm[:PARTITION] or slurm-local")
]
_Each = Annotated[
    str | None, typer.Option("--each", help="with --on: what each cell needs, such as cores=8,gpus=1,retries=3")
]
_Fresh = Annotated[bool, typer.Option(help="make everything again, reuse nothing")]
_Retime = Annotated[bool, typer.Option("--retime", help="measure time and memory again; reuse the rest")]
_TrainScenes = Annotated[
    Path | None, typer.Option(help="folder of scenes with depth, to train P, K, QAT and PQK on; default: generated")
]
_TrainImages = Annotated[
    Path | None, typer.Option(help="folder of photographs to train on, with the Teacher's output as ground truth")
]


@app.command()
def run(
    card: Annotated[str, typer.Argument(help="task card, for example B1 (schedule/TaskCards)")],
    backend: Annotated[
        str | None,
        typer.Option(help="openvino, onnxruntime, trt or auto (the default): trt with a CUDA device, else openvino"),
    ] = None,
    quantizer: _Quantizer = None,
    model: Annotated[
        str | None,
        typer.Option(help="official .pth, hub folder, our folder, or random:NAME; default: the shipped one"),
    ] = None,
    scenes: Annotated[
        Path | None, typer.Option(help="folder of scenes with ground truth (ETH3D, COLMAP or CO3Dv2 layout)")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="folder of photographs; quality is then measured against the Teacher")
    ] = None,
    train_scenes: _TrainScenes = None,
    train_images: _TrainImages = None,
    seed: Annotated[int | None, typer.Option(min=0, help="train and evaluation seed; default: workload.yaml's")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="override one value, e.g. quant.ptq.calibration_images=64")
    ] = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="run only this axis of a card with a matrix (H1); can be repeated")
    ] = None,
    qat: Annotated[bool, typer.Option(help="use quantization-aware training where PTQ drops too much")] = True,
    rollback: Annotated[bool, typer.Option(help="apply the rollback table to a recipe that drops too much")] = True,
    decide: Annotated[
        bool, typer.Option("--decide", help="add test scenes until the interval of the drop decides the verdict")
    ] = False,
    max_scenes: Annotated[int, typer.Option(min=2, help="with --decide: largest number of test scenes")] = 832,
    fresh: _Fresh = False,
    retime: _Retime = False,
    processes: Annotated[
        int, typer.Option(min=1, help="how many processes share each training and its batches, such as one per GPU")
    ] = 1,
    preset: Annotated[
        str | None,
        typer.Option(
            help="settings by name (configs/presets), such as quick: a shortened run, with what it should give"
        ),
    ] = None,
    trackers: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            metavar="TRACKER",
            help="also send the records to mlflow[:URI] or trackio[:PROJECT]; can be repeated",
        ),
    ] = None,
    point: Annotated[
        str | None, typer.Option(help="with one --axis: run only this point of it, write no table")
    ] = None,
    on: _On = None,
    each: _Each = None,
    json_line: Annotated[bool, typer.Option("--json", help="print the candidate's record as the last line")] = False,
) -> None:
    """Run a task card: Teacher in every float precision, the recipe, quality, timing, one record each.

    Exit codes: 0 ok, 1 a threshold failed, 2 wrong input, 3 backend or method unavailable, 4 undecided: the measurement
    is too coarse to decide whether a threshold held.
    """
    from pqk.cli.run_output import choose_backend, run_card, settings_of
    from pqk.cli.spread import spread_of
    from pqk.recipe.request import Request

    request = Request(
        card,
        choose_backend(backend),
        quantizer,
        model,
        scenes,
        images,
        seed,
        fresh,
        settings_of(setting or []),
        qat=qat,
        retime=retime,
        train_scenes=train_scenes,
        train_images=train_images,
        processes=processes,
        command=given_command(),
    )
    limit = max_scenes if decide else None
    raise typer.Exit(
        run_card(
            request,
            json_line,
            axes=axis or (),
            rollback=rollback,
            decide=limit,
            track=trackers or (),
            preset=preset,
            point=point,
            spread=spread_of(on, each),
        )
    )


@app.command()
def parity(
    card: Annotated[str, typer.Argument(help="task card, for example B1 (schedule/TaskCards)")],
    backends: Annotated[str, typer.Option(help="toolchains to compare, separated by commas")] = "trt,openvino",
    quantizers: Annotated[str | None, typer.Option(help="e.g. nncf,inc,modelopt; default: each backend's own")] = None,
    model: _Model = None,
    scenes: _Scenes = None,
    images: _Images = None,
    train_scenes: _TrainScenes = None,
    train_images: _TrainImages = None,
    seed: Annotated[int | None, typer.Option(min=0, help="train and evaluation seed")] = None,
    setting: _Setting = None,
    fresh: _Fresh = False,
    retime: _Retime = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="rank the nodes of each quantized run by their error")
    ] = False,
    json_line: _Json = False,
) -> None:
    """Compare one recipe on every toolchain: quality, speed and difference of the outputs, with a verdict per level.

    Exit codes: 0 all compared levels agree, 1 one differs, 2 wrong input, 3 nothing could be run, 4 one is undecided:
    too few scenes to say whether the metric agrees.
    """
    from pqk.cli.run_output import run_parity, settings_of
    from pqk.recipe.request import Request

    names, tools = (
        [w.strip() for w in text.split(",") if w.strip()] if text else None for text in (backends, quantizers)
    )
    request = Request(
        card,
        "",
        None,
        model,
        scenes,
        images,
        seed,
        fresh,
        settings_of(setting or []),
        retime=retime,
        train_scenes=train_scenes,
        train_images=train_images,
        command=given_command(),
    )
    raise typer.Exit(run_parity(request, names or [], tools, explain, json_line))


@app.command()
def tune(
    card: Annotated[str, typer.Argument(help="task card, for example B1 (schedule/TaskCards)")],
    max_drop: Annotated[float, typer.Option(help="largest allowed drop of the main metric, in percent")] = 1.0,
    aim: Annotated[
        Literal["quality", "speed"],
        typer.Option(
            "--for", help="quality: float nodes that a drop under the limit needs; speed: those faster in float"
        ),
    ] = "quality",
    max_evaluations: Annotated[
        int | None, typer.Option(min=2, help="most choices of float nodes to measure; default: 12, for speed 40")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="the tuned file; default: reports/tune/CARD.quant.yaml")
    ] = None,
    backend: Annotated[str, typer.Option(help="a backend that runs here, not emulated")] = "openvino",
    quantizer: _Quantizer = None,
    model: _Model = None,
    scenes: _Scenes = None,
    images: _Images = None,
    train_scenes: _TrainScenes = None,
    train_images: _TrainImages = None,
    setting: _Setting = None,
    json_line: _Json = False,
) -> None:
    """Tune mixed precision: find the nodes that must stay in float for a drop under the limit, write the quant.yaml.

    With --for speed: find the layers that are faster in float here.

    Exit codes: 0 the tuned recipe is within the limit on the test samples, 1 it is not, 2 wrong input, 3 backend or
    method unavailable, 4 undecided on the test samples.
    """
    from pqk.cli.run_output import run_tune, settings_of
    from pqk.recipe.request import Request

    request = Request(
        card,
        backend,
        quantizer,
        model,
        scenes,
        images,
        settings=settings_of(setting or []),
        train_scenes=train_scenes,
        train_images=train_images,
        command=given_command(),
    )
    raise typer.Exit(run_tune(request, aim, max_drop, max_evaluations, out, json_line))


@app.command()
def optimize(
    model: Annotated[str | None, typer.Argument(help="as --model of `pqk run`; default: the shipped one")] = None,
    max_drop: Annotated[float, typer.Option(help="largest allowed drop of the main metric, in percent")] = 1.0,
    letters: Annotated[
        str | None, typer.Option(help="letters to try out of T,Q,K,P; default: all that are possible here")
    ] = None,
    budget: Annotated[str, typer.Option(help="begin nothing new after this time, such as 90s, 30m, 2h")] = "30m",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="folder of the export; default: none is written")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="as in `pqk run`; one that runs here, not emulated")] = None,
    quantizer: _Quantizer = None,
    scenes: _Scenes = None,
    images: _Images = None,
    train_scenes: _TrainScenes = None,
    train_images: _TrainImages = None,
    setting: _Setting = None,
    decide: Annotated[
        bool, typer.Option("--decide", help="add test scenes until the interval of the winner's drop decides")
    ] = False,
    max_scenes: Annotated[int, typer.Option(min=2, help="with --decide: largest number of test scenes")] = 832,
    json_line: _Json = False,
) -> None:
    """Find the fastest recipe within a drop on this machine, verify it on test samples once, and export it.

    Exit codes: 0 accept, 1 regression, anomalous or infeasible, 2 wrong input, 3 backend or method unavailable, 4
    undecided on the test samples.
    """
    from pqk.cli.run_output import choose_backend, run_optimize, seconds_of, settings_of
    from pqk.recipe.request import Request

    seconds = seconds_of(budget)
    request = Request(
        "AUTO",
        choose_backend(backend),
        quantizer,
        model,
        scenes,
        images,
        settings=settings_of(setting or []),
        train_scenes=train_scenes,
        train_images=train_images,
        command=given_command(),
    )
    asked = None if letters is None else [letter.strip() for letter in letters.split(",")]
    raise typer.Exit(run_optimize(request, asked, max_drop, seconds, out, max_scenes if decide else None, json_line))


@app.command()
def profile(
    card: Annotated[str, typer.Argument(help="task card, for example B1; without --predict one that quantizes")],
    predict: Annotated[
        bool, typer.Option("--predict", help="predict the speed of its rows instead, before they are made")
    ] = False,
    rounds: Annotated[int, typer.Option(min=3, help="how often each engine is profiled")] = 7,
    backend: Annotated[str | None, typer.Option(help="as in `pqk run`; one that runs here, not emulated")] = None,
    quantizer: _Quantizer = None,
    model: _Model = None,
    setting: _Setting = None,
    json_line: _Json = False,
) -> None:
    """Show where the time of a card's f32 and int8 engines goes, and why int8 is as fast as it is here; with --predict
    how fast its rows will be, from the times of their parts, and what this machine measured of them.

    Exit codes: 0 ok, 2 wrong input, 3 backend or method unavailable.
    """
    from pqk.cli.run_output import choose_backend, run_predict, run_profile, settings_of
    from pqk.recipe.request import Request

    given = settings_of(setting or [])
    request = Request(card, choose_backend(backend), quantizer, model, settings=given, qat=False)
    raise typer.Exit(run_predict(request, json_line) if predict else run_profile(request, rounds, json_line))


@app.command()
def export(
    card: Annotated[str, typer.Argument(help="task card, for example B1")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to write; an earlier export in it is replaced")],
    backend: Annotated[str | None, typer.Option(help="as in `pqk run`")] = None,
    quantizer: _Quantizer = None,
    precision: Annotated[
        str | None,
        typer.Option(help="int8, f32, bf16 ...; default: int8 when the recipe quantizes, else best float"),
    ] = None,
    model: _Model = None,
    setting: _Setting = None,
    train_scenes: _TrainScenes = None,
    train_images: _TrainImages = None,
    qat: Annotated[bool, typer.Option(help="as in `pqk run`")] = True,
    rollback: Annotated[bool, typer.Option(help="as in `pqk run`")] = True,
    fresh: _Fresh = False,
) -> None:
    """Write the candidate that `pqk run` measures as a folder that runs without pqk: graphs or plans, manifest.json,
    sample.py.

    Exit codes: 0 ok, 2 wrong input, 3 backend or method unavailable.
    """
    from pqk.cli.run_output import choose_backend, export_card, settings_of
    from pqk.recipe.request import Request

    chosen = choose_backend(backend)
    request = Request(
        card,
        chosen,
        quantizer,
        model,
        fresh=fresh,
        settings=settings_of(setting or []),
        qat=qat,
        train_scenes=train_scenes,
        train_images=train_images,
        command=given_command(),
    )
    raise typer.Exit(export_card(request, precision, out, rollback))


@app.command()
def plan(
    name: Annotated[
        str,
        typer.Argument(
            help="minimal, medium, best, results or your own (schedule/plans); or: status, schedule, review"
        ),
    ],
    of: Annotated[
        str | None, typer.Argument(help="after status, schedule and review: the plan; default: all, not for schedule")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="dollars per hour; default: the plan's, 6.88")] = None,
    device: Annotated[str | None, typer.Option(help="hours on H100 or A100; default: the plan's device")] = None,
    execute: Annotated[bool, typer.Option("--run", help="run the plan, or resume it; finished runs are kept")] = False,
    backend: Annotated[str | None, typer.Option(help="with --run: as in `pqk run`")] = None,
    model: Annotated[str | None, typer.Option(help="with --run: as in `pqk run`")] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="with --run: also run experiments whose requirement failed thresholds")
    ] = False,
    on: _On = None,
    each: _Each = None,
    days: Annotated[
        int | None, typer.Option(min=1, help="of schedule: its length, default 30; of review: how far back, default 7")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="with review of a plan: also put it into the plan's schedule")
    ] = False,
    json_line: Annotated[bool, typer.Option("--json", help="print one JSON object, last line")] = False,
) -> None:
    """Show several task cards in order, with hours, cost and dependencies; --run runs or resumes the plan.

    `schedule` writes a plan as days with boxes into schedule/, `review` says what ran in the last week.

    Exit codes of --run: 0 all done, 1 an experiment failed or was stopped, 2 an error, 3 only unavailable ones are
    left, 4 one is undecided.
    """
    from pqk.cli.plan_output import plan as planned
    from pqk.cli.spread import spread_of

    spread = spread_of(on, each)
    raise typer.Exit(
        planned(name, of, rate, device, execute, backend, model, keep_going, json_line, days, write, spread)
    )


@app.command()
def check() -> None:
    """Check the configs, task cards, plans and the log schema, without a model or data. Prints PASS or the problems."""
    from pqk.cli.check import main as dry_run

    raise typer.Exit(dry_run())


@app.command()
def verify(
    deliverable: Annotated[str, typer.Argument(help="folder in deliverables/, or the path of one")],
    json_line: _Json = False,
) -> None:
    """Check a deliverable against itself, offline and without a model: bytes, numbers, seeds and records.

    Exit codes: 0 nothing differs, 2 no deliverable; of the rules 10 a file is not the one that was frozen, 11 a number
    does not follow from what it was computed from, 12 a seed is missing, 13 a record or table breaks its schema. Where
    several are broken, every fault is printed and the highest code is returned.
    """
    from pqk.cli.verify import run_verify

    raise typer.Exit(run_verify(deliverable, json_line))


@app.command()
def table(
    logs: Annotated[Path | None, typer.Option(help="folder of records; default logs/")] = None,
    reports: Annotated[
        Path | None, typer.Option(help="folder for tables and plots; default: the places in configs/eval.yaml")
    ] = None,
) -> None:
    """Merge all records into result_table.xlsx, summary.csv, summary.json and plots, and print them."""
    from pqk import paths
    from pqk.report.table import main as aggregate

    given = {"--logs": logs, "--reports": reports}
    arguments = [word for name, path in given.items() if path for word in (name, str(path))]
    raise typer.Exit(aggregate(arguments, paths.project_root()))


app.command()(report)


@app.command()
def show(
    images: Annotated[Path, typer.Option(help="folder of pictures, taken in the order of their names")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the figures; older ones in it are replaced")],
    model: _Model = None,
    against: Annotated[
        str | None, typer.Option(help="another model of the family, or a file of quantized weights, drawn beside it")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="take the first pictures only")] = 4,
    setting: _Setting = None,
) -> None:
    """Draw what a model predicts of pictures, beside another model: depth, points (also as PLY) and cameras, or boxes.

    Exit codes: 0 ok, 2 wrong input, 3 predictions of this family cannot be drawn.
    """
    from pqk.cli.show_output import show_pictures

    raise typer.Exit(show_pictures(model, against, images, max_images, out, setting or []))


@app.command()
def env(json_line: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """Show every backend with versions, devices and instruction sets, or why it is unavailable and how to fix that."""
    from pqk.env import show_environment

    show_environment(json_line)


@data_app.command("make")
def data_make(
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the scenes, or for the set")],
    kind: Annotated[
        Literal["scenes", "detection"], typer.Option(help="scenes with depth, or images with boxes in COCO's format")
    ] = "scenes",
    split: Annotated[str, typer.Option(help="test, validation, calibration or train")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="base seed of the split")] = 0,
    count: Annotated[int | None, typer.Option(min=1, help="number of scenes; default: 8")] = None,
    views: Annotated[int | None, typer.Option(help="views per scene; default: 6")] = None,
    size: Annotated[int | None, typer.Option(help="image side of a scene in pixels; default: 512")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="with --kind detection: images; default: 500")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="processes; default: one per allowed core")] = None,
) -> None:
    """Render procedural scenes with exact depth in the COLMAP + depth layout that real scenes have.

    With --kind detection: images of 320x240 pixels of rooms with balls, boxes and cylinders, and their exact boxes.
    """
    from pqk.cli.run_output import make_data, make_detection, refuse_options

    if kind == "detection":
        refuse_options("--kind detection takes --images", {"--count": count, "--views": views, "--size": size})
        make_detection(split, 500 if images is None else images, seed, out, jobs)
    else:
        refuse_options("--kind scenes takes --count, --views and --size", {"--images": images})
        given = (8 if count is None else count, 6 if views is None else views, 512 if size is None else size)
        make_data(split, *given, seed, out, jobs)


@train_app.command("teacher")
def train_teacher(
    config: Annotated[Path | None, typer.Option(help="training file; default: that of configs/teacher.yaml")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the checkpoint and the shipped weights")] = Path(
        "outputs/teacher"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="train for this time, not for a number of steps")] = None,
    pause_after: Annotated[float | None, typer.Option(help="pause after this many seconds")] = None,
    steps: Annotated[int | None, typer.Option(help="override the number of steps")] = None,
    autocast: Annotated[bool | None, typer.Option(help="bf16 autocast; default: on for CUDA, off for a CPU")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="use torch.compile")] = False,
    fresh: Annotated[bool, typer.Option(help="ignore an existing checkpoint")] = False,
    init: Annotated[str | None, typer.Option(help="start from these weights: a folder or a file")] = None,
) -> None:
    """Train the embedded teacher on rendered pairs; resumes by itself, and uses DDP under torchrun."""
    from pqk.cli.training_progress import run_train_teacher

    run_train_teacher(config, out, device, minutes, pause_after, steps, autocast, compiled, fresh, init)


finish(app, train_app, data_app, bench_app, ledger_app, study_app)


def main() -> None:
    """Runs the command line; turns a user's error into one sentence on stderr and the documented exit code."""
    from pqk.errors import told
    from pqk.result import reported
    from pqk.store.sources import keep_sources

    # torch's threads then sleep while they wait. Spinning, they starve beside any other work: rendering 2 scenes took
    # 64 s instead of 1 s on 2 cores where something else ran.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_sources()
    sys.exit(told(reported(lambda: app(standalone_mode=True))))
