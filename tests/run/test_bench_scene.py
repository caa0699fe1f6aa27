"""`pqk bench scene`: both ways predict the same, what is shared runs once, and how time grows over several sizes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_toys import make_project, pqk

from pqk.bench.scene import Scene, fit_of, one_round
from pqk.engines.calls import Engines
from pqk.families.contract import Call, Sample

SYMMETRIC = ("--set", "workload.pair_graph.symmetrize=true")


def test_scenes_of_several_sizes(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    """The generated scenes have three views each: a scene of five images is put together out of two."""
    pytest.importorskip("openvino")
    root = copy_of()
    done = pqk(root, "bench", "scene", "--model", tiny_model, "--images", "5,3", "--rounds", "6", *SYMMETRIC)
    assert done.code == 0, done.err
    found = done.record
    assert (found["model"], found["precision"], found["card"]) == ("tiny", "f32", None)
    assert [(row["images"], row["samples"]) for row in found["rows"]] == [(3, 6), (5, 14)]
    for row in found["rows"]:
        assert row["difference"] <= 1e-5
        graphs, pairs = row["graphs"], row["samples"]
        assert [(graphs[name]["apart_calls"], graphs[name]["scene_calls"]) for name in ("encoder", "decoder")] == [
            (2 * pairs, row["images"]),
            (pairs, pairs),
        ]
        encoder, decoder = (graphs[name]["p50_ms"] for name in ("encoder", "decoder"))
        whole = pairs * (2 * encoder + decoder)
        assert row["limit"] == pytest.approx(whole / (row["images"] * encoder + pairs * decoder))
        assert 0 < row["low"] <= row["ratio"] <= row["high"] and row["limit"] > 1
        assert len(row["apart_rounds_ms"]) == len(row["scene_rounds_ms"]) == 6
    folder = root / "reports"
    assert json.loads((folder / "scene.json").read_text()) == found
    rows = list(csv.DictReader((folder / "scene.csv").open()))
    assert [float(row["ratio"]) for row in rows] == [row["ratio"] for row in found["rows"]]
    assert Image.open(folder / "scene.png").size[0] > 600
    assert "ms an image and" in done.out and "to the power" in done.out


def test_int8_engines_predict_the_same_bits(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    pytest.importorskip("openvino")
    root = copy_of()
    done = pqk(root, "bench", "scene", "--card", "B1", "--model", tiny_model, "--images", "4", "--rounds", "1")
    assert done.code == 0, done.err
    (row,) = done.record["rows"]
    assert (done.record["precision"], row["difference"], row["low"]) == ("int8", 0.0, None)
    assert (row["samples"], row["graphs"]["encoder"]["scene_calls"]) == (5, 4)
    assert not (root / "reports" / "scene.png").exists() and done.record["fit"] is None


def test_what_is_asked_wrongly_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("openvino")
    root = make_project(tmp_path / "project")
    words = ("bench", "scene", "--model", str(tiny_model), "--images")
    assert "give whole numbers from 1 separated by commas" in pqk(root, *words, "4,x").sentence
    assert "needs different numbers of images, got 4, 4" in pqk(root, *words, "4,4").sentence
    assert "together have 6 images, 7 were asked for: raise its count or views" in pqk(root, *words, "3,7").sentence
    assert not (root / "reports").exists()


class Adding(Engines):
    """Engines of one graph that adds 1, and from its second call on something more."""

    def __init__(self, more: float) -> None:
        super().__init__({})
        self._more, self.ran = more, 0
        self.engines = {"net": self}  # type: ignore[dict-item]
        self.last_device_ms = None

    def __call__(self, graph: str, feeds: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        self.ran += 1
        return {"out": feeds["in"] + 1 + (self._more if self.ran > 1 else 0)}


def shared(call: Call, sample: Sample) -> dict[str, np.ndarray]:
    return {"out": call("net", {"in": np.arange(3.0)}, reuse="all samples")["out"]}


def alone(call: Call, sample: Sample) -> dict[str, np.ndarray]:
    return {"out": call("net", {"in": np.arange(3.0)})["out"]}


@pytest.mark.parametrize(("run", "computed"), [(shared, 1), (alone, 4)])
def test_a_round_counts_what_is_computed(run: Callable[..., Any], computed: int) -> None:
    """Nothing is shared where a family marks nothing with `reuse`: then the limit is 1."""
    scene = Scene(4, 4)
    engines = Adding(0.0)
    for first in (True, False):
        one_round(run, engines, [Sample(0, str(k), None) for k in range(4)], scene, np.random.default_rng(0), first)
    assert (scene.apart_calls["net"], scene.scene_calls["net"]) == (4, computed)
    assert engines.ran == 2 * (4 + computed) and scene.difference == 0
    assert len(scene.apart_ms) == len(scene.scene_ms) == 2 and scene.limit() == pytest.approx(4 / computed)


@pytest.mark.parametrize(("more", "difference"), [(0.3, 0.1), (np.nan, np.inf)])
def test_a_difference_of_both_ways_is_seen(more: float, difference: float) -> None:
    scene = Scene(2, 2)
    one_round(shared, Adding(more), [Sample(0, "a", None)] * 2, scene, np.random.default_rng(0), True)
    assert scene.difference == pytest.approx(difference, rel=0.1)


def test_the_fit_finds_what_images_and_samples_cost() -> None:
    rows = [
        {"images": i, "samples": s, "apart_ms": 700.0 * s, "scene_ms": 150.0 * i + 400.0 * s}
        for i, s in ((4, 10), (8, 26), (16, 58))
    ]
    fit = fit_of(rows)
    assert fit is not None and fit.apart_power == pytest.approx(1) and 0.9 < fit.scene_power < 1
    assert (fit.ms_per_image, fit.ms_per_sample) == (pytest.approx(150), pytest.approx(400))
    assert fit.off_pct == pytest.approx(0, abs=1e-6)
    rows[1]["scene_ms"] *= 1.2
    bent = fit_of(rows)
    assert bent is not None and bent.off_pct is not None and 5 < bent.off_pct < 15
    two = fit_of(rows[:2])
    assert two is not None and two.ms_per_image is not None and two.off_pct is None
    alike = fit_of([{**row, "samples": row["images"]} for row in rows])
    assert alike is not None and alike.ms_per_image is None and alike.off_pct is None
    assert fit_of(rows[:1]) is None
