"""Measures how to spend the evaluation: many scenes with few pairs, or few scenes with many, at equal cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.engines.calls import Counting, Engines, Recorder, Remembering
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.files import write_text
from pqk.measure.scores import drop_of
from pqk.recipe.candidate import Candidate
from pqk.recipe.experiment import resolve
from pqk.recipe.request import Request
from pqk.recipe.runner import run
from pqk.recipe.stages import open_split
from pqk.stats.intervals import t_quantile
from pqk.stats.latency import percentile

SEED = 700
"""Base seed of the validation scenes used here; it differs from those of every run and training."""
_COUNT = "workload.scenes.validation.count"
BASIS = (8, 6)
"""Scenes, and views per scene, whose inference time is the budget: 72 pairs of the neighbour graph with k = 4."""


@dataclass(frozen=True)
class Design:
    """One design of an evaluation: scenes of `views` views, measured on `scenes` of them.

    pairs: pairs of one scene. half: half the 95 % interval of the drop in percent, as measured. cost: inference time of
    one scene, in scenes of BASIS. affordable: number of scenes for the budget of BASIS. expected: `half` with that many
    scenes.
    """

    views: int
    scenes: int
    pairs: float
    drop: float
    half: float
    cost: float
    affordable: int
    expected: float


def bench_sampling(
    card: str, backend: str, views: Sequence[int], scenes: int, model: str | None, out: Path
) -> list[Design]:
    """Measures the drop of a card's candidate on scenes of each number of views, and how many the budget allows.

    Prints a table, with JSON as the last line, and writes `out` (.csv). Raises PqkError for fewer than two scenes or
    views, and for a metric without a drop.
    """
    if scenes < 2 or min(views) < 2:
        raise PqkError("bench sampling needs at least 2 scenes of at least 2 views")
    root = paths.project_root()
    candidate = run(Request(card, backend, model=model, qat=False), root, lambda *_: None, print)
    wanted = dict.fromkeys((BASIS[1], *views))
    found = {number: _measured(candidate, number, scenes, root) for number in wanted}
    budget = BASIS[0] * found[BASIS[1]][2]
    designs = [_design(number, scenes, *found[number], budget) for number in sorted(wanted)]
    names = list(Design.__dataclass_fields__)
    rows = [[getattr(design, name) for name in names] for design in designs]
    write_text(out, "\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n")
    print(f"{'views':>5} {'pairs':>6} {'drop %':>7} {'+-':>6} {'scenes for the budget':>22} {'+- then':>8}")
    for d in designs:
        print(f"{d.views:5d} {d.pairs:6.1f} {d.drop:7.2f} {d.half:6.2f} {d.affordable:22d} {d.expected:8.2f}")
    print(json.dumps([design.__dict__ for design in designs]))
    return designs


def _measured(candidate: Candidate, views: int, scenes: int, root: Path) -> tuple[float, float, float, float]:
    """Returns drop, half its interval, inference time of one scene (Teacher plus candidate, ms), samples of a scene."""
    asked = {f"workload.scenes.validation.{name}": value for name, value in (("views", views), ("seed", SEED))}
    card = candidate.experiment.card
    experiment = resolve(card, root, of=candidate.experiment.family, settings={**asked, _COUNT: scenes})
    found = open_split(candidate.ctx, experiment, "validation", root)
    mine, teacher = (candidate.score(candidate.variants[n], on=found) for n in (-1, 0))
    drop = drop_of(candidate.experiment.metric, mine, teacher, candidate.truthful)
    if drop is None or drop.half is None:
        raise PqkError(f"{candidate.metric} gives no drop with an interval here")
    calls = _calls(candidate, found)
    time = sum(_time(candidate.records[n], calls) for n in (-1, 0)) / scenes
    return drop.value, drop.half, time, len(mine["samples"]) / scenes


def _calls(candidate: Candidate, found: SampleSet) -> Mapping[str, int]:
    """Returns how often each graph is computed over all samples; calls that samples of a scene share count once."""
    of, workload = candidate.experiment.family, candidate.experiment.workload
    with Engines({}) as none:
        counting = Counting(Recorder((), none, candidate.variants[0].graphs))
        shared, group = Remembering(counting, 2**31), -1
        for sample in of.data_part().samples(found, workload, workload.seeds.eval):
            if sample.group != group:
                shared.forget()
                group = sample.group
            of.predict_part().predict(shared, sample, workload, 0)
    return counting.calls


def _time(record: Mapping[str, Any], calls: Mapping[str, int]) -> float:
    if record["samples"] is None:
        raise PqkError("bench sampling needs inference times, but these engines are emulated: they have none")
    return float(sum(count * percentile(record["samples"][graph], 50) for graph, count in calls.items()))


def _design(views: int, scenes: int, drop: float, half: float, time: float, pairs: float, budget: float) -> Design:
    affordable = math.floor(budget / time + 1e-9)
    expected = math.nan
    if affordable >= 2:
        tails = t_quantile(0.975, affordable - 1) / t_quantile(0.975, scenes - 1)
        expected = half * math.sqrt(scenes / affordable) * tails
    return Design(views, scenes, pairs, drop, half, BASIS[0] * time / budget, affordable, expected)
