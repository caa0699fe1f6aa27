"""Quantization-aware training as a stage: both graphs are prepared by the quantizer, trained together, finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.base import Graph
from pqk.compress.qat import qat
from pqk.measure.footprint import peak_ram_bytes
from pqk.run.quantize import Both, Calibrated
from pqk.run.stoploss import best_checkpoint
from pqk.run.training import stopper, tell_progress
from pqk.run.variants import graph_to_json
from pqk.spec.quant import Qat


def train_quantized(request: Mapping[str, Any]) -> dict[str, Any]:
    """The worker's side. Request: that of `Calibrated`, and qat (the config's section), seed, rules, scratch.

    Returns what `quantize_graphs` does, and reason, steps, training_s and drop_pct as `pqk.run.training.train` does.
    Raises CheckFailed when the card's hours are spent.
    """
    job = Calibrated(dict(request), modules=True)
    prepared: Both[Any] = job.both(job.quantizer.prepare)
    prepared_notes = list(job.quantizer.notes())
    fitted = qat(
        prepared.encoder,
        prepared.decoder,
        job.model,
        Qat.model_validate(request["qat"]),
        seed=request["seed"],
        scratch=Path(request["scratch"]),
        stop=stopper(request["rules"]),
        report=tell_progress,
    )
    trained: Any = fitted.model
    made: dict[str, Graph] = {}
    for name, module in trained.graphs().items():
        made[name] = job.quantizer.finish(module, job.source(name), job.spec(name, 1))
    best = best_checkpoint(fitted.history) or {}
    return {
        **{name: graph_to_json(graph) for name, graph in made.items()},
        "images": prepared.images,
        "pairs": prepared.pairs,
        "notes": prepared_notes,
        "peak_bytes": peak_ram_bytes(),
        "reason": fitted.reason,
        "steps": fitted.steps,
        "training_s": fitted.seconds,
        "drop_pct": best.get("drop_pct"),
    }
