"""Writes the results of a training into its artifact: the checkpoint with its model card, and the stop rules' verdict.

Used by the worker processes of the stages P, K and PQK; `pqk.recipe.training` reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.compress.train.loop import Progress
from pqk.compress.train.stop_rules import StopRules, best_checkpoint, untold_drop
from pqk.files import sha256_json

if TYPE_CHECKING:
    import torch

    from pqk.compress.train.fit import Fitted

MODEL = "model"
"""The folder of the checkpoint inside the artifact."""


def finish(fitted: Fitted, request: Mapping[str, Any], method: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Writes out/model of a finished training; returns failed, reason, steps, training_s, drop_pct, waited, history
    and report.

    waited: a sentence when the drop is above the stop-loss line by less than its noise, else None. request: card,
    method, seed, spec, rules (the fields of `StopRules`) and out. report: of the cut before the training.
    """
    best = best_checkpoint(fitted.history) or {}
    end = Progress(step=fitted.steps, seconds=fitted.seconds, history=fitted.history)
    at_end = StopRules(**request["rules"]).at_end(end)
    told = {
        "failed": at_end is not None,
        "reason": at_end.why if at_end else fitted.reason,
        "steps": fitted.steps,
        "training_s": fitted.seconds,
        "drop_pct": best.get("drop_pct"),
        "waited": untold_drop(fitted.history, request["rules"]["line_pct"]),
        "history": fitted.history,
        "report": dict(report),
    }
    save_trained(fitted.model, request, method, told)
    return told


def save_trained(model: torch.nn.Module, request: Mapping[str, Any], method: str, told: Mapping[str, Any]) -> None:
    """Writes out/model of a training with its model card: the request, and the results of the training (`told`)."""
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
