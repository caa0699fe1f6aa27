"""Feeds of a model's graphs are recorded once, and what two graphs are fed alike lies on disk once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends.base import Graph, TensorInfo
from pqk.compress.tasks import calibration
from pqk.compress.tasks.calibration import Recording
from pqk.families.contract import GraphUse

USES = (
    GraphUse("first"),
    GraphUse("second", after=("first",)),
    GraphUse("left", after=("first", "second")),
    GraphUse("right", after=("first", "second")),
    GraphUse("rare", after=("first",), every=2),
)


class Reference:
    """Stands in for the float graphs: each doubles its input; counts what runs."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.engines, self.calls = dict.fromkeys(names), Counter[str]()

    def __call__(self, graph: str, feeds: Mapping[str, np.ndarray], **_: Any) -> dict[str, np.ndarray]:
        self.calls[graph] += 1
        return {"y": 2 * next(iter(feeds.values()))}


def predict(call: Any, sample: np.ndarray, workload: Any, seed: int) -> None:
    """Two images each through `first`; `left` and `right` read the same arrays."""
    one, two = (call("first", {"x": half})["y"] for half in sample)
    joined = call("second", {"t": one + two})["y"]
    call("left", {"l": joined})
    call("right", {"l": joined})
    call("rare", {"r": one})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Reference]:
    opened: list[Reference] = []

    @contextmanager
    def on_reference(graphs: Mapping[str, Any]) -> Iterator[Reference]:
        opened.append(Reference(graphs))
        yield opened[-1]

    monkeypatch.setattr(calibration, "on_reference", on_reference)
    return opened


def recording(folder: Path) -> Recording:
    samples = [np.full((2, 3), number, np.float32) for number in range(5)]
    outputs = (TensorInfo("y", (3,), "float32"),)
    graphs = {use.name: Graph(Path("none.onnx"), (), outputs, use.name) for use in USES}
    part = SimpleNamespace(predict=predict)
    family: Any = SimpleNamespace(
        settings_part=lambda: SimpleNamespace(GRAPHS=USES),
        predict_part=lambda: part,
        data_part=lambda: SimpleNamespace(example=lambda workload: samples[0]),
    )
    return Recording(family, SimpleNamespace(), samples, graphs, folder, {})  # type: ignore[arg-type]


def test_each_graph_runs_once_for_a_sample(tmp_path: Path, ran: list[Reference]) -> None:
    with recording(tmp_path) as recorded:
        found = {use.name: recorded.feeds(use) for use in USES[:4]}
        assert [len(feeds) for feeds in found.values()] == [10, 5, 5, 5]
        values = {name: [float(next(iter(one.values()))[0]) for one in feeds] for name, feeds in found.items()}
        assert values["first"] == [n for n in range(5) for _ in (0, 1)]
        assert values["second"] == [4 * n for n in range(5)]
        assert values["left"] == values["right"] == [8 * n for n in range(5)]
        assert list(next(iter(found["right"]))) == ["l"]
        run = sum((one.calls for one in ran), Counter[str]())
        assert run == {"first": 10, "second": 5}
        (folder,) = tmp_path.iterdir()
        assert sorted(one.name for one in folder.iterdir()) == ["left", "second"]  # `right` reads those of `left`
        assert [float(one["l"][0]) for one in found["left"]] == values["left"]  # iterates anew
    assert not list(tmp_path.iterdir())


def test_a_graph_that_fewer_samples_feed_has_a_pass_of_its_own(tmp_path: Path, ran: list[Reference]) -> None:
    with recording(tmp_path) as recorded:
        rare, second = recorded.feeds(USES[4]), recorded.feeds(USES[1])
        assert (len(rare), len(second)) == (3, 5)
        assert [float(one["r"][0]) for one in rare] == [0, 4, 8]
        assert [dict(one.calls) for one in ran] == [{"first": 6}, {"first": 10, "second": 5}]
