"""PTQ of both graphs: the encoder on the calibration images, the decoder on the tokens of their pairs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.base import BackendError, Feeds, Graph, QuantSpec, Source
from backends.reference import OnnxRuntimeEngine
from pqk.errors import PqkError, nearest
from pqk.files import clear_write_errors
from pqk.measure.footprint import peak_ram_bytes
from pqk.models.checkpoint import load_model
from pqk.run.inputs import CalibrationImages
from pqk.run.variants import graph_from_json, graph_to_json
from pqk.spec.keep import hint, keep_for


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


def quantize_graphs(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize encoder and decoder into `out`.

    Request: backend, quantizer, model (for a quantizer that starts from modules), encoder, decoder (graphs),
    calibration (folder of scenes), shape, ptq (the config's section), out. Returns the two graphs, the images and pairs
    that ranges were measured on (none where only weights are lowered), the quantizer's notes, and the peak memory in
    bytes.
    """
    backend = registry.get(request["backend"])
    quantizers = backend.quantizers()
    if request["quantizer"] not in quantizers:
        raise PqkError(
            f"backend {backend.name} has no quantizer {request['quantizer']!r}"
            f"{nearest(request['quantizer'], quantizers)}; it has {', '.join(quantizers) or 'none'}"
        )
    quantizer = quantizers[request["quantizer"]]
    ptq, out = request["ptq"], Path(request["out"])
    weights_only = ptq["bits_a"] > ptq["bits_w"]  # they are rounded without data: one pair tells shapes and names
    wanted = 2 if weights_only else ptq["calibration_images"]
    images = CalibrationImages(Path(request["calibration"]), wanted, *request["shape"])
    encoder, decoder = graph_from_json(request["encoder"]), graph_from_json(request["decoder"])

    def spec(name: str, samples: int) -> QuantSpec:
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
            output_dir=out,
        )

    modules = load_model(request["model"]).graphs(*request["shape"]) if quantizer.starts_from == "module" else {}

    def source(name: str, graph: Graph) -> Source:
        module = modules.get(name)
        return Source(
            name,
            module.module if module else None,
            module.inputs if module else {},
            tuple(t.name for t in graph.outputs),
            graph,
        )

    def quantized(name: str, graph: Graph, samples: int, calibration: Iterable[Feeds]) -> Graph:
        try:
            return quantizer.quantize(source(name, graph), spec(name, samples), calibration)
        except BackendError as error:
            more = hint(ptq["keep_list"], name, str(error))
            if not more:
                raise
            raise type(error)(f"{name}: {error}{more}") from error

    with tempfile.TemporaryDirectory(prefix="pqk-tokens-", dir=out) as folder:
        # every fourth pair: each passes through both decoders and both heads, and costs four times as much as an image
        chosen = images.every_fourth_pair()
        shape = (len(chosen), *encoder.outputs[0].shape[1:])
        tokens = _reserve(Path(folder) / "tokens.npy", shape)
        # Every toolchain calibrates on the same tokens, and no plan is built to make them.
        with OnnxRuntimeEngine(encoder) as engine:
            for k, image in enumerate(chosen):
                tokens[k] = engine.infer({"image": image})["tokens"][0]
        quantized_encoder = quantized("encoder", encoder, len(images), _Images(images))
        quantized_decoder = quantized("decoder", decoder, len(chosen) // 2, _Tokens(tokens))
        del tokens
    return {
        "encoder": graph_to_json(quantized_encoder),
        "decoder": graph_to_json(quantized_decoder),
        "images": 0 if weights_only else len(images),
        "pairs": 0 if weights_only else len(chosen) // 2,
        "notes": list(quantizer.notes()),
        "peak_bytes": peak_ram_bytes(),
    }
