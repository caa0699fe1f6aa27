"""A model as it is run: its graphs at one precision on one backend, and one pair through them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.base import Array, Graph, Kernel, Precision, TensorInfo
from pqk.errors import PqkError


@dataclass(frozen=True)
class Variant:
    """The encoder and decoder graphs of one model, and how they are compiled."""

    name: str
    backend: str
    precision: Precision
    encoder: Graph
    decoder: Graph
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, str]:
        return {"encoder": self.encoder.sha256, "decoder": self.decoder.sha256}

    def to_json(self) -> dict[str, Any]:
        """Plain data for a worker process."""
        return {
            "name": self.name,
            "backend": self.backend,
            "precision": str(self.precision),
            "encoder": graph_to_json(self.encoder),
            "decoder": graph_to_json(self.decoder),
            "options": dict(self.options),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Variant:
        return Variant(
            data["name"],
            data["backend"],
            Precision(data["precision"]),
            graph_from_json(data["encoder"]),
            graph_from_json(data["decoder"]),
            data["options"],
        )


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """Plain data; the path is absolute, for a worker on the same machine."""
    return {
        "path": str(graph.path),
        "inputs": [asdict(t) for t in graph.inputs],
        "outputs": [asdict(t) for t in graph.outputs],
        "sha256": graph.sha256,
    }


def graph_from_json(data: Mapping[str, Any]) -> Graph:
    """The inverse of `graph_to_json`."""

    def ports(items: Any) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(t["name"], tuple(t["shape"]), t["dtype"]) for t in items)

    return Graph(Path(data["path"]), ports(data["inputs"]), ports(data["outputs"]), data["sha256"])


@dataclass(frozen=True)
class PairTimes:
    """Milliseconds of one pair on the host: both encodings, the decoding, and their sum.

    device_ms: of all three on the device, without copies; None where the engines do not measure it.
    """

    encoder_ms: tuple[float, float]
    decoder_ms: float
    device_ms: float | None = None

    @property
    def pair_ms(self) -> float:
        return sum(self.encoder_ms) + self.decoder_ms


class Runner:
    """The compiled engines of a variant; a context manager that frees them."""

    def __init__(self, variant: Variant) -> None:
        backend = registry.get(variant.backend)
        self.variant = variant
        self._stack = ExitStack()
        try:
            self.encoder = self._stack.enter_context(
                backend.compile(variant.encoder, variant.precision, variant.options)
            )
            self.decoder = self._stack.enter_context(
                backend.compile(variant.decoder, variant.precision, variant.options)
            )
        except BaseException:
            self._stack.close()
            raise

    @property
    def measured(self) -> str:
        """'engine', or 'emulated' when another runtime computes in place of one of the engines."""
        emulated = "emulated" in (self.encoder.measured, self.decoder.measured)
        return "emulated" if emulated else "engine"

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that ship."""
        return self.encoder.size_bytes + self.decoder.size_bytes

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free both engines."""
        self._stack.close()

    def encode(self, image: np.ndarray) -> Array:
        """Image (1,3,H,W) -> tokens (1,N,C), which stay on the device where the engine has one of its own."""
        return self.encoder.infer_on_device({"image": image})["tokens"]

    def decode(self, tokens_1: Array, tokens_2: Array) -> dict[str, np.ndarray]:
        """Tokens of two images -> pts3d_1, conf_1, pts3d_2, conf_2 without the batch axis."""
        out = self.decoder.infer({"tokens_1": tokens_1, "tokens_2": tokens_2})
        return {name: array[0] for name, array in out.items()}

    def timed_pair(self, image_1: np.ndarray, image_2: np.ndarray) -> PairTimes:
        """Times one pair end to end, as DUSt3R runs it: two encodings, one decoding.

        Host times hold the copy of each image to the device and of the outputs back; tokens stay there.
        """
        t0 = time.perf_counter_ns()
        a = self.encode(image_1)
        t1 = time.perf_counter_ns()
        first = self.encoder.last_device_ms
        t2 = time.perf_counter_ns()
        b = self.encode(image_2)
        t3 = time.perf_counter_ns()
        self.decoder.infer({"tokens_1": a, "tokens_2": b})
        t4 = time.perf_counter_ns()
        parts = (first, self.encoder.last_device_ms, self.decoder.last_device_ms)
        device_ms = None if None in parts else sum(part for part in parts if part is not None)
        return PairTimes(((t1 - t0) / 1e6, (t3 - t2) / 1e6), (t4 - t3) / 1e6, device_ms)

    def kernels(self) -> dict[str, list[Kernel]]:
        """The executed kernels of each graph. Raises PqkError when an engine reports none."""
        found = {"encoder": self.encoder.kernels(), "decoder": self.decoder.kernels()}
        for graph, kernels in found.items():
            if not kernels:
                raise PqkError(f"the {graph} engine reports no kernels, so its executed precision is unknown")
        return found
