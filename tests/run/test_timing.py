"""Interleaved timing on small real engines: its order, when it ends, and what becomes of a disturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_toys import SIDE, toy_variant
from run_toys import scene_samples, small_experiment

from backends.reference import OnnxRuntimeEngine
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.engines.calls import Engines, Stopwatch
from pqk.measure import timing as module
from pqk.measure.noise import Clocks, disturbances
from pqk.measure.timing import time_variants, why_to_end
from pqk.recipe import stages
from pqk.recipe.stages import Context
from pqk.store.store import Store

EFFICIENCY = {"warmup": 1, "min_rounds": 12, "min_seconds": 0.0, "max_seconds": 20.0, "enough_pct": None}
Asked = Callable[..., dict[str, Any]]


def quiet() -> Iterator[Clocks]:
    """Readings of a machine on which nothing else runs."""
    wall = 0.0
    while True:
        yield Clocks(wall, busy=2 * wall, own=2 * wall)
        wall += 1.0


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a scene of three views, and three variants."""
    root = tmp_path_factory.mktemp("timing")
    (scene,) = make_scenes(root / "scenes", [ScenePlan("test", 0, 0, 3, 64)], jobs=1)
    return scene, [toy_variant(root / name, name) for name in ("one", "two", "three")]


FED = {
    "workload.input.shape": [1, 3, SIDE, SIDE],
    "workload.pair_graph": {"kind": "neighbor", "k": 2, "symmetrize": False},
}


@pytest.fixture
def asked(toys: tuple[Path, list[Any]]) -> Asked:
    def request(**efficiency: Any) -> dict[str, Any]:
        return {
            **small_experiment(FED).fed,
            "variants": [variant.to_json() for variant in toys[1]],
            "samples": scene_samples([toys[0]], views=3).to_json(),
            "efficiency": {**EFFICIENCY, **efficiency},
        }

    return request


def test_the_order_is_drawn_anew_in_each_round(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    opened: dict[int, str] = {}
    real, reset = module.compiled, Stopwatch.reset

    def heard_opening(variant: Any) -> Engines:
        engines = real(variant)
        opened[id(engines)] = variant.name
        return engines

    def heard(self: Stopwatch) -> None:
        ran.append(opened[id(self._engines)])
        reset(self)

    monkeypatch.setattr(module, "compiled", heard_opening)
    monkeypatch.setattr(Stopwatch, "reset", heard)
    found = time_variants(asked(min_rounds=40))
    names = ["one", "two", "three"]
    timed = ran[3:]  # each stopwatch begins by a reset of its own
    rounds = [timed[k : k + 3] for k in range(0, len(timed), 3)]
    assert len(rounds) == found["timing"]["rounds"] == 40
    assert all(sorted(each) == sorted(names) for each in rounds)
    # Everyone runs after everyone else; in a rotation 'two' would always run after 'one'.
    before = {pair for each in rounds for pair in pairwise(each)}
    assert before == {(a, b) for a in names for b in names if a != b}
    # The recorded seed gives the very order.
    random = np.random.default_rng(found["timing"]["order_seed"])
    assert rounds == [[names[k] for k in random.permutation(3)] for _ in range(40)]
    for samples in found["variants"].values():
        assert len(samples["sample"]) == 40
        assert {graph: len(times) for graph, times in samples["graphs"].items()} == {"encoder": 80, "decoder": 40}
        for k, whole in enumerate(samples["sample"]):  # with what lies between the graphs
            assert whole >= sum(samples["graphs"]["encoder"][2 * k : 2 * k + 2]) + samples["graphs"]["decoder"][k] > 0
        assert len(samples["group_s"]) == 2 and "device" not in samples
        assert samples["group_samples"] == 2  # neighbours of three views


@pytest.mark.parametrize(
    ("rounds", "seconds", "efficiency", "ended"),
    [
        (12, 0.0, {}, "minimum"),
        (11, 5.0, {}, None),
        (12, 1.0, {"min_seconds": 2.0}, None),  # both are least, and neither is most
        (900, 2.0, {"min_seconds": 2.0}, "minimum"),
        (4, 20.0, {}, "ceiling"),
        (2, 99.0, {}, None),
        (3, 99.0, {}, "ceiling"),
    ],
)
def test_when_a_timing_ends(rounds: int, seconds: float, efficiency: dict[str, Any], ended: str | None) -> None:
    assert why_to_end(rounds, seconds, [[1.0] * rounds] * 2, {**EFFICIENCY, **efficiency}) == ended


def test_an_interval_may_end_a_timing_early() -> None:
    steady, noisy = [1.0 + 0.0001 * (k % 7) for k in range(10)], [1.0 + 0.1 * (k % 7) for k in range(10)]
    early = {**EFFICIENCY, "min_rounds": 100, "enough_pct": 1.0}
    assert why_to_end(10, 0.1, [steady, steady], early) == "interval"
    assert why_to_end(10, 0.1, [steady, steady, noisy], early) is None  # every ratio must be known
    assert why_to_end(9, 0.1, [steady[:9], steady[:9]], early) is None
    assert why_to_end(10, 0.1, [steady], early) is None  # there is no ratio
    assert why_to_end(10, 0.1, [steady, steady], {**early, "enough_pct": None}) is None


def test_a_quick_model_is_timed_for_the_least_time(asked: Asked) -> None:
    found = time_variants(asked(min_rounds=3, min_seconds=0.1))
    assert found["timing"]["ended_by"] == "minimum" and found["timing"]["rounds"] > 30
    assert 0.3 <= found["timing"]["seconds"] < 5  # of three variants
    ceiling = time_variants(asked(min_rounds=10**6, max_seconds=0.05))
    assert ceiling["timing"]["ended_by"] == "ceiling" and ceiling["timing"]["rounds"] < 10**5


def test_times_on_the_device_are_kept(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that tells them, as one on a GPU does; a double stands for it here."""

    real = OnnxRuntimeEngine.infer

    def infer(self: OnnxRuntimeEngine, feeds: Any) -> Any:
        self.last_device_ms = 0.5 if "/two/" in str(self.graph.path) else None
        return real(self, feeds)

    monkeypatch.setattr(OnnxRuntimeEngine, "infer", infer)
    found = time_variants(asked())["variants"]
    assert found["two"]["device"] == [1.5] * 12 and len(found["two"]["sample"]) == 12  # of three calls
    assert "device" not in found["one"]


def test_a_quiet_timing_is_not_marked(asked: Asked) -> None:
    readings = quiet()
    timing = time_variants(asked(), read=lambda: next(readings))["timing"]
    assert (timing["load_before"], timing["load_during"], timing["load_after"]) == (0, 0, 0)
    assert timing["own_cores"] == 2
    assert timing["drift_pct"] is not None
    assert disturbances({**timing, "drift_pct": 0.0}, max_load=0.25, max_drift_pct=10) == []


@pytest.fixture
def burner() -> Iterator[None]:
    """A second process that uses one whole core."""
    process = subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_disturbed_timing_is_marked_and_taken_again(
    toys: tuple[Path, list[Any]], asked: Asked, tmp_path: Path, burner: None
) -> None:
    """The load that a real second process makes is in it; whether the machine is quiet afterwards is stated here."""
    scene, variants = toys
    events: list[str] = []

    def time(load: float, max_load: float = 0.25, retime: bool = False) -> dict[str, Any]:
        ctx = Context(Store(tmp_path), lambda kind, *_: events.append(kind), {}, retime)
        efficiency = {**EFFICIENCY, "min_rounds": 3, "max_load": max_load, "max_drift_pct": 1000.0}
        experiment = small_experiment({**FED, "eval.efficiency": efficiency})
        events.clear()
        return stages.timing(ctx, experiment, variants[:1], scene_samples([scene], views=3), load=lambda: load)

    first = time(load=0.0)
    assert events == ["make", "done"]
    (clause,) = first["disturbed"]
    assert clause.startswith("other processes used ") and clause.endswith("(at most 0.25)")
    assert max(first["timing"][f"load_{when}"] for when in ("before", "during", "after")) > 0.25

    def pairs(timed: dict[str, Any]) -> list[float]:
        found: list[float] = timed["variants"]["one"]["sample"]
        return found

    assert pairs(time(load=0.9)) == pairs(first) and events == ["reuse"]  # still not quiet
    calm = time(load=0.0, max_load=1000.0)  # a limit judges samples, and makes none
    assert (calm["disturbed"], pairs(calm), events) == ([], pairs(first), ["reuse"])
    again = time(load=0.1)
    assert events == ["make", "done"] and pairs(again) != pairs(first)
    (stored,) = tmp_path.glob("timing/*/timing.json")
    assert pairs(json.loads(stored.read_text())) == pairs(again)
    assert pairs(time(load=9.0, max_load=1000.0, retime=True)) != pairs(again) and events == ["make", "done"]


def test_a_drift_that_stays_is_taken_again_once(toys: tuple[Path, list[Any]], asked: Asked, tmp_path: Path) -> None:
    """Times of a machine that always drifts stay marked, and are not taken at every run."""
    scene, variants = toys
    efficiency = {**EFFICIENCY, "min_rounds": 12, "max_load": 1000.0, "max_drift_pct": 1e-9}
    experiment = small_experiment({**FED, "eval.efficiency": efficiency})
    events: list[str] = []
    for _ in range(3):
        ctx = Context(Store(tmp_path), lambda kind, *_: events.append(kind), {})
        found = stages.timing(ctx, experiment, variants[:1], scene_samples([scene], views=3), load=lambda: 0.0)
        assert [clause.startswith("times drifted by ") for clause in found["disturbed"]] == [True]
    assert events == ["make", "done", "make", "done", "reuse"]


def test_one_run_retimes_once(toys: tuple[Path, list[Any]], asked: Asked, tmp_path: Path) -> None:
    """What a run has timed itself it reuses, as the attempts of a rollback do."""
    scene, variants = toys
    efficiency = {**EFFICIENCY, "min_rounds": 3, "max_load": 1000.0, "max_drift_pct": 1000.0}
    experiment = small_experiment({**FED, "eval.efficiency": efficiency})
    events: list[str] = []
    ctx = Context(Store(tmp_path), lambda kind, *_: events.append(kind), {}, retime=True)
    for _ in range(2):
        stages.timing(ctx, experiment, variants[:1], scene_samples([scene], views=3))
    assert events == ["make", "done", "reuse"]
