"""Predictions and scores as two artifacts: what runs an engine again and what does not, and what is kept how long."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from run_toys import scene_samples, small_experiment

from backends.base import Precision
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.data.scenes.pairs import most_pairs, pair_graph
from pqk.engines.variant import Variant
from pqk.errors import PqkError
from pqk.families.contract import SampleSet
from pqk.measure.evaluate import evaluate
from pqk.measure.predict import predict
from pqk.measure.predictions import Predictions, Writer
from pqk.models import load_model
from pqk.recipe import stages
from pqk.recipe.stages import Context
from pqk.store.store import Store

pytestmark = pytest.mark.usefixtures("forked_workers")

AGAIN = ("artifact", "measured_at")
FED = {
    "workload.pair_graph": {"kind": "neighbor", "k": 4, "symmetrize": False},
    "workload.min_covisibility": 0.2,
}
BYTES = 2 * 64 * 64 * 4 * 4
"""Of a prediction: 4 float32 for each pixel of both views."""


@dataclass
class Bench:
    """Two variants of a tiny model over two scenes, a store, and what the store did ('make predictions' ...)."""

    ctx: Context
    plain: Variant
    other: Variant
    samples: SampleSet
    config: dict[str, Any]
    said: list[str] = field(default_factory=list)

    def quality(
        self, variant: Variant, reference: Variant | None = None, seed: int = 0, **quality: Any
    ) -> dict[str, Any]:
        """quality: entries of that section of eval.yaml."""
        self.said.clear()
        changed = {f"eval.quality.{name}": value for name, value in quality.items()}
        experiment = small_experiment({**FED, "workload.seeds.eval": seed, **changed})
        return stages.quality(self.ctx, experiment, variant, reference, self.samples, self.config)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[dict[str, Any], Path, list[Path]]:
    """Exported graphs of the tiny model and of one with a rounded decoder, and two scenes of three views."""
    folder = tmp_path_factory.mktemp("parts")
    ctx = Context(Store(folder / "store"), lambda *_: None, {"versions": {}})
    plain = stages.export_graphs(ctx, small_experiment(), load_model(str(tiny_model)), "a" * 64)
    decoder = onnx.load(plain["decoder"].path)
    for weight in decoder.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32:
            rounded = (1.02 * values.astype(np.float16)).astype(np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(rounded, weight.name))
    onnx.save(decoder, folder / "other.onnx")
    other = replace(plain["decoder"], path=folder / "other.onnx", sha256="d" * 64)
    graphs = {"plain": plain, "other": {**plain, "decoder": other}}
    plans = [ScenePlan("validation", 9, k, 3, 64, 4, 0.2, True) for k in range(2)]
    return graphs, folder, make_scenes(folder / "scenes", plans, jobs=1)


@pytest.fixture
def bench(
    parts: tuple[dict[str, Any], Path, list[Path]], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    graphs, _, folders = parts
    tasks = {"predictions": predict, "quality": evaluate}
    monkeypatch.setattr(stages.worker, "call", lambda task, request: tasks[task](json.loads(json.dumps(request))))
    plain, other = (Variant(name, "reference", Precision.F32, own) for name, own in graphs.items())
    samples = scene_samples(folders, "c" * 64)
    config = dict(load_model(str(tiny_model)).config)
    said: list[str] = []

    def on_event(kind: str, stage: str, key: str, seconds: float) -> None:
        said.append(f"{kind} {stage.split()[0]}")

    yield Bench(Context(Store(tmp_path / "store"), on_event, {"versions": {}}), plain, other, samples, config, said)


def test_a_changed_metric_runs_no_engine(bench: Bench) -> None:
    first = bench.quality(bench.plain)
    assert bench.said == ["make scores", "make predictions", "done predictions", "done scores"]
    assert [row["group"] for row in first["samples"]] == [name for name in first["groups"] for _ in range(3)]
    assert first.keys() >= {"summary", "measured", "size_bytes", "executed", "flops", "artifact", "measured_at"}
    assert {p.name for p in Path(first["artifact"]).iterdir()} == {"quality.json", "kernels.json", "manifest.json"}

    changes: list[tuple[str, Any]] = [("chamfer_points", 64), ("scale_alignment", "lstsq"), ("min_valid_pixels", 5)]
    for name, value in changes:
        again = bench.quality(bench.plain, **{name: value})
        assert bench.said == ["make scores", "reuse predictions", "done scores"], name
        assert {k: again[k] for k in ("executed", "flops", "size_bytes")} == {
            k: first[k] for k in ("executed", "flops", "size_bytes")
        }
    assert again["summary"] == first["summary"]
    again = bench.quality(bench.plain, main_metric="rmse", metrics=["rmse"])
    assert bench.said == ["reuse scores"] and again == first
    bench.quality(bench.plain, seed=3)  # another crop, and another sample of points
    assert bench.said[1] == "make predictions"


def test_kept_scores_need_no_predictions(bench: Bench) -> None:
    first = bench.quality(bench.plain)
    shutil.rmtree(bench.ctx.store.root / "predictions")
    assert bench.quality(bench.plain) == first and bench.said == ["reuse scores"]
    bench.quality(bench.plain, chamfer_points=64)
    assert bench.said == ["make scores", "make predictions", "done predictions", "done scores"]


@pytest.mark.parametrize("truthful", [True, False])
def test_kept_predictions_score_as_live_ones(bench: Bench, truthful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded; and what is too large to be kept is scored beside the engines."""
    reference = None if truthful else bench.plain
    kept = bench.quality(bench.other, reference)
    monkeypatch.setattr(stages, "ONE_BYTES", 5 * BYTES)
    bench.ctx.store.root = bench.ctx.store.root.parent / "another"
    live = bench.quality(bench.other, reference)
    assert bench.said == ["make scores", "done scores"]
    assert len(kept["samples"]) == 6 and not (bench.ctx.store.root / "predictions").exists()
    assert {k: v for k, v in kept.items() if k not in AGAIN} == {k: v for k, v in live.items() if k not in AGAIN}
    monkeypatch.setattr(stages, "ONE_BYTES", 6 * BYTES)
    bench.ctx.store.root = bench.ctx.store.root.parent / "third"
    bench.quality(bench.other, reference)
    assert "make predictions" in bench.said


def test_a_reference_is_predicted_once(bench: Bench) -> None:
    teacher = bench.quality(bench.plain, bench.plain)
    assert teacher["summary"]["absrel"] == 0 and teacher["summary"]["delta1"] == 1
    assert teacher["summary"]["ause"] == pytest.approx(0, abs=1e-12) and teacher["summary"]["reproj_px"] is None
    assert bench.said.count("make predictions") == 1
    assert bench.quality(bench.other, bench.plain)["summary"]["absrel"] > 0
    assert bench.said.count("make predictions") == 1 and bench.said.count("reuse predictions") == 1
    bench.quality(bench.other)
    assert bench.said.count("make predictions") == 1  # pairs are chosen by their ground truth


def test_most_pairs_are_counted() -> None:
    random = np.random.default_rng(0)
    for n in range(2, 9):
        for k in range(1, 10):
            for both in (False, True):
                for kind in ("neighbor", "complete"):
                    assert most_pairs(n, kind, k, both) == len(pair_graph(n, kind, k, both))
                similarity = random.random((n, n))
                assert most_pairs(n, "topk", k, both) >= len(pair_graph(n, "topk", k, both, similarity))


def test_kept_arrays_come_back_in_their_shapes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    samples: list[dict[str, Any]] = [
        {"pts3d_1": random.normal(size=(*a, 3)).astype(np.float32), "conf_1": random.random(a).astype(np.float32),
         "count": np.int64(7), "conf_2": random.random(b)}
        for a, b in (((4, 6), (6, 4)), ((5, 5), (3, 3)))
    ]  # fmt: skip
    with Writer(tmp_path) as writer:
        for place, arrays in enumerate(samples):
            writer.add(0, f"a, \u00e9{place}", arrays)
    assert (tmp_path / "arrays.bin").stat().st_size == 4 * 4 * (24 + 25) + 8 * 2 + 8 * (24 + 9)
    with Predictions(tmp_path) as kept:
        assert kept.samples == [(0, "a, \u00e90"), (0, "a, \u00e91")]
        for place in (1, 0):
            found = kept.arrays(place)
            assert found.keys() == samples[place].keys()
            for name, values in samples[place].items():
                assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
                np.testing.assert_array_equal(found[name], values)
    with (tmp_path / "arrays.bin").open("r+b") as file:
        file.truncate((tmp_path / "arrays.bin").stat().st_size - 1)
    with Predictions(tmp_path) as kept, pytest.raises(PqkError, match="of sample 2 are cut short"):
        kept.arrays(1)


def test_the_oldest_predictions_make_room(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def make(folder: Path) -> None:
        (folder / "x").write_bytes(b"0" * 1000)

    made = [store.get_or_make("predictions", {"k": k}, make) for k in range(4)]
    for age, artifact in zip((4000, 9000, 8000, 10), made, strict=True):
        now = artifact.path.stat().st_mtime
        os.utime(artifact.path, (now, now - age))
    size = sum(p.stat().st_size for p in made[0].path.iterdir())
    store.trim("predictions", 4 * size)
    assert all(artifact.path.is_dir() for artifact in made)
    store.trim("predictions", 2 * size)
    assert [artifact.path.is_dir() for artifact in made] == [True, False, False, True]
    store.trim("predictions", 0)  # what was used within the last hour stays
    assert [artifact.path.is_dir() for artifact in made] == [False, False, False, True]
    assert not list((tmp_path / "predictions").glob(".*"))
    assert not store.get_or_make("predictions", {"k": 1}, lambda f: (f / "x").touch()).reused
    Store(tmp_path).trim("nothing", 0)
