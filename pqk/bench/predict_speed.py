"""Predicts how fast a recipe will be before it is made: `Predictor`.

The float graphs of a recipe are cut into parts (`backends.base.Pieces`), and the times of all parts are added up. Each
part is timed alone, once per machine; what was timed is in the store, and recipes share most of it. Nothing is trained
and nothing is calibrated: T changes shapes without training, of K the student is cut without its training, and what Q
lowers follows from the keep-list. Which units P leaves is known only when it is done.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from backends import registry
from backends.base import Graph, Piece, Pieces, Precision, lowered_to, pieces_of, rests_of
from pqk.compress.cut.student import make_student
from pqk.compress.train.data import TrainingData
from pqk.compress.train.trained import MODEL
from pqk.engines.calls import calls_of
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.files import temporary_folder, write_json
from pqk.heap import trim
from pqk.measure.noise import load_now
from pqk.models import load_model, save_model
from pqk.recipe import stages
from pqk.recipe.experiment import Experiment
from pqk.recipe.reduce import check_reducing, keeping, reduce_model
from pqk.recipe.request import (
    Model,
    Request,
    asked_experiment,
    chosen_quantizer,
    context,
    describe,
    load_teacher,
    usable_backend,
)
from pqk.recipe.stages import ENGINE_VARIANTS, LOADER_CODE, Context, open_split, parts_code
from pqk.recipe.training import LEARNS, check_family
from pqk.settings.keep import keep_for
from pqk.settings.recipe import quantizes
from pqk.stats.latency import percentile
from pqk.store import worker
from pqk.store.code import Top
from pqk.store.store import OnEvent

ERROR_PCT = 15.0
"""A prediction is meant to lie within these percent of what is then measured."""
_BATCH = 64  # parts that one process times
_TIMES = "times.json"


class Unpredictable(PqkError):
    """Reports a recipe whose speed cannot be predicted, and why."""


@dataclass(frozen=True)
class Predicted:
    """The time of a sample in milliseconds: medians of all parts, added up, and their quartiles.

    rest: the float precision. forms: the form of each graph that is predicted to be the fastest. parts: how many
    different ones were timed.
    """

    precision: Precision
    rest: Precision
    ms: float
    low: float
    high: float
    forms: Mapping[str, str]
    parts: int

    def times(self, factor: float) -> Predicted:
        """Returns the same with all times multiplied."""
        return replace(self, ms=factor * self.ms, low=factor * self.low, high=factor * self.high)


@dataclass(frozen=True)
class Shaped:
    """A recipe's model with the shapes that it will have: its float graphs, and the experiment with its keep-list."""

    experiment: Experiment
    name: str
    graphs: Mapping[str, Graph]


class Predictor:
    """Predicts the speeds of recipes of one Teacher on one backend of this machine."""

    def __init__(self, request: Request, root: Path, on_event: OnEvent, say: Callable[[str], None]) -> None:
        """Raises Unpredictable where the backend's graphs cannot be cut, and the errors of `pqk run` for a request."""
        self.request, self.root, self._say = request, root, say
        self.backend = usable_backend(request.backend)
        tool = pieces_of(self.backend)
        if tool is None:
            raise Unpredictable(f"backend {request.backend} cannot time parts of graphs, so no speed is predicted")
        self._tool = tool
        self.ctx: Context = context(request, self.backend, root, on_event)
        self.experiment = asked_experiment(request, root)
        self.teacher, module = load_teacher(request.model, root)
        self._known: dict[str, list[float]] = {}
        self.disturbed = False  # some part was timed while others used the cores, and they still do
        self.graphs = stages.export_graphs(self.ctx, self.experiment, module, self.teacher.sha256)
        del module
        trim()

    def shaped(self, experiment: Experiment) -> Shaped:
        """Returns the graphs of a card's recipe before it is trained or quantized.

        Raises Unpredictable for P and the joint recipe, and the errors of `pqk run` for what the family cannot do.
        """
        recipe, of = experiment.card.recipe, experiment.family
        check_family(experiment, recipe)
        check_reducing(of, experiment.card.id, recipe)
        if any("P" in letter for letter in recipe):
            raise Unpredictable("which units P leaves, and so its speed, is known only when it is done")
        model = self._student(experiment) if "K" in recipe else self.teacher
        if "T" in recipe:
            model = reduce_model(self.ctx, experiment, model).model
            experiment = keeping(experiment, model)
        graphs = self.graphs
        if model is not self.teacher:
            graphs = stages.export_graphs(self.ctx, experiment, load_model(model.path), model.sha256)
        return Shaped(experiment, model.name, graphs)

    def of_shaped(self, shaped: Shaped, precision: Precision) -> Predicted:
        """Returns the prediction of a recipe's model at a precision, in this machine's milliseconds.

        It is the sum of its parts, times what the Teacher takes in its float precision over the sum of the Teacher's.
        """
        found = self._added_up(shaped, precision)
        return found.times(self.factor(found.rest))

    def speedup(self, experiment: Experiment) -> float:
        """Returns how many times as fast as the Teacher in f32 a card's recipe is predicted to be.

        That is in int8 where it quantizes, else in f32.
        """
        precision = Precision.INT8 if quantizes(experiment.card.recipe) else Precision.F32
        mine = self._added_up(self.shaped(experiment), precision)
        teacher = self._sum(self.graphs, Precision.F32, Precision.F32, ())
        if mine.rest is Precision.F32:  # the factor is the same above and below
            return teacher.ms / mine.ms
        return teacher.ms * self.factor(Precision.F32) / (mine.ms * self.factor(mine.rest))

    def factor(self, rest: Precision) -> float:
        """Returns the Teacher's measured time in a float precision over the sum of its parts: ms of a yardstick."""
        if rest not in self._measured:
            raise Unpredictable(f"the Teacher has no time in {rest} here, with which a prediction is calibrated")
        return self._measured[rest] / self._sum(self.graphs, rest, rest, ()).ms

    def _added_up(self, shaped: Shaped, precision: Precision) -> Predicted:
        experiment = shaped.experiment
        if precision is not Precision.INT8:
            return self._sum(shaped.graphs, precision, precision, ())
        asked, ptq = experiment.quant.float_rest, experiment.quant.ptq
        name = chosen_quantizer(self.backend, self.request.quantizer, ptq)
        lowered = lowered_to(self.backend.quantizers()[name], ptq.bits_w, ptq.bits_a)
        if lowered != "int8":
            raise Unpredictable(f"speeds are predicted in int8 and float, not in {lowered}")
        rest = rests_of(self.backend)[-1] if asked == "auto" else Precision(asked)
        return self._sum(shaped.graphs, precision, rest, ptq.keep_list)

    def _student(self, experiment: Experiment) -> Model:
        """Returns the student that K would train: its shapes are right, its weights are not."""
        spec, of = experiment.distill, experiment.family
        shares = spec.student.model_copy(update={"fold_pairs": 0})  # no sample is looked at
        untrained = spec.model_copy(update={"student": shares})

        def make(folder: Path) -> None:
            student = make_student(load_model(self.teacher.path), untrained, TrainingData(of))
            save_model(student, folder / MODEL)

        versions = {name: self.ctx.machine["versions"].get(name) for name in ("torch", "torch-pruning")}
        asked = {"teacher": self.teacher.sha256, "student": shares.model_dump(mode="json"), "versions": versions}
        code = (*LOADER_CODE, "pqk.compress.cut.student", *parts_code(of, "model", *LEARNS))
        made = self.ctx.make("student", code, asked, make)
        return describe(made.path / MODEL, f"{self.teacher.name}+K")

    @cached_property
    def _measured(self) -> dict[Precision, float]:
        """Returns the measured median of the Teacher in each float precision, milliseconds of a sample."""
        name = self.backend.name
        variants = [Variant(ENGINE_VARIANTS[p], name, p, self.graphs, {}) for p in self.backend.float_precisions()]
        found = open_split(self.ctx, self.experiment, "validation", self.root)
        timed = stages.timing(self.ctx, self.experiment, variants, found)["variants"]
        return {v.precision: percentile(timed[v.name]["sample"], 50) for v in variants}

    def _sum(
        self, graphs: Mapping[str, Graph], precision: Precision, rest: Precision, keep: Sequence[str]
    ) -> Predicted:
        """Returns the sum over all parts in yardsticks, each graph in its fastest form."""
        of, workload = self.experiment.family, self.experiment.workload
        calls = calls_of(of, workload, graphs)
        cut = {name: self._tool.cut(graph, precision, keep_for(keep, name)) for name, graph in graphs.items()}
        parts = {p.key: p for forms in cut.values() for form in forms.values() for _, p in form}
        self._time(list(parts.values()), rest)
        total, chosen = [0.0, 0.0, 0.0], {}
        for name, forms in cut.items():
            sums = {
                form: [sum(n * percentile(self._times(p, rest), q) for n, p in found) for q in (25, 50, 75)]
                for form, found in forms.items()
            }
            chosen[name] = min(sums, key=lambda form: sums[form][1])
            total = [t + calls[name] * ms for t, ms in zip(total, sums[chosen[name]], strict=True)]
        return Predicted(precision, rest, total[1], total[0], total[2], chosen, len(parts))

    def _times(self, part: Piece, rest: Precision) -> list[float]:
        return self._known[f"{rest} {part.key}"]

    def _time(self, parts: Sequence[Piece], rest: Precision) -> None:
        """Times the parts that are not known yet, or takes their times from the store."""
        parts = [part for part in parts if f"{rest} {part.key}" not in self._known]
        quiet = replace(self.ctx, on_event=lambda *_: None)  # a line for each would be a hundred
        table = Table(quiet, self.backend.name, self._tool, rest, parts, self._most_load)
        if table.missing:
            self._say(f"timing {len(table.missing)} parts of graphs alone in {rest}, once on this machine")
        for part in parts:
            self._known[f"{rest} {part.key}"] = table.times(part)
        self.disturbed |= table.disturbed

    @property
    def _most_load(self) -> float:
        return self.experiment.evaluation.efficiency.max_load


class Table:
    """The times of parts of graphs: an artifact each. What is missing is timed in batches, in a process of its own."""

    def __init__(
        self,
        ctx: Context,
        backend: str,
        tool: Pieces,
        rest: Precision,
        parts: Sequence[Piece],
        most_load: float,
    ) -> None:
        self._ctx, self._backend, self._rest, self._parts = ctx, backend, rest, parts
        self._tool = tool
        self._code = ("pqk.measure.pieces", Top(type(registry.get(backend)).__module__), *tool.sources)
        self._fresh: dict[str, dict[str, Any]] = {}
        self._most_load, self.disturbed = most_load, False
        self._stale = self._timed_under_load()
        absent = [part for part in parts if ctx.store.fresh or not self._folder(part).exists()]
        self.missing = [*absent, *(part for part in parts if part.key in self._stale)]

    def times(self, part: Piece) -> list[float]:
        """Returns the time of each run of a part in yardsticks (`pqk.measure.pieces`).

        One that was timed under load is timed again without it, or makes the table `disturbed`.
        """

        def make(folder: Path) -> None:
            if part.key not in self._fresh:
                self._measure(part)
            write_json(folder / _TIMES, self._fresh[part.key])

        made = self._ctx.make(
            "pieces", self._code, self._inputs(part), make, stale=lambda folder: part.key in self._stale
        )
        found: dict[str, Any] = json.loads((made.path / _TIMES).read_text())
        self.disturbed |= found["load"] > self._most_load
        return list(found["yards"])

    def _timed_under_load(self) -> set[str]:
        """Returns the keys of parts that were timed while others used more cores; none where they still do."""
        found = set()
        for part in self._parts:
            with contextlib.suppress(OSError, ValueError, KeyError):  # absent, or damaged: then it is made anyway
                if json.loads((self._folder(part) / _TIMES).read_text())["load"] > self._most_load:
                    found.add(part.key)
        return found if found and load_now() <= self._most_load else set()

    def _inputs(self, part: Piece) -> dict[str, Any]:
        machine = dict(self._ctx.machine)
        return {"backend": self._backend, "piece": part.key, "rest": str(self._rest), "machine": machine}

    def _folder(self, part: Piece) -> Path:
        return self._ctx.store.root / "pieces" / self._ctx.key("pieces", self._code, self._inputs(part))[:16]

    def _measure(self, first: Piece) -> None:
        others = [p for p in self.missing if p.key not in self._fresh and p.key != first.key]
        batch = [first, *others[: _BATCH - 1]]
        with temporary_folder("pieces") as folder:
            graphs = [str(part.write(folder / f"{place}.xml").path) for place, part in enumerate(batch)]
            yardstick = str(self._tool.yardstick(folder / "yardstick.xml").path)
            asked = {"backend": self._backend, "rest": str(self._rest), "graphs": graphs, "yardstick": yardstick}
            found = worker.call("pieces", asked)
        about = {name: found[name] for name in ("yardstick_ms", "load")}
        for part, yards in zip(batch, found["times"], strict=True):
            self._fresh[part.key] = {"words": part.words, "yards": yards, **about}
