"""PTQ of both graphs: the encoder on the calibration images, the decoder on the tokens of their pairs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from backends import registry
from backends.base import BackendError, Feeds, Graph, QuantSpec, Source
from backends.reference import OnnxRuntimeEngine
from pqk.engines.variant import graph_from_json, graph_to_json
from pqk.errors import PqkError, nearest
from pqk.families.checkpoint import load_model
from pqk.families.dust3r.inputs import CalibrationImages
from pqk.files import clear_write_errors
from pqk.measure.footprint import peak_ram_bytes
from pqk.settings.keep import hint, keep_for


class _Images:
    """Encoder feeds."""

    def __init__(self, images: CalibrationImages) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Feeds]:
        for image in self.images:
            yield {"image": image}


class _Tokens:
    """Decoder feeds: tokens of neighbouring images, read from a file on disk so that memory holds one pair."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __iter__(self) -> Iterator[Feeds]:
        for k in range(0, len(self.tokens) - 1, 2):
            yield {"tokens_1": np.array(self.tokens[k : k + 1]), "tokens_2": np.array(self.tokens[k + 1 : k + 2])}


def _reserve(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in a file whose blocks are taken at once: a full disk is a sentence here, later a SIGBUS."""
    with clear_write_errors(path):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return array


Made = TypeVar("Made")


@dataclass(frozen=True)
class Both(Generic[Made]):
    """What was made of encoder and decoder, and on how many images and pairs."""

    encoder: Made
    decoder: Made
    images: int
    pairs: int


class Calibrated:
    """The two graphs of a model with what a quantizer needs to lower them: sources, specs and calibration feeds.

    Request: backend, quantizer, model (where modules are loaded from), encoder, decoder (graphs), calibration (scene
    folders), shape, ptq (the config's section), out. Raises PqkError for an unknown quantizer and a calibration set
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
        # Weights alone are rounded without data: one pair tells shapes and names.
        self.weights_only = self.ptq["bits_a"] > self.ptq["bits_w"]
        wanted = 2 if self.weights_only else self.ptq["calibration_images"]
        self.images = CalibrationImages([Path(folder) for folder in request["calibration"]], wanted, *request["shape"])
        self.graphs = {name: graph_from_json(request[name]) for name in ("encoder", "decoder")}
        needed = modules or self.quantizer.starts_from == "module"
        self.model = load_model(request["model"]) if needed else None
        self.modules = self.model.graphs(*request["shape"]) if self.model is not None else {}
        self._notes: dict[str, list[str]] = {}

    def source(self, name: str) -> Source:
        """The graph of that name and, where they are needed, its module and example inputs."""
        graph, module = self.graphs[name], self.modules.get(name)
        return Source(
            name,
            module.module if module else None,
            module.inputs if module else {},
            tuple(t.name for t in graph.outputs),
            graph,
        )

    def spec(self, name: str, samples: int) -> QuantSpec:
        """How the graph of that name is to be lowered."""
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

    def both(self, lower: Callable[[Source, QuantSpec, Iterable[Feeds]], Made]) -> Both[Made]:
        """Returns what `lower` makes of both graphs.

        A BackendError names the graph where an item of its calibration set is at fault, and has a hint where an entry
        of the keep-list is.
        """

        def lowered(name: str, samples: int, calibration: Iterable[Feeds]) -> Made:
            try:
                made = lower(self.source(name), self.spec(name, samples), calibration)
                self._notes[name] = list(self.quantizer.notes())
                return made
            except BackendError as error:
                more = hint(self.ptq["keep_list"], name, str(error))
                if not more and not str(error).startswith("calibration item"):
                    raise
                raise type(error)(f"{name}: {error}{more}") from error

        encoder = self.graphs["encoder"]
        with tempfile.TemporaryDirectory(prefix="pqk-tokens-", dir=self.out) as folder:
            # every fourth pair: each passes both decoders and both heads, and costs four times as much as an image
            chosen = self.images.every_fourth_pair()
            shape = (len(chosen), *encoder.outputs[0].shape[1:])
            tokens = _reserve(Path(folder) / "tokens.npy", shape)
            # Every toolchain calibrates on the same tokens, and no plan is built to make them.
            with OnnxRuntimeEngine(encoder) as engine:
                for k, image in enumerate(chosen):
                    tokens[k] = engine.infer({"image": image})["tokens"][0]
            made = (
                lowered("encoder", len(self.images), _Images(self.images)),
                lowered("decoder", len(chosen) // 2, _Tokens(tokens)),
            )
            del tokens
        return Both(*made, len(self.images), len(chosen) // 2)

    def notes(self) -> list[str]:
        """Returns what the quantizer said of the graphs that it lowered; see `merge_notes`."""
        return merge_notes(self._notes)


def merge_notes(of_graphs: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the notes of several graphs: those of all first, then the others, each behind the name of its graph."""
    every = dict.fromkeys(note for notes in of_graphs.values() for note in notes)
    shared = [note for note in every if all(note in notes for notes in of_graphs.values())]
    return shared + [f"{name}: {note}" for name, notes in of_graphs.items() for note in notes if note not in shared]


def quantize_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize encoder and decoder into `out`. Request: see `Calibrated`.

    Returns the two graphs, the images and pairs that ranges were measured on (none where only weights are lowered), the
    quantizer's notes, and the peak memory in bytes.
    """
    job = Calibrated(request)
    made: Both[Graph] = job.both(job.quantizer.quantize)
    return {
        "encoder": graph_to_json(made.encoder),
        "decoder": graph_to_json(made.decoder),
        "images": 0 if job.weights_only else made.images,
        "pairs": 0 if job.weights_only else made.pairs,
        "notes": job.notes(),
        "peak_bytes": peak_ram_bytes(),
    }
