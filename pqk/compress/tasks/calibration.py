"""Records the inputs of a model's graphs while calibration samples run through its float graphs: `Recording`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Feeds, Graph
from pqk.engines.calls import Recorder, calls_of, on_reference
from pqk.families.contract import Calibration, Family, GraphUse
from pqk.measure.predictions import Predictions, Writer
from pqk.settings.workload import Workload


class Recording:
    """Calibration feeds by graph, each re-iterable and sized. A context manager that owns the files behind them.

    Every toolchain calibrates on the same feeds: those of the float graphs on ONNX Runtime. Feeds of a graph that
    depends on no other graph are computed again in every iteration. Those of all other graphs are recorded in one pass,
    so that no graph runs twice for a sample, and kept in a folder inside `folder`, so that only one of them is in
    memory.
    """

    def __init__(
        self,
        of: Family,
        workload: Workload,
        samples: Calibration,
        graphs: Mapping[str, Graph],
        folder: Path,
        ptq: Mapping[str, Any],
    ) -> None:
        self._of, self._workload, self._samples, self._graphs = of, workload, samples, graphs
        self._folder, self._ptq = folder, ptq
        self._calls = calls_of(of, workload, graphs)
        self._recorded: dict[str, Path] = {}

    def __enter__(self) -> Recording:
        self._kept = tempfile.TemporaryDirectory(prefix="pqk-feeds-", dir=self._folder)
        return self

    def __exit__(self, *exc: object) -> None:
        self._kept.cleanup()

    @property
    def count(self) -> int:
        """Returns the number of calibration samples."""
        return len(self._samples)

    def feeds(self, use: GraphUse) -> _Live | _Kept:
        """Returns the feeds of a graph, from the samples 0, every, 2 every ..."""
        count = self._calls[use.name] * -(-self.count // use.every)
        if not use.after:
            return _Live(self, use, count)
        if use.name not in self._recorded:
            uses = [one for one in self._of.settings_part().GRAPHS if one.name in self._graphs and one.after]
            self._keep([one for one in uses if one.every == use.every])
        return _Kept(self._recorded[use.name], count)

    def recorded(self, uses: Sequence[GraphUse]) -> Iterator[dict[str, list[Feeds]]]:
        """Yields, sample by sample, the feeds of all calls, as the family calibrates on them. uses: of one `every`."""
        part = self._of.predict_part()
        calibrated = getattr(part, "calibrated", None)
        names, before = [use.name for use in uses], dict.fromkeys(name for use in uses for name in use.after)
        with on_reference({name: self._graphs[name] for name in before}) as engines:
            for index in range(0, self.count, uses[0].every):
                recorder = Recorder(names, engines, self._graphs)
                part.predict(recorder, self._samples[index], self._workload, 0)
                if calibrated is None:
                    yield dict(recorder.feeds)
                else:
                    yield {
                        name: [calibrated(name, feeds, self._ptq) for feeds in found]
                        for name, found in recorder.feeds.items()
                    }

    def _keep(self, uses: Sequence[GraphUse]) -> None:
        """Writes the feeds of graphs that depend on others; what two graphs are fed alike is written once."""
        twins: dict[str, str] = {}
        numbers = itertools.count()
        with ExitStack() as stack:
            writers: dict[str, Writer] = {}
            for found in self.recorded(uses):
                if not writers:
                    twins = _twins(found)
                    for name in found:
                        self._recorded[name] = Path(self._kept.name) / twins.get(name, name)
                    for name in found.keys() - twins.keys():
                        self._recorded[name].mkdir()
                        writers[name] = stack.enter_context(Writer(self._recorded[name]))
                assert _twins(found) == twins  # which graphs share is the family's, and the same for every sample
                for name, writer in writers.items():
                    for feeds in found[name]:
                        writer.add(0, str(next(numbers)), feeds)


def _twins(found: Mapping[str, Sequence[Feeds]]) -> dict[str, str]:
    """Returns the graphs that get the very arrays of another one before them, and that one."""
    seen: dict[tuple[Any, ...], str] = {}
    twins = {}
    for name, calls in found.items():
        key = tuple(tuple((given, id(array)) for given, array in feeds.items()) for feeds in calls)
        first = seen.setdefault(key, name)
        if first != name:
            twins[name] = first
    return twins


class _Live:
    """Feeds that are computed again in every iteration."""

    def __init__(self, recording: Recording, use: GraphUse, count: int) -> None:
        self.recording, self.use, self._count = recording, use, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Feeds]:
        return (feeds for found in self.recording.recorded([self.use]) for feeds in found[self.use.name])


class _Kept:
    """Feeds that are kept on disk."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Feeds]:
        with Predictions(self._folder) as kept:
            for index in range(self._count):
                yield {name: np.array(array) for name, array in kept.arrays(index).items()}
