"""Makes the results of stage Q of a recipe: a float model after PTQ, or after quantization-aware training (QAT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends import registry
from backends.base import BackendError, Graph, Precision, Quantizer, can_train
from backends.quantspec import check_installed, check_settings
from pqk.engines.variant import Variant
from pqk.families.contract import SampleSet
from pqk.recipe import stages
from pqk.recipe.experiment import Experiment
from pqk.recipe.forms import formed
from pqk.recipe.request import Model
from pqk.recipe.stages import Context, Quantized
from pqk.recipe.training import learning
from pqk.settings.quant import Ptq


@dataclass(frozen=True)
class Row:
    """A row of the results: the variant, the float variants that its speedups refer to (f32 first), its own columns.

    lowered: method of a quantized variant, 'PTQ', 'QAT' or, in the joint recipe, 'PQK'. hours: its device hours.
    """

    variant: Variant
    against: Sequence[Variant]
    own: dict[str, Any]
    lowered: str | None = None
    hours: float = 0.0


@dataclass(frozen=True)
class Quantization:
    """The input of stage Q: a float model, its graphs, a quantizer, the calibration images.

    precision: of the result, as the record names it. floats: the model's own float variants. columns: shared by its
    rows. options: of the engines. made: the graphs, where the joint recipe has quantized and trained them already.
    train: the training samples.
    """

    experiment: Experiment
    backend: str
    quantizer: str
    precision: str
    model: Model
    graphs: Mapping[str, Graph]
    calibration: SampleSet
    floats: Sequence[Variant]
    columns: Mapping[str, Any]
    options: Mapping[str, Any]
    made: Quantized | None = None
    train: SampleSet | None = None

    @property
    def untrained(self) -> str:
        """Returns why quantization-aware training is impossible, for the end of a sentence; '' when it is possible.

        The text names the backend's quantizers that can train, are installed and accept the same settings.
        """
        ptq, tools = self.experiment.quant.ptq, registry.get(self.backend).quantizers()
        if ptq.bits_a > ptq.bits_w:
            return "a model with only its weights quantized cannot be trained"
        if self.experiment.family.learning is None:
            return f"models of the family {self.experiment.family.name} cannot be trained here"
        if can_train(tools[self.quantizer]):
            return ""
        able = [f"--quantizer {name}" for name, tool in tools.items() if can_train(tool) and _takes(tool, ptq)]
        return f"the quantizer {self.quantizer!r} cannot train" + (f"; {' or '.join(able)} can" if able else "")

    def row(self, ctx: Context, trained: bool = False, spent_hours: float = 0.0) -> Row:
        """Makes or reuses the model after post-training quantization, or after quantization-aware training.

        spent_hours: of the card's budget, before the training. Returns its row.
        """
        ptq = self.experiment.quant.ptq
        made = self.made or stages.quantize(
            ctx,
            self.experiment,
            self.backend,
            self.quantizer,
            self.model.path,
            self.graphs,
            self.calibration,
            learning(self.experiment, self.train, spent_hours) if trained else None,
        )
        rest = self.experiment.quant.float_rest
        options = {**self.options} if rest == "auto" else {**self.options, "rest": rest}  # auto: the backend's best
        name = f"{self.precision} QAT" if trained else self.precision
        variant, forms = formed(ctx, Variant(name, self.backend, Precision.INT8, made.graphs, options))
        own = {
            **self.columns,
            "role": "candidate",
            "precision": self.precision,
            "quantizer": self.quantizer,
            "bits_w": ptq.bits_w,
            "bits_a": ptq.bits_a,
            "keep_list": list(ptq.keep_list),
            "images_calibration": made.images,
            "gpu_hours": (self.columns.get("gpu_hours") or 0.0) + made.hours,
            "notes": "; ".join(filter(None, (self.columns.get("notes"), made.notes, *forms))),
            "hashes": {**self.columns["hashes"], "calibration": self.calibration.sha256},
        }
        lowered = "PQK" if self.made else "QAT" if trained else "PTQ"
        return Row(variant, self.floats, own, lowered, made.hours)


def _takes(tool: Quantizer, ptq: Ptq) -> bool:
    """Returns whether a quantizer is installed and accepts the settings."""
    try:
        check_settings(tool, ptq)
        check_installed(tool)
    except BackendError:
        return False
    return True
