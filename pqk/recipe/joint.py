"""Runs the joint recipe as a stage: one training, from the Teacher to a smaller network and its int8 graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends import registry
from backends.base import Graph, can_train
from pqk.engines.variant import graphs_to_json
from pqk.errors import NotBuilt, PqkError
from pqk.families.contract import SampleSet
from pqk.files import write_json
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Model
from pqk.recipe.stages import (
    LOADER_CODE,
    Context,
    Quantized,
    calibrated_note,
    keep_graphs,
    parts_code,
    read_graphs,
    tool_code,
)
from pqk.recipe.training import LEARNS, Trained, learned_from, lines_of, rules_of, train_key
from pqk.settings.quant import Ptq
from pqk.store import worker
from pqk.store.device_hours import clock

METHOD = "PQK"
_STAGE = "joint"
_CODE = ("pqk.compress.tasks.joint", *LOADER_CODE)


@dataclass(frozen=True)
class Joined:
    """Result of the joint training: the small float model with the facts of its training, and its int8 graphs.

    quantized: None when a stop-loss rule ended the training.
    """

    trained: Trained
    quantized: Quantized | None


def check_trainable(card: str, backend: str, quantizer: str, ptq: Ptq) -> None:
    """Raises NotBuilt (exit code 3) unless the quantizer can train, PqkError where only weights are quantized."""
    if not can_train(registry.get(backend).quantizers()[quantizer]):
        able = [
            f"--backend {name} --quantizer {tool}"
            for name in registry.names()
            for tool, found in registry.get(name).quantizers().items()
            if can_train(found)
        ]
        raise NotBuilt(
            f"card {card} trains a network in its quantized form, and the quantizer {quantizer!r} of backend {backend} "
            f"cannot be trained; use {' or '.join(able)}"
        )
    if ptq.bits_a > ptq.bits_w:
        raise PqkError(
            f"card {card} trains a network whose weights and activations are rounded; quant.ptq.bits_a is {ptq.bits_a}"
        )


def join(
    ctx: Context,
    experiment: Experiment,
    backend: str,
    quantizer: str,
    teacher: Model,
    graphs: Mapping[str, Graph],
    calibration: SampleSet,
    train: SampleSet | None,
) -> Joined:
    """Makes or reuses the result of the joint training, in a process of its own. graphs: those of the Teacher."""
    spec, data = experiment.joint, learned_from(experiment, train)
    tool = registry.get(backend).quantizers()[quantizer]
    parts = parts_code(experiment.family, "settings", "model", "data", "predict", *LEARNS)
    code = (*_CODE, *parts, *tool_code(backend, tool))
    rules = rules_of(experiment, METHOD, spec.train.steps_per_epoch, spec.gates.epochs / spec.train.epochs)
    asked: dict[str, Any] = {
        "backend": backend,
        "quantizer": quantizer,
        "ptq": experiment.quant.ptq.model_dump(mode="json"),
        "spec": spec.model_dump(mode="json"),
        "seed": experiment.workload.seeds.train,
    }
    inputs = {
        **asked,
        **experiment.workload.static,
        "teacher": teacher.sha256,
        "graphs": {name: graph.sha256 for name, graph in graphs.items()},
        "calibration": calibration.key,
        "train": train_key(experiment, data),
        "lines": lines_of(rules),
        "machine": dict(ctx.machine),
    }

    def make(folder: Path) -> None:
        with ctx.scratch(_STAGE, code, inputs) as scratch, clock(scratch) as running:
            request = {
                **asked,
                "teacher": teacher.path,
                **experiment.fed,
                "samples": calibration.to_json(),
                "train": data.to_json(),
                "graphs": graphs_to_json(graphs),
                "out": str(folder),
                "scratch": str(scratch),
                "rules": asdict(rules),
                "card": experiment.card.id,
            }

            def on_news(news: Mapping[str, Any]) -> None:
                running.keep()
                ctx.tell(_STAGE, news)

            result = worker.call("joint", request, on_news, ctx.processes)
            result["device_s"] = running.seconds
        del result["seconds"]
        keep_graphs(folder, result.pop("graphs"))
        write_json(folder / "trained.json", result)

    made = ctx.make(_STAGE, code, inputs, make)
    trained = Trained.read(METHOD, made, f"{teacher.name}+{METHOD}")
    if trained.failed:
        return Joined(trained, None)
    report = trained.report
    found = json.loads((made.path / "trained.json").read_text())
    notes = [
        *found["notes"],
        f"{report['undecided']} of {report['gates']} gates were neither open nor closed at the cut",
        "the float rows of this model have the same weights without rounding",
        calibrated_note(experiment.family, found),
        f"the run took at most {found['peak_bytes'] / 1e9:.1f} GB",
    ]
    return Joined(trained, Quantized(read_graphs(made.path), found["images"], "; ".join(notes)))
