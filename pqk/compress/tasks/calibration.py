"""Records the inputs of a model's graphs while calibration samples run through its float graphs: `Recording`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Feeds, Graph
from pqk.engines.calls import Recorder, on_reference
from pqk.families.contract import Calibration, Family, GraphUse
from pqk.measure.predictions import Predictions, Writer
from pqk.settings.workload import Workload


class Recording:
    """Calibration feeds by graph, each re-iterable and sized. A context manager that owns the files behind them.

    Every toolchain calibrates on the same feeds: those of the float graphs on ONNX Runtime. Feeds of a graph that
    depends on no other graph are computed again in every iteration. Those of the other graphs are kept in a folder
    inside `folder`, so that only one of them is in memory.
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
        live = _Live(self, use)
        return live if not use.after else _Kept(live, Path(self._kept.name) / use.name)

    def recorded(self, use: GraphUse) -> Iterator[list[Feeds]]:
        """Yields, sample by sample, the feeds of all calls, as the family calibrates on them."""
        part = self._of.predict_part()
        calibrated = getattr(part, "calibrated", None)
        with on_reference({name: self._graphs[name] for name in use.after}) as engines:
            for index in range(0, len(self._samples), use.every):
                recorder = Recorder(use.name, engines, self._graphs)
                part.predict(recorder, self._samples[index], self._workload, 0)
                found = recorder.feeds
                yield found if calibrated is None else [calibrated(use.name, feeds, self._ptq) for feeds in found]


class _Live:
    """Feeds that are computed again in every iteration."""

    def __init__(self, recording: Recording, use: GraphUse) -> None:
        self.recording, self.use = recording, use
        first = next(recording.recorded(use), [])
        self._count = len(first) * -(-recording.count // use.every)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Feeds]:
        return (feeds for found in self.recording.recorded(self.use) for feeds in found)


class _Kept:
    """Feeds that are kept on disk."""

    def __init__(self, live: _Live, folder: Path) -> None:
        folder.mkdir()
        with Writer(folder) as writer:
            for number, feeds in enumerate(live):
                writer.add(0, str(number), feeds)
        self._folder = folder
        with Predictions(folder) as kept:
            self._count = len(kept.samples)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Feeds]:
        with Predictions(self._folder) as kept:
            for index in range(self._count):
                yield {name: np.array(array) for name, array in kept.arrays(index).items()}
