"""Scores samples against their ground truth or against a reference, `score`. No engine runs here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pqk.cores import allowed_cores
from pqk.errors import PqkError
from pqk.families.contract import Sample, SampleSet, ScoringPart, completed
from pqk.families.registry import family
from pqk.measure.predict import opened
from pqk.measure.predictions import Predictions

_MOST = 4  # samples that are scored at once
Arrays = Mapping[str, np.ndarray]
PLACE = ("group", "sample")
"""Keys of a row that identify its sample. The other keys are its evidence: metrics, numbers or None, and what their
`ScoringPart.complete` needs, which is neither."""


class Scorer:
    """Scorer of samples, on threads while the next ones are predicted or read; a context manager.

    request: family, name (of the variant), samples (a set as plain data), quality (the evaluation's section), seed,
    and, needed only against a reference, config (of the Teacher's model). `add` blocks while several samples wait,
    which bounds the memory, and raises the PqkError of an earlier sample, naming it.
    """

    def __init__(self, request: Mapping[str, Any], threads: int) -> None:
        self._request = request
        self._part = family(request["family"]).scoring_part()
        self._groups = SampleSet.from_json(request["samples"]).groups
        self._waiting: list[tuple[Sample, Future[dict[str, Any] | None]]] = []
        self._rows: list[dict[str, Any]] = []
        self._pool, self._most = ThreadPoolExecutor(threads, "score"), threads + 2

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, sample: Sample, arrays: Arrays, reference: Arrays | None) -> None:
        """Scores a sample against `reference`, or against its ground truth when `reference` is None."""
        self._waiting.append((sample, self._pool.submit(self._score, sample, arrays, reference)))
        while len(self._waiting) > self._most:
            self._collect()

    def result(self) -> dict[str, Any]:
        """Returns summary (every metric over all samples) and samples (a row each: group, sample, its evidence).

        A sample with too little ground truth has no row. Raises PqkError when no sample is left.
        """
        while self._waiting:
            self._collect()
        if not self._rows:
            wanted = self._part.needs(self._request["quality"])
            raise PqkError(f"there is no sample to evaluate: none of {', '.join(self._groups)} has {wanted}")
        return scored(self._part, self._rows)

    def _collect(self) -> None:
        sample, job = self._waiting.pop(0)
        try:
            scores = job.result()
        except PqkError as error:
            where = f"{self._groups[sample.group]}, {sample.name}"
            raise PqkError(f"{self._request['name']} on {where}: {error}") from error
        if scores is not None:
            self._rows.append({"group": sample.group, "sample": sample.name, **scores})

    def _score(self, sample: Sample, arrays: Arrays, reference: Arrays | None) -> dict[str, Any] | None:
        if reference is not None:
            sample = self._part.as_truth(reference, sample, self._request["config"])
        return self._part.score(arrays, sample, self._request["quality"], self._request["seed"])


def scored(part: ScoringPart, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns summary (every metric over all samples) and samples (the rows, with the metrics of the set) of a set.

    Called wherever the rows of a set are all there, and again where sets are joined.
    """
    evidence = completed(part, [{key: value for key, value in row.items() if key not in PLACE} for row in rows])
    places = [{key: row[key] for key in PLACE} for row in rows]
    samples = [{**place, **own} for place, own in zip(places, evidence, strict=True)]
    return {"summary": dict(part.summarise(evidence)), "samples": samples}


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Scores kept predictions.

    Request: that of `Scorer`, workload, predictions (folder), and reference (also a folder, or null). Returns the
    result of `Scorer.result`.
    """
    with ExitStack() as stack:
        mine = stack.enter_context(Predictions(Path(request["predictions"])))
        other = stack.enter_context(Predictions(Path(request["reference"]))) if request["reference"] else None
        if other is not None and other.samples != mine.samples:
            raise PqkError(f"the predictions of {request['name']} and of its reference are of different samples")
        scorer = stack.enter_context(Scorer(request, min(_MOST, allowed_cores())))
        for place, sample in enumerate(_samples(request, mine, other is None)):
            scorer.add(sample, mine.arrays(place), other.arrays(place) if other is not None else None)
        return scorer.result()


def _samples(request: Mapping[str, Any], mine: Predictions, truth: bool) -> Iterator[Sample]:
    """Yields the samples of predictions; they are decoded again only when their ground truth is needed."""
    if not truth:
        yield from (Sample(group, name, None) for group, name in mine.samples)
        return
    of, workload, found = opened(request)
    again = of.data_part().samples(found, workload, request["seed"])
    for (group, name), sample in zip(mine.samples, again, strict=True):
        if (sample.group, sample.name) != (group, name):
            raise PqkError(f"the samples changed while they were scored: {sample.name} where {name} was predicted")
        yield sample
