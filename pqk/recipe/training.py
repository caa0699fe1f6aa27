"""Runs the stages P and K of a recipe: each makes a float checkpoint from the one before, in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pqk.compress.train.shared import check_processes
from pqk.compress.train.stop_rules import StopRules
from pqk.compress.train.trained import MODEL
from pqk.errors import NotBuilt, PqkError
from pqk.families.contract import SampleSet
from pqk.files import write_json
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Model, describe
from pqk.recipe.stages import LOADER_CODE, Context, Learn, device_hours, fed_key, parts_code, trained_note
from pqk.settings.recipe import STAGES
from pqk.store import worker
from pqk.store.device_hours import clock
from pqk.store.store import Artifact

TRAINS = ("P", "K", "PQK")
_TASK = {"P": "prune", "K": "distill"}
_CODE = {"P": ("pqk.compress.tasks.pruned", *LOADER_CODE), "K": ("pqk.compress.tasks.distilled", *LOADER_CODE)}
LEARNS = ("learning", "cutting")
"""Parts of a family that its training stages use."""
_TOOLS = ("torch", "torch-pruning", "numpy", "scipy", "pillow")
_STAGE = {"P": "pruned", "K": "distilled"}


@dataclass(frozen=True)
class Trained:
    """Result of a training stage: its checkpoint, and the facts for the record.

    failed: a stop-loss rule ended the stage, for `reason`; a training that only stopped improving ends with its best
    checkpoint, and `reason` says so. drop_pct: of the main metric on held-out samples, against the Teacher, of the
    checkpoint that was kept. hours: device hours of the whole stage, over all its resumed parts: for P with the scan
    and the refit, for K with the making of the student. training_hours: the part of them for steps and validations.
    """

    method: str
    model: Model
    failed: bool
    reason: str | None
    steps: int
    hours: float
    training_hours: float
    drop_pct: float | None
    waited: str | None
    report: Mapping[str, Any]

    @classmethod
    def read(cls, method: str, made: Artifact, name: str) -> Trained:
        """Reads the artifact of a training: its model, called `name`, and its trained.json."""
        found = json.loads((made.path / "trained.json").read_text())
        return cls(
            method,
            describe(made.path / MODEL, name),
            found["failed"],
            found["reason"],
            found["steps"],
            device_hours(made, found),
            found["training_s"] / 3600,
            found["drop_pct"],
            found["waited"],
            found["report"],
        )

    @property
    def note(self) -> str:
        """Returns one clause for the record's notes."""
        if self.method == "T":
            return f"T: {self.report['words']}"
        text = trained_note(self.method, self.steps, self.training_hours, self.drop_pct)
        if self.report:
            text += f", {100 * self.report['share']:.1f} % of {self.report['measure']} cut"
        text += f"; {self.method} ended early: {self.reason}" if self.reason else ""
        return text + (f"; {self.waited}" if self.waited else "")


def check_family(experiment: Experiment, recipe: Sequence[str]) -> None:
    """Raises NotBuilt (exit code 3) for a recipe that trains and a family without the parts for training."""
    of, stage = experiment.family, next((stage for stage in recipe if stage in TRAINS), None)
    lacking = [part for part in LEARNS if getattr(of, part) is None]
    if stage is not None and lacking:
        raise NotBuilt(
            f"card {experiment.card.id} asks for {STAGES[stage]} ({stage}), but the family {of.name} has "
            f"{' and '.join(f'no {part} part' for part in lacking)}"
        )


def check_sharing(experiment: Experiment, recipe: Sequence[str], processes: int) -> None:
    """Raises PqkError where so many processes cannot share the trainings of a recipe, or torchrun started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PqkError("torchrun: this command starts the processes of its trainings itself; use --processes instead")
    if processes == 1:
        return
    cards = torch.cuda.device_count()
    if torch.cuda.is_available() and cards < processes:
        raise PqkError(f"--processes {processes}: each process needs a GPU of its own, and torch sees {cards}")
    specs: dict[str, tuple[str, Any]] = {
        "P": ("prune", experiment.prune),
        "K": ("distill", experiment.distill),
        "PQK": ("joint", experiment.joint),
    }
    for stage in recipe:
        if stage in specs:
            name, spec = specs[stage]
            check_processes(experiment.family, spec.train, processes, f"{name}.train")


def train_stages(ctx: Context, experiment: Experiment, teacher: Model, train: SampleSet | None) -> list[Trained]:
    """Makes or reuses the stages P and K of the card in their order; none for a recipe without them.

    train: their training samples. Raises NotBuilt for a family that cannot be trained.

    A stage that its stop-loss rule stopped is the last one: the next stage would start from a failed model.
    """
    done: list[Trained] = []
    for method in (stage for stage in experiment.card.recipe if stage in _CODE):
        before = done[-1].model if done else None
        spent = sum(stage.hours for stage in done)
        done.append(_train(ctx, method, experiment, teacher, train, before, spent))
        if done[-1].failed:
            break
    return done


def _train(
    ctx: Context,
    method: str,
    experiment: Experiment,
    teacher: Model,
    train: SampleSet | None,
    before: Model | None,
    spent_hours: float,
) -> Trained:
    card, data = experiment.card, learned_from(experiment, train)
    spec = experiment.prune if method == "P" else experiment.distill
    devices = ctx.processes if torch.cuda.is_available() else 1
    rules = rules_of(experiment, method, spec.train.steps_per_epoch, spec.train.warmup, spent_hours, devices)
    asked: dict[str, Any] = {
        "method": method,
        "teacher": teacher.sha256,
        "before": before.sha256 if before else None,
        "spec": spec.model_dump(mode="json"),
        "seed": experiment.workload.seeds.train,
        "train": train_key(experiment, data),
        "lines": lines_of(rules),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {name: ctx.machine["versions"].get(name) for name in _TOOLS},
    }
    parts = ["settings", "model", *LEARNS]
    if method == "K" and "T" in card.recipe and experiment.reduce.tokens:
        if experiment.distill.loss.gamma:
            raise PqkError(
                f"card {card.id}: distill.loss.gamma must be 0 where the tokens of the student are merged: "
                "its features have no partners in the Teacher (reduce.tokens)"
            )
        asked["merged"] = experiment.reduce.tokens  # the student learns with its tokens merged
        parts.append("reducing")
    code = (*_CODE[method], *parts_code(experiment.family, *parts))
    label = "" if before is None else f"after {card.recipe[0]}"

    def make(folder: Path) -> None:
        with ctx.scratch(_STAGE[method], code, asked) as scratch, clock(scratch) as running:
            request = {
                **asked,
                **experiment.fed,
                "train": data.to_json(),
                "teacher": teacher.path,
                "before": before.path if before else None,
                "out": str(folder),
                "scratch": str(scratch),
                "rules": asdict(rules),
                "card": card.id,
            }

            def on_news(news: Mapping[str, Any]) -> None:
                running.keep()
                ctx.tell(f"{_STAGE[method]} {label}".strip(), news)

            result = worker.call(_TASK[method], request, on_news, ctx.processes)
            result["device_s"] = running.seconds * devices
        del result["seconds"]
        write_json(folder / "trained.json", result)

    made = ctx.make(_STAGE[method], code, asked, make, label)
    return Trained.read(method, made, f"{(before or teacher).name}+{method}")


def learned_from(experiment: Experiment, train: SampleSet | None) -> SampleSet:
    """Returns the training samples. Raises NotBuilt (exit code 3) for a family that cannot be trained."""
    experiment.family.learning_part()
    assert train is not None  # only a family without that part has none
    return train


def train_key(experiment: Experiment, train: SampleSet) -> dict[str, Any]:
    """Returns the key of the training samples; for a user's own samples with how the workload feeds them."""
    return {**train.key, **fed_key(experiment)} if train.own else train.key


def data_note(train: SampleSet | None) -> str | None:
    """Returns a clause for a record's notes, such as 'trained on 9 scenes with depth, judged on 1 others'.

    None for generated data.
    """
    if train is None or not train.own:
        return None
    alone = "" if train.truthful else "; the Teacher's outputs served as ground truth, and there was no task loss"
    return f"trained on {train.drawn}{alone}"


def rules_of(
    experiment: Experiment, method: str, steps_per_epoch: int, warmup: float, spent_hours: float = 0.0, devices: int = 1
) -> StopRules:
    """Returns the stop-loss rules of a method of the card. warmup: see `StopRules`. spent_hours: of earlier stages.

    devices: how many work at once.
    """
    card = experiment.card
    return StopRules.of(
        experiment.evaluation,
        card.budget.gpu_hours,
        method,
        card.recipe,
        steps_per_epoch=steps_per_epoch,
        spent_hours=spent_hours,
        devices=devices,
        warmup=warmup,
    )


def lines_of(rules: StopRules) -> dict[str, Any]:
    """Returns the rules that are part of a training's key; not the budget, as one that ran out leaves no artifact."""
    return {name: getattr(rules, name) for name in ("line_pct", "no_improve_ckpt", "min_improvement_pct", "max_epochs")}


def learning(experiment: Experiment, train: SampleSet | None, spent_hours: float) -> Learn:
    """Returns quantization-aware training by the card's configs. spent_hours: of everything before it."""
    spec, data = experiment.quant.qat, learned_from(experiment, train)
    rules = rules_of(experiment, "Q", spec.steps_per_epoch, spec.warmup, spent_hours)
    return Learn(
        spec.model_dump(mode="json"),
        experiment.workload.seeds.train,
        asdict(rules),
        lines_of(rules),
        data.to_json(),
        train_key(experiment, data),
        data_note(data),
    )


def method_columns(
    experiment: Experiment, trained: Sequence[Trained], hashes: Mapping[str, str], train: SampleSet | None
) -> dict[str, Any]:
    """Returns the columns on the training for the rows of the trained model. hashes: those of a Teacher's row."""
    methods = {stage.method for stage in trained}
    specs = {"prune": "P", "distill": "K", "joint": "PQK", "reduce": "T"}
    used = {name: getattr(experiment, name).sha256 for name, method in specs.items() if method in methods}
    if train is not None and train.own:
        used["train"] = train.sha256
    model = trained[-1].model
    columns: dict[str, Any] = {
        "model": model.name,
        "hashes": {**hashes, **used, "teacher": hashes["model"], "model": model.sha256},
        "gpu_hours": sum(stage.hours for stage in trained),
        "notes": "; ".join(filter(None, [*(stage.note for stage in trained), data_note(train)])),
    }
    if "P" in methods:
        columns["rho"] = experiment.prune.rho
    if "PQK" in methods:
        columns["rho"] = experiment.joint.flops_cut
    if "K" in methods:
        loss = experiment.distill.loss
        columns |= {"T": loss.temperature, "beta": loss.beta_end, "gamma": loss.gamma}
    return columns
