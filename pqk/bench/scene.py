"""Times whole scenes on the same engines, every sample by itself and as pqk predicts a scene: `bench_scene`.

A scene's samples share what a family's `predict` marks with `reuse`, such as the tokens of an image. What nothing is
marked in, such as single images, is as fast either way.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import Precision
from pqk import paths
from pqk.engines.calls import Engines, Remembering, Stopwatch, compiled
from pqk.errors import CheckFailed, PqkError
from pqk.families.contract import Call, Sample
from pqk.files import write_json, write_text
from pqk.measure.noise import load_now
from pqk.measure.predict import Arrays
from pqk.recipe.candidate import Candidate, make
from pqk.recipe.request import Request
from pqk.report.style import ABOVE, MARKERS, PALETTE, blank_figure, error_bar, write_figure
from pqk.stats.latency import percentile, speedup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAME = "B1"
"""The card whose workload is fed where no card is given; nothing of its recipe is made then."""
COLUMNS = ("images", "samples", "apart_ms", "scene_ms", "ratio", "low", "high", "limit", "difference")
MOST_DIFFERENT = 1e-5
"""Largest relative difference that a float engine may show between both ways; a quantized one shows none at all."""


@dataclass
class Scene:
    """What was measured of one number of images.

    apart_ms, scene_ms: of all samples, once in each round. graph_ms: of single calls, of all rounds and both ways.
    apart_calls, scene_calls: of each graph in one round. difference: largest one of any output of any sample, relative
    to that output's largest value.
    """

    images: int
    samples: int
    apart_ms: list[float] = field(default_factory=list)
    scene_ms: list[float] = field(default_factory=list)
    graph_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    apart_calls: Counter[str] = field(default_factory=Counter)
    scene_calls: Counter[str] = field(default_factory=Counter)
    difference: float = 0.0

    def limit(self) -> float:
        """Returns how many times as fast the scene would be if it cost nothing but its calls."""
        typical = {name: percentile(times, 50) for name, times in self.graph_ms.items()}

        def cost(calls: Counter[str]) -> float:
            return sum(count * typical[name] for name, count in calls.items())

        return cost(self.apart_calls) / cost(self.scene_calls)

    def row(self) -> dict[str, Any]:
        """Returns the figures as plain JSON, `COLUMNS` first."""
        ratio = speedup(self.apart_ms, self.scene_ms)
        return {
            "images": self.images,
            "samples": self.samples,
            "apart_ms": percentile(self.apart_ms, 50),
            "scene_ms": percentile(self.scene_ms, 50),
            "ratio": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "limit": self.limit(),
            "difference": self.difference,
            "graphs": {
                name: {
                    "p50_ms": percentile(times, 50),
                    "apart_calls": self.apart_calls[name],
                    "scene_calls": self.scene_calls[name],
                }
                for name, times in self.graph_ms.items()
            },
            "apart_rounds_ms": self.apart_ms,
            "scene_rounds_ms": self.scene_ms,
        }


@dataclass(frozen=True)
class Fit:
    """How time grows over scenes of several sizes.

    apart_power, scene_power: time grows with the number of samples to this power. ms_per_image, ms_per_sample: the
    scene's time as a sum of both; None where images and samples grow alike. off_pct: its largest distance from a
    measured time, in percent; None for two rows, which any two costs meet.
    """

    apart_power: float
    scene_power: float
    ms_per_image: float | None
    ms_per_sample: float | None
    off_pct: float | None


def bench_scene(
    card: str | None,
    backend: str,
    model: str | None,
    images: Sequence[int],
    settings: Mapping[str, Any],
    rounds: int,
    out: Path,
) -> dict[str, Any]:
    """Times a scene of each of the numbers of images, and how both ways compare.

    card: its candidate is timed; None: the model in f32. Both ways take turns sample by sample, in a random order, so
    that what slows the machine down slows both; a round is the whole scene. The images are those of validation
    samples, put together out of several groups. Writes `out` (.csv), the same as .json, and with several numbers a
    figure beside it; prints the table, with JSON as the last line. Raises PqkError for equal numbers, emulated engines
    and too few images, and CheckFailed, after everything is written, when both ways do not predict the same.
    """
    if len(set(images)) != len(images):
        raise PqkError(f"bench scene needs different numbers of images, got {', '.join(map(str, images))}")
    request = Request(card or FRAME, backend, model=model, settings=settings, recipe=card is not None, qat=False)
    candidate = make(request, paths.project_root(), lambda *_: None, print).candidate
    variant = candidate.variants[-1 if card else 0]
    load = round(load_now(), 3)
    with compiled(variant) as engines:
        if engines.measured != "engine":
            raise PqkError("bench scene needs times, but these engines are emulated: they have none")
        scenes = _timed(candidate, engines, sorted(images), rounds)
    rows = [scene.row() for scene in scenes]
    fit = fit_of(rows)
    found = {
        "card": card,
        "model": candidate.teacher.name,
        "backend": backend,
        "precision": str(variant.precision),
        "rounds": rounds,
        "load_before": load,
        **candidate.experiment.workload.static,
        "rows": rows,
        "fit": None if fit is None else asdict(fit),
    }
    _write(found, fit, out)
    allowed = 0.0 if variant.precision is Precision.INT8 else MOST_DIFFERENT
    if not all(row["difference"] <= allowed for row in rows):
        worst = max(row["difference"] for row in rows)
        raise CheckFailed(f"both ways must predict the same to {allowed:g}, and differ by {worst:.2g} of the output")
    return found


def _timed(candidate: Candidate, engines: Engines, images: Sequence[int], rounds: int) -> list[Scene]:
    experiment = candidate.experiment
    of, workload = experiment.family, experiment.workload
    # what does not fit into the samples is refused before anything is timed
    fed = {count: of.data_part().timed(candidate.validation, workload, count) for count in images}
    predict = of.predict_part().predict

    def run(call: Call, sample: Sample) -> Arrays:
        return predict(call, sample, workload, 0)

    run(engines, fed[images[0]][0])  # the first run of a compiled model is slow
    random, scenes = np.random.default_rng(0), [Scene(count, len(fed[count])) for count in images]
    for number in range(rounds):
        for which in random.permutation(len(scenes)):
            one_round(run, engines, fed[scenes[which].images], scenes[which], random, first=not number)
    return scenes


def one_round(
    run: Callable[[Call, Sample], Arrays],
    engines: Engines,
    samples: Sequence[Sample],
    scene: Scene,
    random: np.random.Generator,
    first: bool,
) -> None:
    """Predicts every sample both ways and adds the times to `scene`. first: count the calls of this round."""
    watch = Stopwatch(engines)
    ways: tuple[tuple[Call, Counter[str]], ...] = (
        (watch, scene.apart_calls),
        (Remembering(watch), scene.scene_calls),
    )
    spent = [0, 0]  # nanoseconds
    for sample in samples:
        outputs: dict[int, Arrays] = {}
        for way in map(int, random.permutation(2)):
            call, calls = ways[way]
            watch.reset()
            begin = time.perf_counter_ns()
            outputs[way] = run(call, sample)
            spent[way] += time.perf_counter_ns() - begin
            for graph, times in watch.graphs.items():
                scene.graph_ms[graph].extend(times)
                if first:
                    calls[graph] += len(times)
        scene.difference = max(scene.difference, *(_apart(outputs[0][name], outputs[1][name]) for name in outputs[0]))
    scene.apart_ms.append(spent[0] / 1e6)
    scene.scene_ms.append(spent[1] / 1e6)


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the largest difference relative to the largest value of `one`; infinite where only one is a number."""
    if np.array_equal(one, other, equal_nan=True):
        return 0.0
    furthest = float(np.abs(one.astype(np.float64) - other).max() / max(float(np.abs(one).max()), 1e-30))
    return furthest if math.isfinite(furthest) else math.inf


def fit_of(rows: Sequence[Mapping[str, Any]]) -> Fit | None:
    """Returns how time grows over rows of different numbers of samples; None for a single one.

    Both fits are least squares of relative errors, as times of scenes span orders of magnitude.
    """
    images, samples, apart, scene = (
        np.array([row[name] for row in rows], float) for name in ("images", "samples", "apart_ms", "scene_ms")
    )
    if len(set(samples)) < 2:
        return None
    powers = [float(np.polyfit(np.log(samples), np.log(times), 1)[0]) for times in (apart, scene)]
    terms = np.stack([images, samples], axis=1) / scene[:, None]
    if np.linalg.matrix_rank(terms) < 2:
        return Fit(powers[0], powers[1], None, None, None)
    costs = np.linalg.lstsq(terms, np.ones(len(rows)), rcond=None)[0]
    off = 100 * float(np.abs(terms @ costs - 1).max()) if len(rows) > 2 else None
    return Fit(powers[0], powers[1], float(costs[0]), float(costs[1]), off)


def _write(found: Mapping[str, Any], fit: Fit | None, out: Path) -> None:
    """Writes the table, all numbers and, of several scenes, the figure; prints them."""
    rows = found["rows"]
    table = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
    write_text(out, "\n".join(",".join("" if cell is None else str(cell) for cell in line) for line in table) + "\n")
    write_json(out.with_suffix(".json"), found)
    _print(found, fit)
    print(paths.shown(out))
    if len(rows) > 1:
        why = write_figure(out.with_suffix(".png"), lambda: _figure(found, fit))
        print(f"no figure: {why}" if why else paths.shown(out.with_suffix(".png")))
    print(json.dumps(found))


def _print(found: Mapping[str, Any], fit: Fit | None) -> None:
    print(f"{found['model']} {found['precision']}, {found['rounds']} rounds")
    print("x: times as fast as sample by sample; its 95 % interval; the limit: what is left to compute, by its calls")
    print(
        f"{'images':>6} {'samples':>7} {'apart ms':>10} {'scene ms':>10} {'x':>6} {'95 %':>14} {'limit':>6} difference"
    )
    for row in found["rows"]:
        interval = "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        print(
            f"{row['images']:6} {row['samples']:7} {row['apart_ms']:10.1f} {row['scene_ms']:10.1f} "
            f"{row['ratio']:6.3f} {interval:>14} {row['limit']:6.3f} {row['difference']:.2g}"
        )
    last = found["rows"][-1]
    for name, graph in last["graphs"].items():
        print(
            f"{name}: {graph['p50_ms']:.2f} ms a call, of {last['images']} images {graph['apart_calls']} calls sample "
            f"by sample, {graph['scene_calls']} in the scene"
        )
    if fit is not None:
        print(
            f"time grows with the number of samples to the power {fit.apart_power:.3f} sample by sample, "
            f"{fit.scene_power:.3f} in a scene"
        )
        if fit.ms_per_image is not None:
            off = "" if fit.off_pct is None else f", at most {fit.off_pct:.1f} % from the measured times"
            print(f"a scene: {fit.ms_per_image:.1f} ms an image and {fit.ms_per_sample:.1f} ms a sample{off}")


def _figure(found: Mapping[str, Any], fit: Fit | None) -> Figure:
    rows = found["rows"]
    figure, (left, right) = blank_figure(9, 3.6, 2)
    samples, images = [row["samples"] for row in rows], [row["images"] for row in rows]
    for number, (name, label) in enumerate((("apart_ms", "sample by sample"), ("scene_ms", "as a scene"))):
        seconds = [row[name] / 1e3 for row in rows]
        left.plot(samples, seconds, color=PALETTE[number], marker=MARKERS[number], label=label)
    if fit is not None and fit.ms_per_image is not None and fit.ms_per_sample is not None:
        fitted = [(fit.ms_per_image * i + fit.ms_per_sample * s) / 1e3 for i, s in zip(images, samples, strict=True)]
        label = f"{fit.ms_per_image:.0f} ms an image + {fit.ms_per_sample:.0f} ms a sample"
        left.plot(samples, fitted, color=PALETTE[-1], linestyle=":", label=label)
    right.plot(images, [row["ratio"] for row in rows], color=PALETTE[1], marker=MARKERS[1], label="measured")
    for row in rows:
        if row["low"] is not None:
            error_bar(right, row["images"], (row["low"], row["high"]), PALETTE[1], upright=True)
    right.plot(images, [row["limit"] for row in rows], color=PALETTE[-1], linestyle=":", label="limit by calls")
    left.set_xlabel("samples of the scene")
    left.set_ylabel("time of the scene (s)")
    right.set_xlabel("images of the scene")
    right.set_ylabel("times as fast as sample by sample")
    left.set_ylim(bottom=0)
    right.set_xticks(images)
    for panel in (left, right):
        panel.legend(**ABOVE)
    return figure
