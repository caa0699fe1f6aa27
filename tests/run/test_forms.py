"""The form in which a quantized graph runs: chosen by a measurement, remembered, and part of what is measured."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends import registry
from backends.base import Engine, Feeds, Graph, Kernel, Precision, TensorInfo
from pqk.engines.calls import compiled
from pqk.engines.variant import Variant
from pqk.measure.forms import FEWEST_ROUNDS, LEAST_ROUNDS, choose_forms
from pqk.recipe import forms
from pqk.recipe.stages import Context, identity
from pqk.store.store import Store

pytestmark = pytest.mark.usefixtures("forked_workers")

PORT = (TensorInfo("x", (1, 4), "float32"),)
FORM = "another order of loops"


class Slow(Engine):
    """An engine that takes as long as its options say."""

    def __init__(self, graph: Graph, seconds: float) -> None:
        self.graph, self.inputs, self.outputs, self.seconds = graph, graph.inputs, graph.outputs, seconds

    def _infer(self, feeds: Feeds) -> Feeds:
        time.sleep(self.seconds)
        return feeds

    def kernels(self) -> list[Kernel]:
        return []


class Toy:
    """A backend that knows another form of graphs whose name begins with 'b'; see `Slow`."""

    name, sources = "toy", ()

    def __init__(self, other_s: float) -> None:
        self.other_s, self.compiled = other_s, []

    def forms(self, graph: Graph) -> Mapping[str, Mapping[str, Any]]:
        return {FORM: {"seconds": self.other_s, "nodes": ["n"]}} if graph.path.name.startswith("b") else {}

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any]) -> Slow:
        self.compiled.append((graph.path.name, dict(options)))
        return Slow(graph, options["seconds"])


def variant_with(backend: Toy, monkeypatch: pytest.MonkeyPatch) -> Variant:
    monkeypatch.setattr(registry, "get", lambda name: backend)
    graphs = {name: Graph(Path(f"{name}.xml"), PORT, PORT, name * 32) for name in ("a", "b")}
    return Variant("int8", "toy", Precision.INT8, graphs, {"seconds": 0.004})


def test_the_faster_form_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Toy(0.001)
    found = choose_forms({"variant": variant_with(backend, monkeypatch).to_json()})["graphs"]
    assert found.keys() == {"b"} and json.loads(json.dumps(found)) == found
    about = found["b"]
    assert about["form"] == FORM and about["options"] == {"seconds": 0.001, "nodes": ["n"]}
    assert 1 < about["low"] <= about["speedup"] <= about["high"] and about["rounds"] >= LEAST_ROUNDS
    assert 2 < about["speedup"] < 8  # 4 by the toy's sleeps, which a loaded machine makes longer
    assert {name for name, _ in backend.compiled} == {"b.xml"}


def test_a_slow_graph_is_chosen_from_the_fewest_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqk.measure.forms.MOST_SECONDS", 0.0)
    asked = {"variant": variant_with(Toy(0.001), monkeypatch).to_json()}
    tried = [choose_forms(asked)["graphs"]["b"] for _ in range(3)]  # one late round of six spoils an interval
    assert FORM in [about["form"] for about in tried] and {about["rounds"] for about in tried} == {FEWEST_ROUNDS}
    equal = choose_forms({"variant": variant_with(Toy(0.004), monkeypatch).to_json()})["graphs"]["b"]
    assert equal["rounds"] == FEWEST_ROUNDS and None not in (equal["low"], equal["high"])


@pytest.mark.parametrize("other_s", [0.004, 0.012])
def test_a_form_that_is_not_surely_faster_is_not_taken(other_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    about = choose_forms({"variant": variant_with(Toy(other_s), monkeypatch).to_json()})["graphs"]["b"]
    if about["low"] is not None and about["low"] > 1:  # two equal sleeps that differ by chance, and little
        assert other_s == 0.004 and about["speedup"] < 1.1
    else:
        assert about["form"] is None and about["options"] == {}


def test_a_choice_is_kept_and_is_part_of_every_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = Toy(0.001)
    plain = variant_with(backend, monkeypatch)
    said: list[str] = []
    calls: list[str] = []
    ctx = Context(Store(tmp_path), lambda kind, stage, key, seconds: said.append(f"{kind} {stage}"), {"versions": {}})
    monkeypatch.setattr(forms, "sources_of", lambda variant: ())

    def call(task: str, request: dict[str, Any]) -> dict[str, Any]:
        calls.append(task)
        return json.loads(json.dumps(choose_forms(json.loads(json.dumps(request)))))

    monkeypatch.setattr(forms.worker, "call", call)
    chosen, notes = forms.formed(ctx, plain)
    again, _ = forms.formed(ctx, plain)
    assert chosen == again and calls == ["forms"] and said == ["make forms", "done forms", "reuse forms"]
    (note,) = notes
    assert note.startswith(f"b: {FORM}, ") and note.endswith(" of the plain graph")
    assert chosen.forms == {"b": {"seconds": 0.001, "nodes": ["n"]}} and chosen.graphs == plain.graphs
    assert Variant.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    assert "forms" not in plain.to_json() and "forms" not in identity(ctx, plain, None)["variant"]
    assert identity(ctx, chosen, None) != identity(ctx, plain, None)
    assert chosen.options_of("a") == plain.options and chosen.options_of("b")["seconds"] == 0.001
    backend.compiled.clear()
    with compiled(chosen):
        pass
    assert [options["seconds"] for _, options in backend.compiled] == [0.004, 0.001]


def test_without_another_form_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = variant_with(Toy(0.001), monkeypatch)
    alone = replace(plain, graphs={"a": plain.graphs["a"]})
    monkeypatch.setattr(forms.worker, "call", None)
    assert forms.formed(Context(None, None, {}), alone) == (alone, [])  # type: ignore[arg-type]
