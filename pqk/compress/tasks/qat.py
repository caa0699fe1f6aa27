"""Trains a model in its quantized form (QAT): a quantizer prepares its graphs, they are trained, it finishes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.base import Feeds, Graph, QuantSpec, Source
from pqk.compress.qat import qat
from pqk.compress.tasks.quantize import Calibrated, Each
from pqk.compress.train.data import opened_training
from pqk.compress.train.progress import tell_training
from pqk.compress.train.shared import is_first
from pqk.compress.train.stop_rules import best_checkpoint, stopper, untold_drop
from pqk.engines.variant import graphs_to_json
from pqk.heap import trim
from pqk.measure.footprint import peak_ram_bytes
from pqk.settings.training import Rounded

_TRIMMED_EVERY = 8  # images


class _Trimmed:
    """Calibration feeds; after every few of them, free memory is returned to the system.

    A quantizer in torch keeps a few numbers of each image. They are allocated between the activations of one image and
    those of the next, so that glibc cannot reuse the space for large arrays. Without this, 512 images at 512 x 512 took
    from 8 to more than 23 GB for a network of 12 M parameters. With other C libraries, which have no such call,
    nothing is done.
    """

    def __init__(self, feeds: Iterable[Feeds]) -> None:
        self.feeds = feeds

    def __iter__(self) -> Iterator[Feeds]:
        for index, feeds in enumerate(self.feeds):
            if index % _TRIMMED_EVERY == 0:
                trim()
            yield feeds


def prepare(job: Calibrated) -> Each[Any]:
    """Returns the modules as the quantizer prepares them for training, calibrated in a bounded amount of memory."""

    def prepared(source: Source, spec: QuantSpec, feeds: Iterable[Feeds]) -> Any:
        return job.quantizer.prepare(source, spec, _Trimmed(feeds))

    return job.each(prepared)


def finished(job: Calibrated, parts: Any) -> dict[str, Graph]:
    """Returns the graphs that the quantizer makes of the trained modules (an nn.ModuleDict)."""
    job.family.learning_part().as_exported(parts, job.workload)
    return {name: job.quantizer.finish(module, job.source(name), job.spec(name, 1)) for name, module in parts.items()}


def train_quantized(request: Mapping[str, Any]) -> dict[str, Any]:
    """Trains in quantized form, as a task of a worker process.

    Request: that of `Calibrated`, and train, qat (the config's section), seed, rules, scratch. Returns the result of
    `quantize_graphs`, and reason, steps, training_s and drop_pct as `pqk.compress.train.trained.finish` does. Raises
    CheckFailed when the card's hours are used up.
    """
    job = Calibrated(dict(request), modules=True)
    teacher: Any = job.model
    prepared = prepare(job)
    told, data = job.calibrated(prepared), opened_training(request)
    fitted = qat(
        prepared.made,
        teacher,
        Rounded.model_validate(request["qat"]),
        data,
        seed=request["seed"],
        scratch=Path(request["scratch"]),
        stop=stopper(request["rules"]),
        report=tell_training(data.family),
    )
    if not is_first():
        return {}
    made = finished(job, fitted.model)
    best = best_checkpoint(fitted.history) or {}
    return {
        **told,
        "graphs": graphs_to_json(made),
        "peak_bytes": peak_ram_bytes(),
        "reason": fitted.reason,
        "steps": fitted.steps,
        "training_s": fitted.seconds,
        "drop_pct": best.get("drop_pct"),
        "waited": untold_drop(fitted.history, request["rules"]["line_pct"]),
    }
