"""Runs stage P in its worker process, `train_pruned`: prunes a model and fine-tunes it against the Teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pqk.compress.cut.prune import prune
from pqk.compress.finetune import finetune
from pqk.compress.train.data import opened_training
from pqk.compress.train.progress import tell_training
from pqk.compress.train.shared import is_first, wait
from pqk.compress.train.stop_rules import stopper
from pqk.compress.train.trained import finish
from pqk.files import write_json
from pqk.models import load_model, save_model
from pqk.settings.prune import Prune
from pqk.store.progress import tell


def train_pruned(request: Mapping[str, Any]) -> dict[str, Any]:
    """Prunes and trains. Request: see `pqk.recipe.training`; `before` is None where P starts from the Teacher.

    Writes out/model and returns the result of `pqk.compress.train.trained.finish`. Raises CheckFailed when the card's
    hours are used up: the checkpoint stays, and the same run with a larger budget resumes from it.
    """
    scratch, seed, data = Path(request["scratch"]), request["seed"], opened_training(request)
    teacher = load_model(request["teacher"])
    start = load_model(request["before"]) if request["before"] else teacher
    pruning = Prune.model_validate_json(json.dumps(request["spec"]))
    kept = scratch / "pruned"
    if is_first() and not (kept / "report.json").exists():  # written last: without it a killed run prunes again
        small, found = prune(start, pruning, data, seed=seed, report=lambda line: tell({"text": line, "share": 0.0}))
        save_model(small, kept)
        write_json(kept / "report.json", found.as_dict())
    wait()
    cut = json.loads((kept / "report.json").read_text())
    small = load_model(kept)
    stop = stopper(request["rules"])
    report = tell_training(data.family)
    fitted = finetune(small, teacher, pruning, data, seed=seed, scratch=scratch, stop=stop, report=report)
    return finish(fitted, request, "P", cut) if is_first() else {}
