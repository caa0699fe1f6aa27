"""Stage Q of a recipe: the float model quantized, and trained in its quantized form where that drops too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends import registry
from backends.base import Graph, Precision, can_train
from pqk.run import stages
from pqk.run.prepare import Model
from pqk.run.stages import Context, Scenes
from pqk.run.training import learning
from pqk.run.variants import Variant
from pqk.spec.card import Experiment


@dataclass(frozen=True)
class Row:
    """A row of the results: the variant, the float variants that its speedups refer to (f32 first), its own columns.

    lowered: how a quantized variant was made, 'PTQ' or 'QAT'; hours: device hours that this took.
    """

    variant: Variant
    against: Sequence[Variant]
    own: dict[str, Any]
    lowered: str | None = None
    hours: float = 0.0


@dataclass(frozen=True)
class Lowering:
    """What is quantized and how: one float model, its graphs, a quantizer, the calibration images.

    precision: what the record calls the result. floats: the model's own float variants. columns: what its rows tell.
    options: of the engines.
    """

    experiment: Experiment
    backend: str
    quantizer: str
    precision: str
    model: Model
    graphs: Mapping[str, Graph]
    calibration: Scenes
    floats: Sequence[Variant]
    columns: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def trainable(self) -> bool:
        """Whether the quantizer offers quantization-aware training, and not of weights alone."""
        ptq = self.experiment.quant.ptq
        return can_train(registry.get(self.backend).quantizers()[self.quantizer]) and ptq.bits_a == ptq.bits_w

    def row(self, ctx: Context, trained: bool = False) -> Row:
        """The model after post-training quantization, or after quantization-aware training; made or reused."""
        ptq, shape = self.experiment.quant.ptq, self.experiment.workload.input
        made = stages.quantize(
            ctx,
            self.backend,
            self.quantizer,
            self.model.path,
            self.graphs,
            self.calibration,
            ptq.model_dump(mode="json"),
            (shape.height, shape.width),
            learning(self.experiment) if trained else None,
        )
        rest = self.experiment.quant.float_rest
        options = {**self.options} if rest == "auto" else {**self.options, "rest": rest}  # auto: the backend's best
        name = f"{self.precision} QAT" if trained else self.precision
        parts = made.graphs["encoder"], made.graphs["decoder"]
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
            "notes": "; ".join(filter(None, (self.columns.get("notes"), made.notes))),
            "hashes": {**self.columns["hashes"], "calibration": self.calibration.sha256},
        }
        variant = Variant(name, self.backend, Precision.INT8, *parts, options)
        return Row(variant, self.floats, own, "QAT" if trained else "PTQ", made.hours)
