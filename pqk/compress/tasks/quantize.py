"""Quantizes the graphs of a model after training (PTQ), each calibrated on its inputs in the float model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from backends import registry
from backends.base import BackendError, Feeds, Graph, QuantSpec, Source
from backends.quantspec import NothingLeft
from pqk.compress.tasks.calibration import Recording
from pqk.engines.variant import graphs_from_json, graphs_to_json
from pqk.errors import PqkError, nearest
from pqk.families.checkpoint import load_model
from pqk.measure.footprint import peak_ram_bytes
from pqk.measure.predict import opened
from pqk.settings.keep import hint, keep_for

Made = TypeVar("Made")


@dataclass(frozen=True)
class Each(Generic[Made]):
    """Results by graph, the number of calibration images, and the number of feeds of each graph."""

    made: dict[str, Made]
    images: int
    feeds: dict[str, int]


class Calibrated:
    """The graphs of a model with everything a quantizer needs to lower them: sources, specs and calibration feeds.

    Request: family, workload, samples (of the calibration split), backend, quantizer, model (where modules are loaded
    from), graphs, ptq (the config's section), out. Raises PqkError for an unknown quantizer and a calibration set
    that is too small.
    """

    def __init__(self, request: dict[str, Any], modules: bool = False) -> None:
        backend = registry.get(request["backend"])
        quantizers = backend.quantizers()
        if request["quantizer"] not in quantizers:
            raise PqkError(
                f"backend {backend.name} has no quantizer {request['quantizer']!r}"
                f"{nearest(request['quantizer'], quantizers)}; it has {', '.join(quantizers) or 'none'}"
            )
        self.quantizer: Any = quantizers[request["quantizer"]]
        self.ptq, self.out = request["ptq"], Path(request["out"])
        # Quantizing only weights needs no data: one sample is enough for shapes and names.
        self.weights_only = self.ptq["bits_a"] > self.ptq["bits_w"]
        wanted = 2 if self.weights_only else self.ptq["calibration_images"]
        self.family, self.workload, found = opened(request)
        self.samples = self.family.data_part().calibration(found, self.workload, wanted)
        self.graphs = graphs_from_json(request["graphs"])
        needed = modules or self.quantizer.starts_from == "module"
        self.model = load_model(request["model"]) if needed else None
        self.modules = self.family.model_part().graphs(self.model, self.workload) if self.model is not None else {}
        self._notes: dict[str, list[str]] = {}

    def source(self, name: str) -> Source:
        """Returns the graph of that name and, where they are needed, its module and example inputs."""
        graph, module = self.graphs[name], self.modules.get(name)
        return Source(
            name,
            module.module if module else None,
            module.inputs if module else {},
            tuple(t.name for t in graph.outputs),
            graph,
        )

    def spec(self, name: str, samples: int) -> QuantSpec:
        """Returns the settings for lowering the graph of that name."""
        ptq = self.ptq
        return QuantSpec(
            bits_w=ptq["bits_w"],
            bits_a=ptq["bits_a"],
            weights=ptq["weights"],
            activations=ptq["activations"],
            symmetric_activations=ptq["symmetric_activations"],
            smooth_quant_alpha=ptq["smooth_quant_alpha"],
            bias_correction=ptq["bias_correction"],
            weight_range=ptq["weight_range"],
            keep=tuple(keep_for(ptq["keep_list"], name)),
            calibration_samples=samples,
            output_dir=self.out,
        )

    def each(self, lower: Callable[[Source, QuantSpec, Iterable[Feeds]], Made]) -> Each[Made]:
        """Returns the result of `lower` for each graph.

        A BackendError names the graph when an item of its calibration set is at fault, and has a hint when an entry of
        the keep-list is.
        """
        made: dict[str, Made] = {}
        feeds: dict[str, int] = {}
        with Recording(self.family, self.workload, self.samples, self.graphs, self.out, self.ptq) as recording:
            for use in self.family.settings_part().GRAPHS:
                if use.name not in self.graphs:
                    continue
                calibration = recording.feeds(use)
                feeds[use.name] = len(calibration)
                made[use.name] = self._lowered(lower, use.name, len(calibration), calibration)
        return Each(made, self.samples.images, feeds)

    def _lowered(self, lower: Any, name: str, samples: int, calibration: Iterable[Feeds]) -> Any:
        try:
            made = lower(self.source(name), self.spec(name, samples), calibration)
            whole = isinstance(made, Graph) and made.left_float
            self._notes[name] = ["nothing of it is quantized"] if whole else list(self.quantizer.notes())
            return made
        except BackendError as error:
            more = hint(self.ptq["keep_list"], name, list(self.graphs), str(error))
            if not more and not str(error).startswith("calibration item"):
                raise
            raise type(error)(f"{name}: {error}{more}") from error

    def calibrated(self, made: Each[Any]) -> dict[str, Any]:
        """Returns the results for the parent process: images and feeds by graph (none when only weights are lowered),
        notes, and peak memory in bytes.
        """
        return {
            "images": 0 if self.weights_only else made.images,
            "feeds": {} if self.weights_only else made.feeds,
            "notes": self.notes(),
            "peak_bytes": peak_ram_bytes(),
        }

    def notes(self) -> list[str]:
        """Returns the quantizer's notes on the graphs that it lowered; see `merge_notes`."""
        return merge_notes(self._notes)


def merge_notes(of_graphs: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the notes of several graphs: first those that all graphs share, then the others, each prefixed with the
    name of its graph.
    """
    every = dict.fromkeys(note for notes in of_graphs.values() for note in notes)
    shared = [note for note in every if all(note in notes for notes in of_graphs.values())]
    return shared + [f"{name}: {note}" for name, notes in of_graphs.items() for note in notes if note not in shared]


def quantize_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Quantizes the graphs into `out`. Request: see `Calibrated`.

    A graph that the keep-list covers as a whole is copied there in float, where something of another one is quantized.
    Returns graphs, the images and feeds that ranges were measured on (none when only weights are lowered), the
    quantizer's notes, and the peak memory in bytes.
    """
    job, refused = Calibrated(request), list[NothingLeft]()

    def lower(source: Source, spec: QuantSpec, feeds: Iterable[Feeds]) -> Graph:
        try:
            return cast(Graph, job.quantizer.quantize(source, spec, feeds))
        except NothingLeft as error:
            refused.append(error)
            for file in source.graph.files():
                shutil.copyfile(file, spec.output_dir / file.name)
            return replace(source.graph, path=spec.output_dir / source.graph.path.name, left_float=True)

    made: Each[Graph] = job.each(lower)
    if len(refused) == len(made.made):
        raise refused[0]
    return {"graphs": graphs_to_json(made.made), **job.calibrated(made)}
