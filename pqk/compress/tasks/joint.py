"""Runs the joint recipe in its worker process, `train_joint`: training with gates, cut, training of the cut network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backends import exchange
from pqk.compress.joint import GatePlan, Names, Whole, close_gates, cut_gates, float_weights, names_in, settle
from pqk.compress.tasks.qat import finished, prepare
from pqk.compress.tasks.quantize import Calibrated, Each
from pqk.compress.train.data import opened_training
from pqk.compress.train.fit import Fitted
from pqk.compress.train.loop import Progress
from pqk.compress.train.progress import tell_training
from pqk.compress.train.shared import is_first, wait
from pqk.compress.train.stop_rules import StopRules, best_checkpoint, stopper, untold_drop
from pqk.compress.train.trained import save_trained
from pqk.engines.variant import graphs_to_json
from pqk.files import write_json
from pqk.measure.footprint import peak_ram_bytes
from pqk.measure.predict import opened_workload
from pqk.models import build_model, load_model, save_model
from pqk.settings.joint import Joint
from pqk.store.progress import tell


def train_joint(request: Mapping[str, Any]) -> dict[str, Any]:
    """Runs both phases, as a task of a worker process. Request: see `pqk.recipe.joint.join`.

    Writes out/model, the float network with the trained weights, and the finished graphs.
    Returns failed, reason, steps, training_s, drop_pct, history and report as `pqk.compress.train.trained.finish` does,
    and graphs (none when a stop rule ended the run as failed), images, feeds, notes and peak_bytes as `quantize_graphs`
    does. Raises CheckFailed when the card's hours are used up.
    """
    spec = Joint.model_validate_json(json.dumps(request["spec"]))
    scratch, rules = Path(request["scratch"]), request["rules"]
    teacher = load_model(request["teacher"])
    cut = scratch / "cut"
    if not (cut / "report.json").exists():  # written last: without it a killed run resumes phase 1
        _gates(request, spec, teacher, cut)
    wait()
    about = json.loads((cut / "report.json").read_text())
    small = load_model(cut)
    told: dict[str, Any] = {
        "failed": about["reason"] is not None,
        "reason": about["reason"],
        "steps": about["steps"],
        "training_s": about["seconds"],
        "drop_pct": None,
        "waited": None,
        "history": [],
        "report": about["report"],
        "gates_history": about["history"],
        "graphs": {},
    }
    if not told["failed"]:
        told, small = _settled(request, spec, teacher, small, told, StopRules(**rules))
    if not is_first():
        return {}
    facts = {name: value for name, value in told.items() if name != "graphs"}
    save_trained(small, request, "PQK", facts)
    return told


def _gates(request: Mapping[str, Any], spec: Joint, teacher: Any, cut: Path) -> None:
    """Runs phase 1: writes the cut network into the folder `cut`, and report.json last."""
    scratch, seed = Path(request["scratch"]), request["seed"]
    tell({"text": "importance of heads and MLP units", "share": 0.0})
    kept = scratch / "importance.pt"
    data = opened_training(request)
    if is_first() and not kept.exists():
        part = kept.with_suffix(".tmp")
        torch.save(GatePlan(teacher, spec, data, seed=seed).importance, part)
        part.replace(kept)
    wait()
    plan = GatePlan(teacher, spec, data, seed=seed, importance=torch.load(kept, weights_only=True))
    tell({"text": "ranges of the network with gates", "share": 0.0})
    ptq = request["ptq"]
    few = {**ptq, "calibration_images": min(ptq["calibration_images"], spec.gates.calibration_images)}
    prepared, job = _prepared({**request, "ptq": few, "model": request["teacher"]})
    phase = Whole(spec, gates=True)
    tell_phase = tell_training(data.family)
    fitted, gated, weights = close_gates(
        prepared.made,
        _names(job),
        plan,
        teacher,
        data,
        scratch=scratch / "gates",
        stop=_whole_stop(phase, request["rules"]),
        report=lambda p: tell_phase(phase(p)),
    )
    if not is_first():
        return
    tell({"text": "cutting the units with shut gates", "share": spec.gates.epochs / spec.train.epochs})
    small, report = cut_gates(teacher, weights, plan, gated)
    save_model(small, cut)
    write_json(
        cut / "report.json",
        {
            "reason": fitted.reason,
            "steps": fitted.steps,
            "seconds": fitted.seconds,
            "history": fitted.history,
            "report": report.as_dict(),
        },
    )


def _settled(
    request: Mapping[str, Any], spec: Joint, teacher: Any, small: Any, told: dict[str, Any], rules: StopRules
) -> tuple[dict[str, Any], Any]:
    """Runs phase 2: returns `told` with its results and the finished graphs, and the trained float network."""
    phase = Whole(spec, gates=False, seconds=told["training_s"])
    tell({"text": "ranges of the cut network", "share": spec.gates.epochs / spec.train.epochs})
    with tempfile.TemporaryDirectory(prefix=".graphs-", dir=request["scratch"]) as folder:
        of, workload = opened_workload(request)
        graphs = {
            name: exchange.export(
                graph.module, graph.inputs, graph.output_names, Path(folder) / f"{name}.onnx", more=graph.more
            )
            for name, graph in of.model_part().graphs(small, workload).items()
        }
        own = {"graphs": graphs_to_json(graphs)}
        prepared, job = _prepared({**request, **own, "model": str(Path(request["scratch"]) / "cut")})
        calibrated, data = job.calibrated(prepared), opened_training(request)
        tell_phase = tell_training(data.family)
        fitted = settle(
            prepared.made,
            teacher,
            spec,
            data,
            seed=request["seed"],
            scratch=Path(request["scratch"]) / "settle",
            stop=_whole_stop(phase, request["rules"]),
            report=lambda p: tell_phase(phase(p)),
        )
        if not is_first():
            return told, small
        end = phase(_progress(fitted))
        at_end = rules.at_end(end)
        best = best_checkpoint(end.history) or {}
        told = {
            **told,
            "failed": at_end is not None,
            "reason": at_end.why if at_end else fitted.reason,
            "steps": end.step,
            "training_s": end.seconds,
            "drop_pct": best.get("drop_pct"),
            "waited": untold_drop(end.history, rules.line_pct),
            "history": end.history,
        }
        trained: Any = fitted.model
        small = build_model(small.family, small.config, float_weights(trained, _names(job), small))
        if not told["failed"]:
            made = finished(job, trained)
            told |= {**calibrated, "graphs": graphs_to_json(made), "peak_bytes": peak_ram_bytes()}
    return told, small


def _prepared(request: dict[str, Any]) -> tuple[Each[Any], Calibrated]:
    """Returns the modules of request['model'] as the quantizer prepares them, and the job that can finish them."""
    job = Calibrated(request, modules=True)
    return prepare(job), job


def _names(job: Calibrated) -> Names:
    """Returns what the weights of the graphs' modules are called in their network."""
    assert job.model is not None  # they were asked for as modules
    return names_in(job.model, {name: graph.module for name, graph in job.modules.items()})


def _whole_stop(phase: Whole, rules: Mapping[str, Any]) -> Any:
    judge = stopper(rules)
    return lambda progress: judge(phase(progress))


def _progress(fitted: Fitted) -> Progress:
    return Progress(step=fitted.steps, seconds=fitted.seconds, history=fitted.history)
