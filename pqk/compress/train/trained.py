"""Writes what a training leaves in its artifact: the checkpoint with its model card, and the result of its stop rules.

For the worker's side of the stages P, K and PQK; `pqk.recipe.training` reads it back.
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
    """Write out/model of a training that ended; returns failed, reason, steps, training_s, drop_pct, waited, history
    and report. waited: that a drop above the stop-loss line is smaller than its noise; None where it is not.

    request: card, method, seed, spec, rules (the fields of `StopRules`) and out. report: of the cut before it.
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
