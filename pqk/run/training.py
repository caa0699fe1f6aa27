"""The stages P and K of a recipe: each makes a float checkpoint out of the one before it, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pqk.compress.fit import Stop
from pqk.compress.train import Progress
from pqk.errors import CheckFailed
from pqk.files import sha256_json, write_json
from pqk.run import worker
from pqk.run.clock import clock
from pqk.run.prepare import Model, describe
from pqk.run.stages import Context, Learn, device_hours, trained_note
from pqk.run.stoploss import StopRules, best_checkpoint
from pqk.run.store import Artifact
from pqk.spec.card import Experiment

MODEL = "model"  # the folder of the checkpoint inside the artifact
TRAINS = ("P", "K", "PQK")
_CODE = {"P": ("pqk.compress.prune",), "K": ("pqk.compress.distill",)}
_STAGE = {"P": "pruned", "K": "distilled"}


@dataclass(frozen=True)
class Trained:
    """What a stage left: its checkpoint, and what the record tells of it.

    failed: a stop-loss rule gave the stage up, for `reason`; a training that merely stopped improving ends with its
    best checkpoint, and `reason` says so. drop_pct: of AbsRel on the held-out pairs, against the Teacher, of the
    checkpoint that was kept. hours: device hours of all that made it, over all its resumed parts: for P the scan and
    the refit too, for K the making of the student; of them training_hours went into steps and validations.
    """

    method: str
    model: Model
    failed: bool
    reason: str | None
    steps: int
    hours: float
    training_hours: float
    drop_pct: float | None
    report: Mapping[str, Any]

    @classmethod
    def read(cls, method: str, made: Artifact, name: str) -> Trained:
        """What the artifact of a training holds: its model, called `name`, and its trained.json."""
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
            found["report"],
        )

    @property
    def note(self) -> str:
        """One clause for the record's notes."""
        told = trained_note(self.method, self.steps, self.training_hours, self.drop_pct)
        if self.report:
            told += f", {100 * self.report['share']:.1f} % of {self.report['measure']} cut"
        return told + (f"; {self.method} ended early: {self.reason}" if self.reason else "")


def train_stages(ctx: Context, experiment: Experiment, teacher: Model) -> list[Trained]:
    """The stages P and K of the card in their order, made or reused; empty for a recipe without them.

    A stage that its stop-loss rule stopped is the last one: what follows would stand on a lost model.
    """
    done: list[Trained] = []
    for method in (stage for stage in experiment.card.recipe if stage in _CODE):
        before = done[-1].model if done else None
        spent = sum(stage.hours for stage in done)
        done.append(_train(ctx, method, experiment, teacher, before, spent))
        if done[-1].failed:
            break
    return done


def _train(
    ctx: Context, method: str, experiment: Experiment, teacher: Model, before: Model | None, spent_hours: float
) -> Trained:
    card = experiment.card
    spec = experiment.prune if method == "P" else experiment.distill
    rules = rules_of(experiment, method, spec.train.steps_per_epoch, spec.train.warmup, spent_hours)
    asked = {
        "method": method,
        "teacher": teacher.sha256,
        "before": before.sha256 if before else None,
        "spec": spec.model_dump(mode="json"),
        "seed": experiment.workload.seeds.train,
        "lines": lines_of(rules),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    label = "" if before is None else f"after {card.recipe[0]}"

    def make(folder: Path) -> None:
        with ctx.scratch(_STAGE[method], _CODE[method], asked) as scratch, clock(scratch) as running:
            request = {
                **asked,
                "teacher": teacher.path,
                "before": before.path if before else None,
                "out": str(folder),
                "scratch": str(scratch),
                "rules": asdict(rules),
                "card": card.id,
            }

            def told(news: Mapping[str, Any]) -> None:
                running.keep()
                ctx.tell(f"{_STAGE[method]} {label}".strip(), news)

            result = worker.call("train", request, told)
            result["device_s"] = running.seconds
        del result["seconds"]
        write_json(folder / "trained.json", result)

    made = ctx.make(_STAGE[method], _CODE[method], asked, make, label)
    return Trained.read(method, made, f"{(before or teacher).name}+{method}")


def rules_of(
    experiment: Experiment, method: str, steps_per_epoch: int, warmup: float, spent_hours: float = 0.0
) -> StopRules:
    """The stop-loss of a method of the card; `warmup`: see `StopRules`. spent_hours: by the stages before it."""
    card = experiment.card
    return StopRules.of(
        experiment.evaluation,
        card.budget.gpu_hours,
        method,
        card.recipe,
        steps_per_epoch=steps_per_epoch,
        spent_hours=spent_hours,
        warmup=warmup,
    )


def lines_of(rules: StopRules) -> dict[str, Any]:
    """The rules that are part of what a training makes: a budget that ran out leaves no artifact."""
    return {name: getattr(rules, name) for name in ("line_pct", "no_improve_ckpt", "min_improvement_pct", "max_epochs")}


def learning(experiment: Experiment, spent_hours: float) -> Learn:
    """Quantization-aware training as the card's configs ask for it. spent_hours: by everything before it."""
    spec = experiment.quant.qat
    rules = rules_of(experiment, "Q", spec.steps_per_epoch, spec.warmup_epochs / spec.epochs, spent_hours)
    return Learn(spec.model_dump(mode="json"), experiment.workload.seeds.train, asdict(rules), lines_of(rules))


def method_columns(experiment: Experiment, trained: Sequence[Trained], hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the rows of the trained model tell of how it was made. `hashes`: those of a Teacher's row."""
    methods = {stage.method for stage in trained}
    specs = {"prune": "P", "distill": "K", "joint": "PQK"}
    used = {name: getattr(experiment, name).sha256 for name, method in specs.items() if method in methods}
    model = trained[-1].model
    columns: dict[str, Any] = {
        "model": model.name,
        "hashes": {**hashes, **used, "teacher": hashes["model"], "model": model.sha256},
        "gpu_hours": sum(stage.hours for stage in trained),
        "notes": "; ".join(stage.note for stage in trained),
    }
    if "P" in methods:
        columns["rho"] = experiment.prune.rho
    if "PQK" in methods:
        columns["rho"] = experiment.joint.flops_cut
    if "K" in methods:
        loss = experiment.distill.loss
        columns |= {"T": loss.temperature, "beta": loss.beta_end, "gamma": loss.gamma}
    return columns


def train(request: Mapping[str, Any]) -> dict[str, Any]:
    """The worker's side. Request: see `_train`; `before` is None where the method starts from the Teacher.

    Writes out/model and returns failed, reason, steps, training_s, drop_pct, history and report. Raises CheckFailed
    when the card's hours are spent: the checkpoint stays, and the same run with a larger budget goes on from there.
    """
    from pqk.compress.distill import distill, make_student
    from pqk.compress.prune import finetune, prune
    from pqk.models import load_model, save_model
    from pqk.spec.distill import Distill
    from pqk.spec.prune import Prune

    scratch, seed = Path(request["scratch"]), request["seed"]
    teacher = load_model(request["teacher"])
    start = load_model(request["before"]) if request["before"] else teacher
    rules, stop = StopRules(**request["rules"]), stopper(request["rules"])
    report: dict[str, Any] = {}
    text = json.dumps(request["spec"])
    if request["method"] == "P":
        pruning = Prune.model_validate_json(text)
        kept = scratch / "pruned"
        if not (kept / "report.json").exists():  # written last: a killed run prunes anew
            small, found = prune(
                start, pruning, seed=seed, report=lambda line: worker.tell({"text": line, "share": 0.0})
            )
            save_model(small, kept)
            write_json(kept / "report.json", found.as_dict())
        report = json.loads((kept / "report.json").read_text())
        small = load_model(kept)
        fitted = finetune(small, teacher, pruning, seed=seed, scratch=scratch, stop=stop, report=tell_progress)
    else:
        distilling = Distill.model_validate_json(text)
        student = start if request["before"] else make_student(teacher, distilling.student)
        fitted = distill(teacher, student, distilling, seed=seed, scratch=scratch, stop=stop, report=tell_progress)
    best = best_checkpoint(fitted.history) or {}
    at_end = rules.at_end(Progress(step=fitted.steps, seconds=fitted.seconds, history=fitted.history))
    told = {
        "failed": at_end is not None,
        "reason": at_end.why if at_end else fitted.reason,
        "steps": fitted.steps,
        "training_s": fitted.seconds,
        "drop_pct": best.get("drop_pct"),
        "history": fitted.history,
        "report": report,
    }
    save_trained(fitted.model, request, request["method"], told)
    return told


def save_trained(model: torch.nn.Module, request: Mapping[str, Any], method: str, told: Mapping[str, Any]) -> None:
    """Write out/model of a training with its model card: what was asked, and what the training tells of itself."""
    from pqk.models import save_model

    card = {
        "card": request["card"],
        "method": method,
        "seed": request["seed"],
        "spec": request["spec"],
        "spec_sha256": sha256_json(request["spec"]),
        **told,
    }
    save_model(model, Path(request["out"]) / MODEL, card=card)


def stopper(rules: Mapping[str, Any]) -> Stop:
    """What a training asks after every step. Raises CheckFailed there when the card's hours are spent."""
    lines = StopRules(**rules)

    def stop(progress: Progress) -> str | None:
        found = lines.judge(progress)
        if found is not None and found.kind == "over_budget":
            raise CheckFailed(f"stop-loss: {found.why}; its checkpoint is kept, a larger budget goes on from there")
        return found.why if found else None

    return stop


def tell_progress(p: Progress) -> None:
    """Progress of a training to the parent: step, loss, rate, time left, and the last validation."""
    left = f", {p.seconds * (1 - p.share) / p.share / 60:.1f} min left" if p.share else ""
    text = f"step {p.step}, loss {p.loss:.3f}, {p.samples_per_second:.1f} pairs/s{left}"
    if p.history:
        last = p.history[-1]
        text += f", AbsRel {last['absrel']:.4f}"
        if "drop_pct" in last:
            text += f" (drop {last['drop_pct']:+.1f} %)"
    worker.tell({"text": text, "share": p.share})
