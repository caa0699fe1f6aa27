"""Defines the verbs of `pqk bench`. Every verb imports its work when it runs, as in `pqk.cli.app`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pqk.cli.help import group

app = group("Run long measurements.")

_Setting = Annotated[list[str] | None, typer.Option("--set", help="override one value, as in `pqk run`")]


@app.command("scenes")
def bench_scenes(
    views: Annotated[int, typer.Option(min=2, help="views to render")] = 512,
    size: Annotated[int, typer.Option(help="image side in pixels")] = 512,
) -> None:
    """Time the scene generator; the last line is JSON."""
    from pqk.bench.scenes import bench_scenes as measure

    measure(views, size)


@app.command("sampling")
def bench_sampling(
    card: Annotated[str, typer.Argument(help="task card whose candidate is measured")] = "B1",
    backend: Annotated[str, typer.Option(help="a backend that runs here, not emulated")] = "openvino",
    views: Annotated[str, typer.Option(help="views of a scene to try, separated by commas")] = "2,3,4,6",
    scenes: Annotated[int, typer.Option(min=2, help="scenes per number of views")] = 48,
    model: Annotated[str | None, typer.Option(help="folder, file or named model; default: the shipped one")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="the table as .csv")] = Path("reports/sampling.csv"),
) -> None:
    """Measure a drop with many scenes of few views, or few scenes of many, at equal cost; the last line is JSON."""
    from pqk.bench.sampling import bench_sampling as measure
    from pqk.errors import PqkError

    if not all(word.strip().isdigit() for word in views.split(",")):
        raise PqkError(f"--views {views}: give whole numbers separated by commas, such as 2,3,4,6")
    measure(card, backend, [int(word) for word in views.split(",")], scenes, model, out)


@app.command("growth")
def bench_growth(
    over: Annotated[str, typer.Argument(metavar="SETTING", help="what is varied, such as workload.input.frames")],
    values: Annotated[str, typer.Argument(metavar="VALUES", help="whole numbers separated by commas: 1,2,4,8")],
    card: Annotated[str, typer.Option(help="task card that is run for each value")] = "B1",
    backend: Annotated[str, typer.Option(help="a backend that runs here, not emulated")] = "openvino",
    model: Annotated[str | None, typer.Option(help="folder, file or named model; default: the shipped one")] = None,
    setting: _Setting = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="the table as .csv")] = Path("reports/growth.csv"),
) -> None:
    """Measure how time and memory grow with one setting; the last line is JSON."""
    from pqk.bench.growth import bench_growth as measure
    from pqk.cli.run_output import settings_of
    from pqk.errors import PqkError

    if not all(word.strip().isdigit() for word in values.split(",")):
        raise PqkError(f"{values}: give whole numbers separated by commas, such as 1,2,4,8")
    measure(card, backend, model, over, [int(word) for word in values.split(",")], settings_of(setting or []), out)


@app.command("grid")
def bench_grid(
    over: Annotated[list[str], typer.Option("--over", help="SETTING=1,4,20, several times: every combination is run")],
    card: Annotated[str, typer.Option(help="task card that is run for each combination")] = "B1",
    backend: Annotated[str, typer.Option(help="a backend that runs here, not emulated")] = "openvino",
    model: Annotated[str | None, typer.Option(help="folder, file or named model; default: the shipped one")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help='one more point, such as "model=DIR workload.sampler.steps=1"')
    ] = None,
    setting: _Setting = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="the table as .csv")] = Path("reports/grid.csv"),
) -> None:
    """Measure the main metric and time over a grid of settings, with its Pareto front; the last line is JSON."""
    from pqk.bench.grid import bench_grid as measure
    from pqk.cli.run_output import grid_of, point_of, settings_of

    points = [point_of(text) for text in also or []]
    measure(card, backend, model, grid_of(over), points, settings_of(setting or []), out)


@app.command("scene")
def bench_scene(
    card: Annotated[str | None, typer.Option(help="task card whose candidate is timed; default: the f32 model")] = None,
    backend: Annotated[str, typer.Option(help="a backend that runs here, not emulated")] = "openvino",
    model: Annotated[str | None, typer.Option(help="folder, file or named model; default: the shipped one")] = None,
    images: Annotated[str, typer.Option(help="images of a scene, several separated by commas: 4,8,16")] = "12",
    setting: _Setting = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of every scene; an interval needs 6")] = 6,
    out: Annotated[Path, typer.Option("-o", "--out", help="the table as .csv")] = Path("reports/scene.csv"),
) -> None:
    """Time whole scenes, sample by sample and with what samples share computed once; the last line is JSON."""
    from pqk.bench.scene import bench_scene as measure
    from pqk.cli.run_output import settings_of

    numbers = _numbers("--images", images, "4,8,16")
    measure(card, backend, model, numbers, settings_of(setting or []), rounds, out)


@app.command("batch")
def bench_batch(
    sizes: Annotated[str, typer.Argument(metavar="SIZES", help="items in a call, separated by commas: 2,4")] = "2,4",
    backend: Annotated[str, typer.Option(help="a backend that runs here, not emulated")] = "openvino",
    model: Annotated[str | None, typer.Option(help="folder, file or named model; default: the shipped one")] = None,
    setting: _Setting = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of every engine; an interval needs 6")] = 11,
    out: Annotated[Path, typer.Option("-o", "--out", help="the figures as .json")] = Path("reports/batch.json"),
) -> None:
    """Time the f32 graphs of a model with several items in one call; the last line is JSON."""
    from pqk.bench.batch import bench_batch as measure
    from pqk.cli.run_output import settings_of

    measure(backend, model, _numbers("SIZES", sizes, "2,4"), settings_of(setting or []), rounds, out)


@app.command("engine")
def bench_engine(
    card: Annotated[str, typer.Argument(help="task card whose variants are timed")] = "B1",
    model: Annotated[str | None, typer.Option(help="folder, file or named model; default: the shipped one")] = None,
    setting: _Setting = None,
    rounds: Annotated[int, typer.Option(min=6, help="rounds in which every variant runs once")] = 19,
    only: Annotated[str | None, typer.Option(help="parts of names, separated by commas; default: all")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="the figures as .json")] = Path("reports/engine.json"),
) -> None:
    """Time a model by hand and as a card makes it, beside what this machine can do; the last line is JSON."""
    from pqk.bench.engine import bench_engine as measure
    from pqk.cli.run_output import settings_of

    parts = [word.strip() for word in (only or "").split(",") if word.strip()]
    measure(card, model, settings_of(setting or []), rounds, parts, out)


@app.command("teacher")
def bench_teacher(
    model: Annotated[str | None, typer.Option(help="folder, .pth or named model; default: the shipped one")] = None,
    write: Annotated[bool, typer.Option(help="put the figures into the folder's model_card.json")] = False,
) -> None:
    """Score a Teacher on the held-out test scenes, and the floor that any model must beat; the last line is JSON."""
    from pqk.bench.teacher import bench_teacher as measure

    measure(model, write, "pqk " + " ".join(sys.argv[1:]))


@app.command("expect")
def bench_expect(
    card: Annotated[str, typer.Argument(help="task card that was run with the preset")] = "B1",
    preset: Annotated[str, typer.Option(help="name in configs/presets")] = "quick",
    backend: Annotated[str, typer.Option(help="backend of the runs")] = "openvino",
    logs: Annotated[
        list[Path] | None, typer.Option(help="folder of records; can be repeated, a run each; default: logs/")
    ] = None,
) -> None:
    """Write what a preset gives on this kind of machine, from records of measured runs, for `pqk run --preset`."""
    from pqk.cli.presets import expect

    raise typer.Exit(expect(card, preset, backend, logs or []))


def _numbers(option: str, text: str, such_as: str) -> list[int]:
    """Returns whole numbers from 1 of a text. Raises PqkError that names the option."""
    from pqk.errors import PqkError

    if not all(word.strip().isdecimal() and int(word) for word in text.split(",")):
        raise PqkError(f"{option} {text}: give whole numbers from 1 separated by commas, such as {such_as}")
    return [int(word) for word in text.split(",")]
