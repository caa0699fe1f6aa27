"""Sides on the same pairs: which numbers belong to which side, and what is in memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from run_toys import scene_samples, small_experiment

from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.errors import PqkError
from pqk.measure import output_difference as agreement


class Scaled:
    """A side whose points lie `factor` as far away as the pixels of the second image are bright."""

    opened: ClassVar[list[float]] = []
    alive = 0

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __enter__(self) -> Scaled:
        Scaled.opened.append(self.factor)
        Scaled.alive += 1
        assert Scaled.alive == 1, "two sides were open at once"
        return self

    def __exit__(self, *exc: object) -> None:
        Scaled.alive -= 1

    def __call__(self, graph: str, feeds: Mapping[str, np.ndarray], **how: object) -> dict[str, np.ndarray]:
        if graph == "encoder":
            return {"tokens": feeds["image"] + 2}
        points = self.factor * feeds["tokens_2"].transpose(0, 2, 3, 1)
        return {"pts3d_1": points, "pts3d_2": points, "conf_1": points[..., 0], "conf_2": points[..., 1]}


@pytest.fixture
def request_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def open_scaled(side: Mapping[str, Any], *_: object) -> Scaled:
        return Scaled(side["factor"])

    monkeypatch.setattr(agreement, "open_side", open_scaled)
    Scaled.opened = []
    folders = make_scenes(tmp_path, [ScenePlan("test", 0, index, 3, 64) for index in range(2)], jobs=1)
    graph = {"kind": "complete", "k": 4, "symmetrize": True}
    return {
        **small_experiment({"workload.pair_graph": graph, "workload.min_covisibility": 0.0}).fed,
        "base": {"factor": 1.0},
        "others": [{"factor": 1.25}, {"factor": 1.0}, {"factor": 0.5}],
        "samples": scene_samples(folders, views=3).to_json(),
        "count": 4,
    }


def test_every_side_runs_once_and_keeps_its_own_numbers(request_of: dict[str, Any]) -> None:
    found = agreement.compare(request_of)
    assert [heads["pts3d_1"]["relative"] for heads in found["heads"]] == pytest.approx([0.25, 0.0, 0.5])
    assert Scaled.opened == [1.0, 1.25, 1.0, 0.5]
    assert len({tuple(sample) for sample in found["samples"]}) == 4
    assert len({group for group, _ in found["samples"]}) == 2, "pairs are spread over the scenes"


def test_no_more_pairs_than_there_are(request_of: dict[str, Any]) -> None:
    assert len(agreement.compare({**request_of, "count": 99})["samples"]) == 12


def test_without_a_scene_there_is_nothing_to_compare(request_of: dict[str, Any]) -> None:
    with pytest.raises(PqkError, match="no sample to compare"):
        agreement.compare({**request_of, "samples": scene_samples([]).to_json()})
    assert Scaled.opened == []
