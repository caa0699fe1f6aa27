"""Runs stage K in its worker process, `train_distilled`: distils into a student cut from the Teacher, or into the model
of the stage before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pqk.compress.cut.student import make_student
from pqk.compress.distill import distill
from pqk.compress.train.data import opened_training
from pqk.compress.train.progress import tell_training
from pqk.compress.train.shared import is_first
from pqk.compress.train.stop_rules import stopper
from pqk.compress.train.trained import finish
from pqk.models import build_model, load_model
from pqk.settings.distill import Distill


def train_distilled(request: Mapping[str, Any]) -> dict[str, Any]:
    """Distils. Request: see `pqk.recipe.training`; `before` is None where K starts from the Teacher, and with
    `merged` the student learns with that share of its tokens merged.

    Writes out/model and returns the result of `pqk.compress.train.trained.finish`, its report empty. Raises CheckFailed
    when the card's hours are used up: the checkpoint stays, and the same run with a larger budget resumes from it.
    """
    scratch, seed = Path(request["scratch"]), request["seed"]
    teacher = load_model(request["teacher"])
    distilling = Distill.model_validate_json(json.dumps(request["spec"]))
    before, data, stop = request["before"], opened_training(request), stopper(request["rules"])
    student = load_model(before) if before else make_student(teacher, distilling, data)
    if request.get("merged"):
        config: Any = student.config
        less = data.family.reducing_part().reduced(config, student.state_dict(), "full", request["merged"])
        student = build_model(data.family.name, *less).eval()
    report = tell_training(data.family)
    fitted = distill(teacher, student, distilling, data, seed=seed, scratch=scratch, stop=stop, report=report)
    return finish(fitted, request, "K", {}) if is_first() else {}
