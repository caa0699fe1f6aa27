"""Runs `pqk run`, `parity`, `tune`, `export` and `data make`, and prints their results in the terminal."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from pqk import paths
from pqk.cli.presets import laid_under, show_expected
from pqk.cli.report_file import report_after
from pqk.cli.spread import Spread
from pqk.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_UNDECIDED, PqkError
from pqk.files import check_writable
from pqk.recipe.request import Request
from pqk.recipe.runner import run
from pqk.record.log import record_filename, write_record, write_records
from pqk.report.baseline import write_baseline
from pqk.report.parts import print_parts, write_parts
from pqk.report.table import print_table
from pqk.result import note
from pqk.settings.card import Card, load_card
from pqk.settings.yamlfile import parse_yaml
from pqk.store.store import OnEvent
from pqk.track.track import Tracker, open_tracker
from pqk.track.track import track as send

_CODES = {"pass": EXIT_OK, None: EXIT_OK, "fail": EXIT_CHECK_FAILED, "undecided": EXIT_UNDECIDED}
_DOING = {
    "scenes": "generated scenes:",
    "calibration": "calibration images",
    "graphs": "ONNX export, checked against torch",
    "pruned": "pruning and fine-tuning",
    "distilled": "distillation",
    "reduced": "less work without training",
    "rates": "largest rates of this machine",
    "student": "shapes of the student, untrained",
    "quantized": "quantization",
    "forms": "choice of the fastest form of each quantized graph",
    "qat": "quantization-aware training",
    "joint": "pruning, distillation and quantization in one training",
    "predictions": "predictions,",
    "scores": "quality,",
    "timing": "timing, variants interleaved",
    "memory": "peak memory",
    "parts": "time of every part, Teacher and smaller model in turns",
    "agreement": "agreement of",
    "parted": "first difference of runtimes, ONNX Runtime and",
    "ranking": "ranking the nodes of",
    "mixed": "int8 graphs, nodes in float:",
}


def grid_of(items: list[str]) -> dict[str, list[Any]]:
    """Returns {'workload.sampler.steps': [1, 4]} for `--over workload.sampler.steps=1,4`; values are YAML.

    Raises PqkError as `settings_of` does.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, sign, values = item.partition("=")
        if not sign or not values.strip():
            raise PqkError(f"--over {item}: write it as SETTING=VALUE,VALUE, for example workload.seeds.eval=0,1")
        if name.strip() in found:
            raise PqkError(f"--over {name.strip()} is given twice")
        found |= settings_of([f"{name}=[{values}]"])
    return found


def point_of(text: str) -> dict[str, Any]:
    """Returns {'model': 'DIR', 'workload.sampler.steps': 1} for `--also "model=DIR workload.sampler.steps=1"`.

    Raises PqkError as `settings_of` does, and for quotes that do not close.
    """
    try:
        items = shlex.split(text)
    except ValueError as error:
        raise PqkError(f"--also {text}: {error}") from None
    found = settings_of(items)
    if not isinstance(found.get("model", ""), str) or not found:
        raise PqkError(f"--also {text}: write it as KEY=VALUE KEY=VALUE, of which one may be model=DIR")
    return found


def settings_of(items: list[str]) -> dict[str, Any]:
    """Returns {'quant.ptq.calibration_images': 64} for `--set quant.ptq.calibration_images=64`; values are YAML.

    Raises PqkError for an item without '=', an unreadable value, and a key that is given twice.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, sign, text = item.partition("=")
        name = name.strip()
        if not sign or not name:
            raise PqkError(f"--set {item}: write it as KEY=VALUE, for example quant.ptq.calibration_images=64")
        if name in found:
            raise PqkError(f"--set {name} is given twice")
        try:
            values = parse_yaml(f"value: {text}", "--set").values
        except PqkError as error:
            number = re.search(r" is .* base \d+.*", str(error))
            if number:
                raise PqkError(f"--set {item}: the value{number[0]}") from None
            raise PqkError(
                f"--set {item}: the value is not plain YAML (a number, a text, true, null, a list ...)"
            ) from None
        if list(values) != ["value"]:  # a line break, and another key behind it
            raise PqkError(f"--set {item}: give one key at a time, each with its own --set")
        found[name] = values["value"]
    return found


def run_card(
    request: Request,
    as_json: bool,
    log: Path | None = None,
    axes: Sequence[str] = (),
    rollback: bool = False,
    decide: int | None = None,
    track: Sequence[str] = (),
    preset: str | None = None,
    point: str | None = None,
    spread: Spread | None = None,
) -> int:
    """Runs a card, reports progress on stderr and prints the table; returns the exit code.

    The exit code is 1 for the verdict 'fail', 4 for 'undecided'. `axes`: run only these of a card with a matrix.
    `rollback`: let the rollback table act on a failed recipe. `decide`: add test scenes up to this number until the
    drop is decided. `track`: trackers that get the records too, as in `pqk.track.track`. `preset`: settings by name.
    `point`: run this one of the one axis. `spread`: where the points of a matrix run, None: here.
    `log`: a .json file that gets the candidate's record too, or without a recipe the list of the float records.
    Raises PqkError, before anything long runs, when that file cannot be written or holds another record.
    """
    root = paths.project_root()
    if log is not None:
        if log.suffix != ".json":
            raise PqkError(f"--log {log}: the name of a log ends in .json")
        check_writable(log.parent)
    errors = Console(stderr=True, highlight=False)
    began = time.monotonic()

    errors.print(f"[bold]{escape(request.card)}[/] on {escape(request.backend)}")
    card = load_card(request.card, root)
    trackers = {name: open_tracker(name, root) for name in track}
    if preset is not None:
        request = laid_under(request, preset, root)
    if point is not None:
        if len(axes) != 1:
            raise PqkError(f"--point {point} needs the one --axis that it is of")
        request, rollback = replace(request, point=(axes[0], point)), False
    if spread is not None and (point is not None or not card.matrix):
        one = f"--point {point}" if point is not None else f"card {card.id}"
        raise PqkError(f"--on {spread.on}: only a card with a matrix has several experiments; {one} is one")
    if point is None and (card.matrix or axes):
        if decide is not None:
            raise PqkError(f"--decide: card {card.id} is a matrix of experiments; decide single ones")
        return _run_matrix(card, request, axes, as_json, errors, began, root, trackers, spread)
    outcome = run(request, root, _progress(errors), _sayer(errors), log, rollback, decide)
    records = outcome.records
    candidate = records[-1]
    if log is not None and request.recipe:
        write_record(log, candidate)
    elif log is not None:
        write_records(log, records)
    if candidate["role"] == "teacher":
        report = write_baseline(records, root / "reports" / "baseline_report.md")
        errors.print(f"  [green]✓[/] {escape(str(paths.shown(report)))}")
    _note(candidate, root)
    console = Console(stderr=as_json)
    print_table(records, console)
    reports = []
    if outcome.parts:
        console.print()
        print_parts(outcome.parts, console)
        written = write_parts(outcome.parts, root / "reports" / "parts" / f"{card.id}-{request.backend}.csv")
        reports.append(written)
        errors.print(f"  [green]✓[/] {escape(str(paths.shown(written)))}")
    if preset is not None:
        show_expected(preset, records, root, console)
    send(trackers, records, root, _sayer(errors), reports)
    if candidate["verdict_reasons"]:
        colour = {"pass": "green", "fail": "red"}.get(candidate["verdict"] or "", "yellow")
        console.print(f"verdict: [bold {colour}]{candidate['verdict'] or 'not judged'}[/]")
        for reason in candidate["verdict_reasons"]:
            console.print(f"  {escape(reason)}", highlight=False)
    errors.print(f"{time.monotonic() - began:.0f} s in all", style="dim")
    report_after(card.id, root, errors)
    if as_json:
        print(json.dumps(candidate, allow_nan=False, ensure_ascii=False))
    return _CODES[candidate["verdict"]]


def _note(candidate: Mapping[str, Any], root: Path) -> None:
    """Reports the result to the program that started this one; why: the first threshold that decided the verdict."""
    mark = {"fail": "FAILED: ", "undecided": "undecided: "}.get(candidate["verdict"] or "")
    reasons = [text.removeprefix(mark) for text in candidate["verdict_reasons"] or () if mark and text.startswith(mark)]
    note(
        run_id=candidate["run_id"],
        status=candidate["status"],
        verdict=candidate["verdict"],
        why=reasons[0] if reasons else None,
        record=str(root / "logs" / record_filename(dict(candidate))),
    )


def _run_matrix(
    card: Card,
    request: Request,
    axes: Sequence[str],
    as_json: bool,
    errors: Console,
    began: float,
    root: Path,
    trackers: Mapping[str, Tracker],
    spread: Spread | None,
) -> int:
    """Runs every point of a matrix, and writes reports/ablation/CARD; returns 1 when a point failed to run."""
    from pqk.recipe.ablation import print_matrix, write_matrix
    from pqk.recipe.matrix import run_matrix, run_matrix_on

    folder = root / "reports" / "ablation" / card.id
    check_writable(folder)
    if spread is None:
        result = run_matrix(card, request, list(axes), root, _progress(errors), _teller(errors))
    else:
        result = run_matrix_on(card, request, list(axes), root, *spread, _teller(errors))
    print_matrix(result, Console(stderr=as_json))
    measured = [record for points in result.records.values() for record in points.values() if record is not None]
    send(trackers, measured, root, _sayer(errors))
    data = {"card": card.id, "axes": result.records} if as_json else None
    _finish(errors, began, write_matrix(result, folder), data)
    if result.failures:
        (axis, point), why = next(iter(result.failures.items()))
        note(why=f"{len(result.failures)} points failed, first {axis} {point}: {why}")
    return EXIT_CHECK_FAILED if result.failures else EXIT_OK


def _progress(errors: Console) -> OnEvent:
    """Returns a function that prints the events of the store, a line each.

    A long stage shows a bar in a terminal, else a line every 15 seconds.
    """
    bar: Progress | None = None
    spoken = 0.0

    def long_stage(share: float, text: str) -> None:
        nonlocal bar, spoken
        if errors.is_terminal:
            if bar is None:
                bar = _bar(errors)
                bar.start()
            bar.update(bar.task_ids[0], completed=share, description=text[: max(0, errors.width - 44)], refresh=True)
        elif time.monotonic() - spoken > 15:
            spoken = time.monotonic()
            errors.print(f"    {escape(f'{100 * share:5.1f} %  {text}')}", soft_wrap=True)

    def on_event(kind: str, stage: str, key: str, seconds: float) -> None:
        nonlocal bar
        if kind == "progress":
            long_stage(seconds, key)
            return
        if bar is not None and kind in ("done", "failed"):
            bar.stop()
            bar = None
        name, _, variant = stage.partition(" ")
        what = f"{_DOING.get(name, name)} {variant}".strip()
        if kind == "make":
            errors.print(f"  [dim]…[/] {what}")
        elif kind == "done":
            errors.print(f"  [green]✓[/] {what}  {seconds:.1f} s")
        elif kind == "reuse":
            errors.print(f"  [green]✓[/] {what}  [dim]kept from before ({key[:8]})[/]")
        elif kind == "damaged":
            errors.print(f"  [yellow]![/] {what}: the kept result {key[:8]} is damaged, making it again")
        elif kind == "wait":
            errors.print(f"  [dim]…[/] {what}: another process is making it")

    return on_event


def _bar(errors: Console) -> Progress:
    """Returns a bar that goes away at its end. No thread redraws it, and it leaves the standard streams as they are."""
    columns = (
        TextColumn("   {task.percentage:5.1f} %"),
        BarColumn(24),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
    )
    bar = Progress(
        *columns, console=errors, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )
    bar.add_task("", total=1.0)
    return bar


def _begin(verb: str) -> tuple[Path, Path, Console, float]:
    """Returns root, folder, console for progress and start time, for verbs with a folder under reports/."""
    root = paths.project_root()
    folder = root / "reports" / verb
    check_writable(folder)
    return root, folder, Console(stderr=True, highlight=False), time.monotonic()


def _sayer(errors: Console) -> Callable[[str], None]:
    """Returns a function that prints the sentences of a run, a warning with another mark."""

    def say(text: str) -> None:
        mark = "[yellow]![/]" if text.startswith("warning: ") else "[green]✓[/]"
        errors.print(f"  {mark} {escape(text)}")

    return say


def _teller(errors: Console) -> Callable[[str], None]:
    return lambda text: errors.print(f"  [bold]·[/] {escape(text)}")


def _finish(errors: Console, began: float, written: Iterable[Path], data: Mapping[str, Any] | None) -> None:
    """Prints the files and the time; `data` is printed as the last line of stdout."""
    for path in written:
        errors.print(f"  [green]✓[/] {escape(str(paths.shown(path)))}")
    errors.print(f"{time.monotonic() - began:.0f} s in all", style="dim")
    if data is not None:
        print(json.dumps(data, allow_nan=False, ensure_ascii=False))


def run_parity(
    request: Request, backends: list[str], quantizers: list[str] | None, explained: bool, as_json: bool
) -> int:
    """Runs `pqk parity`: prints table and verdicts, writes reports/parity/CARD.*; returns the exit code.

    1: a level differs, 4: none does, but one is undecided.
    """
    from pqk.parity.explain import explain_all
    from pqk.parity.parity import check_names, parity
    from pqk.parity.report import as_data, print_parity, write_parity
    from pqk.recipe.ranking import can_rank

    if explained:
        check_names(backends, quantizers)
        if not any(can_rank(name) for name in backends):
            raise PqkError(
                f"--explain puts nodes of quantized graphs back to float, which no backend of {', '.join(backends)} "
                "can do: add openvino, onnxruntime or trt"
            )
    root, folder, errors, began = _begin("parity")
    result = parity(request, backends, quantizers, root, _progress(errors), _teller(errors))
    if explained:
        result = replace(result, explanation=explain_all(result.candidates))
    print_parity(result, Console(stderr=as_json))
    _finish(errors, began, write_parity(result, folder), as_data(result) if as_json else None)
    found = {v.verdict for v in result.verdicts}
    return EXIT_CHECK_FAILED if "differ" in found else EXIT_UNDECIDED if "undecided" in found else EXIT_OK


def run_tune(
    request: Request, aim: str, max_drop: float, max_evaluations: int | None, out: Path | None, as_json: bool
) -> int:
    """Runs `pqk tune`: prints the table and writes reports/tune/CARD.*; returns the exit code.

    0: the drop is within the limit, 1: it is not, 4: undecided. aim: quality or speed.
    """
    from pqk.tune import placement_report, report
    from pqk.tune.placement import place
    from pqk.tune.tune_card import tune

    root, folder, errors, began = _begin("tune")
    name = load_card(request.card, root).id
    console, events, say = Console(stderr=as_json), _progress(errors), _teller(errors)
    data: dict[str, Any]
    if aim == "speed":
        quant = out or folder / f"{name}.speed.quant.yaml"
        placed = place(request, max_drop, max_evaluations or 40, quant, root, events, say)
        written, data = placement_report.write_placed(placed, folder), placement_report.as_data(placed)
        placement_report.print_placed(placed, console)
    else:
        quant = out or folder / f"{name}.quant.yaml"
        tuned = tune(request, max_drop, max_evaluations or 12, quant, root, events, say)
        written, data = report.write_tune(tuned, folder), report.as_data(tuned)
        report.print_tune(tuned, console)
    _finish(errors, began, written, data if as_json else None)
    return _CODES[data["verdict"]]


def seconds_of(text: str) -> float:
    """Returns the seconds of a time such as 90s, 30m or 2h. Raises PqkError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None:
        raise PqkError(f"--budget {text}: write it as 90s, 30m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def run_optimize(
    request: Request,
    letters: list[str] | None,
    max_drop: float,
    budget_s: float,
    out: Path | None,
    decide: int | None,
    as_json: bool,
) -> int:
    """Runs `pqk optimize`: prints the table and writes reports/optimize/MODEL.*; returns the exit code.

    0: accept, 4: undecided, 1: any other verdict.
    """
    from pqk.optimize.report import as_data, print_optimized, write_optimized
    from pqk.optimize.search import optimize

    if not math.isfinite(max_drop):
        raise PqkError(f"--max-drop {max_drop}: give a number of percent")
    root, folder, errors, began = _begin("optimize")
    progress = _progress(errors)

    def fresh(kind: str, stage: str, key: str, seconds: float) -> None:
        if kind != "reuse":  # most stages of a point are those of the one before
            progress(kind, stage, key, seconds)

    found = optimize(request, letters, max_drop, budget_s, out, decide, root, fresh, _teller(errors))
    written = write_optimized(found, folder)
    print_optimized(found, Console(stderr=as_json))
    _finish(errors, began, written, as_data(found) if as_json else None)
    return {"accept": EXIT_OK, "undecided": EXIT_UNDECIDED}.get(found.verdict, EXIT_CHECK_FAILED)


def run_profile(request: Request, rounds: int, as_json: bool) -> int:
    """Runs `pqk profile`: prints the table and writes reports/profile/CARD.*; returns the exit code."""
    from pqk.bench.profile import print_profile, profile, write_profile

    root, folder, errors, began = _begin("profile")
    found = profile(request, rounds, root, _progress(errors), _teller(errors))
    written = write_profile(found, folder)
    print_profile(found, Console(stderr=as_json))
    _finish(errors, began, written, found if as_json else None)
    return EXIT_OK


def run_predict(request: Request, as_json: bool) -> int:
    """Runs `pqk profile --predict`: prints the table and writes reports/profile/CARD.predict.json; returns 0."""
    from pqk.bench.predict_card import predict_card, print_prediction, write_prediction

    root, folder, errors, began = _begin("profile")
    found = predict_card(request, root, _progress(errors), _teller(errors))
    written = write_prediction(found, folder)
    print_prediction(found, Console(stderr=as_json))
    _finish(errors, began, [written], found if as_json else None)
    return EXIT_OK


def export_card(request: Request, precision: str | None, out: Path, rollback: bool = True) -> int:
    """Runs `pqk export`: progress on stderr, the folder on stdout; returns the exit code."""
    from pqk.export.export import export

    root = paths.project_root()
    errors = Console(stderr=True, highlight=False)
    errors.print(f"[bold]{escape(request.card)}[/] on {escape(request.backend)}, export")

    def say(text: str) -> None:
        errors.print(f"  [green]✓[/] {escape(text)}")

    found = export(request, precision, out, root, _progress(errors), say, rollback)
    print(paths.shown(found))
    return EXIT_OK


def choose_backend(asked: str | None) -> str:
    """Returns the asked backend; for None or 'auto' `trt` with a CUDA device, else `openvino`, which is printed."""
    from backends import registry

    if asked not in (None, "auto"):
        return str(asked)
    trt = registry.get("trt").availability()
    if trt.available and trt.details.get("gpu"):
        chosen, why = "trt", f"it has {trt.details['gpu']}"
    else:
        chosen, why = "openvino", "trt has no CUDA device here"
    Console(stderr=True, highlight=False).print(f"backend auto: {chosen} ({escape(why)})")
    return chosen


def make_data(split: str, count: int, views: int, size: int, seed: int, out: Path, jobs: int | None) -> None:
    """Runs `pqk data make`."""
    from pqk.data.render.generate import ScenePlan, make_scenes

    began = time.monotonic()
    errors = Console(stderr=True, highlight=False)
    plans = [ScenePlan(split, seed, index, views, size) for index in range(count)]
    folders = make_scenes(out, plans, jobs, lambda name: errors.print(f"  [green]✓[/] {name}"))
    print(f"{len(folders)} scenes, {len(folders) * views} views in {out} ({time.monotonic() - began:.1f} s)")


def make_detection(split: str, images: int, seed: int, out: Path, jobs: int | None) -> None:
    """Runs `pqk data make --kind detection`."""
    from pqk.data.detection.generate import SetPlan, make_set

    began = time.monotonic()
    errors = Console(stderr=True, highlight=False)

    def show(count: int) -> None:
        if count % 100 == 0 or count == images:
            errors.print(f"  [green]✓[/] {count} of {images} images")

    folder = make_set(out, SetPlan(split, seed, images), jobs, show)
    print(f"{images} images in {folder} ({time.monotonic() - began:.1f} s)")


def refuse_options(rule: str, given: Mapping[str, object]) -> None:
    """Raises PqkError for options that are given, but belong to another kind; `rule` says which fit."""
    for name, value in given.items():
        if value is not None:
            raise PqkError(f"{name} is given, but {rule}")
