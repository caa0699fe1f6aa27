"""Scores a network in training on held-out samples, `Judge`: by the family's metrics, and by its distance from a
Teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from pqk.errors import PqkError
from pqk.families.contract import Batches, Family, LearningPart, Metric, completed
from pqk.stats.intervals import Interval, drop_interval, mean_interval

Rows = list[list[dict[str, Any]]]
"""For each sample, the evidence of each of its predictions: its metrics."""


class Forward(nn.Module):
    """The family's forward pass over the modules of its graphs, as one module: a batch in, outputs out."""

    def __init__(self, learning: LearningPart, parts: Mapping[str, nn.Module], watched: Any = None) -> None:
        super().__init__()
        self.parts, self._learning, self._watched = nn.ModuleDict(parts), learning, watched

    def forward(self, batch: Any) -> dict[str, Any]:
        return self._learning.forward(self.parts, batch, self._watched)  # type: ignore[arg-type]


def forward_of(
    learning: LearningPart, parts: Mapping[str, nn.Module], watched: Any = None, compiled: bool = False
) -> nn.Module:
    """Returns `Forward`; compiled: under torch.compile, the whole or, where the family asks for it, each part alone."""
    if not compiled:
        return Forward(learning, parts, watched)
    if of_parts := getattr(learning, "compiled", None):
        return Forward(learning, of_parts(parts), watched)
    return torch.compile(Forward(learning, parts, watched), dynamic=False)  # type: ignore[return-value]


def parts_of(learning: LearningPart, model: nn.Module) -> Mapping[str, nn.Module]:
    """Returns the modules of the graphs of a model, which may already be given as these modules (nn.ModuleDict)."""
    return dict(model.items()) if isinstance(model, nn.ModuleDict) else learning.parts(model)


class Judge:
    """Scorer of networks on the held-out batches of a training, against the Teacher where there is one.

    nearest: the best weights are those whose outputs are nearest to the Teacher's (`LearningPart.distance`, with these
    options), instead of those with the best main metric.
    """

    def __init__(
        self,
        family: Family,
        batches: Batches,
        amp: Callable[[], AbstractContextManager[Any]],
        teacher: nn.Module | None = None,
        nearest: Mapping[str, Any] | None = None,
    ) -> None:
        """Scores the Teacher where there is ground truth. amp: returns the context in which forward passes run.

        Raises PqkError as `__call__` does, and when there is neither ground truth nor a Teacher.
        """
        self._learning, self._batches, self._amp, self._nearest = family.learning_part(), batches, amp, nearest
        self._metric: Metric = family.settings_part().METRICS[0]
        self._config: Mapping[str, Any] = {} if teacher is None else getattr(teacher, "config", {})
        self._teacher = None if teacher is None else Forward(self._learning, self._learning.parts(teacher.eval()))
        self._answers: list[dict[str, Any]] = []  # of the Teacher, where they are needed again and again
        if self._teacher is None and not batches.truthful:
            raise PqkError("without ground truth a training needs a Teacher: its outputs replace the ground truth")
        self._base: list[float] | None = None
        if self._teacher is not None and batches.truthful:
            self._base = self._samples(self._rows(self._teacher)[0])

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Scores a network: 'score' (lower is better), 'scores' of each sample, the means of the family's metrics, and
        with a Teacher 'drop_pct' of the main one with 'drop_low', the lower end of its 95 % interval over samples.

        Raises PqkError when no sample can be scored and when the main metric is not finite.
        """
        rows, distances = self._rows(Forward(self._learning, parts_of(self._learning, model.eval())))
        samples, means = self._samples(rows), self.means(rows)
        loss = self._metric.loss
        total = math.fsum(distances) / len(distances) if distances else loss(means[self._metric.name])
        found = {"score": total, "scores": distances or [loss(value) for value in samples], **means}
        drop = self._drop(samples)
        return found if drop is None else {**found, "drop_pct": drop.value, "drop_low": drop.low}

    def _drop(self, mine: list[float]) -> Interval | None:
        """Returns the drop against the Teacher. Where the Teacher's outputs are the ground truth, this is the error
        itself, for metrics of which it is a drop; None for others.
        """
        if self._base is not None:
            return drop_interval(mine, self._base, range(len(mine)), self._metric.better == "higher")
        if self._teacher is None or not self._metric.drops:
            return None
        return mean_interval([self._metric.loss_pct(value) for value in mine], range(len(mine)))

    def floor(self) -> dict[str, float]:
        """Returns the means of the family's metrics for a predictor that ignores its input, as 'constant_NAME'."""
        rows = self._completed([row for batch in self._batches.held_out() for row in self._learning.floor(batch)])
        return {f"constant_{name}": value for name, value in self.means(rows).items()}

    def _rows(self, forward: nn.Module) -> tuple[Rows, list[float]]:
        rows: Rows = []
        distances: list[float] = []
        forward.eval()
        for number, batch in enumerate(self._batches.held_out()):
            with torch.no_grad(), self._amp():
                out = forward(batch)
            answer = self._answer(number, batch)
            if answer is not None and self._nearest is not None and forward is not self._teacher:
                with torch.no_grad():
                    distances += self._learning.distance(out, answer, self._nearest)
            if answer is not None and not self._batches.truthful:
                batch = self._learning.as_truth(batch, answer, self._config)
            rows += self._learning.score(out, batch)
        return self._completed(rows), distances

    def _completed(self, rows: Rows) -> Rows:
        """Returns the rows with the metrics of the whole set; see `completed`."""
        flat = iter(completed(self._learning, [row for of_sample in rows for row in of_sample]))
        return [[next(flat) for _ in of_sample] for of_sample in rows]

    def _answer(self, number: int, batch: Any) -> dict[str, Any] | None:
        if self._teacher is None or (self._nearest is None and self._batches.truthful):
            return None
        if number == len(self._answers):
            with torch.no_grad():
                self._answers.append(self._teacher(batch))
        return self._answers[number]

    def _samples(self, rows: Rows) -> list[float]:
        """Returns the main metric of each sample that has one: the mean over its predictions."""
        each = [[row[self._metric.name] for row in of_sample] for of_sample in rows]
        known = [[value for value in values if value is not None] for values in each]
        return [math.fsum(values) / len(values) for values in known if values]

    def means(self, rows: Iterable[list[dict[str, Any]]]) -> dict[str, float]:
        """Returns the mean of each metric over all predictions. Raises PqkError as `__call__` does."""
        flat = [row for of_sample in rows for row in of_sample]
        unit, name = self._learning.UNIT, self._metric.name
        metrics = [key for key, value in flat[0].items() if isinstance(value, int | float)] if flat else []
        if name not in metrics:
            raise PqkError(f"none of the held-out {unit} has anything to score; {self._learning.REMEDY}")
        means = {metric: math.fsum(row[metric] for row in flat) / len(flat) for metric in metrics}
        if not math.isfinite(means[name]):
            raise PqkError(f"{name} of the model in training is not finite on the held-out {unit}; lower learning_rate")
        return means
