"""Two sides run on the same pairs: how far their outputs are apart."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pqk.data.scene import open_scene
from pqk.errors import PqkError
from pqk.measure.similarity import Agreement
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.variants import Runner, Variant
from pqk.spec.workload import PairGraph


class Side(Protocol):
    """Whatever turns images into tokens and tokens into predictions."""

    def encode(self, image: np.ndarray) -> np.ndarray: ...

    def decode(self, tokens_1: np.ndarray, tokens_2: np.ndarray) -> dict[str, np.ndarray]: ...


class TorchSide:
    """The model itself, eager in f32: what every export is held against."""

    def __init__(self, model: str, height: int, width: int) -> None:
        from backends.base import TensorInfo
        from backends.reference import TorchEngine
        from pqk.models.checkpoint import load_model

        def engine(name: str) -> TorchEngine:
            spec = specs[name]
            inputs = [TensorInfo(n, tuple(spec.inputs[n].shape), "float32") for n in spec.input_names]
            return TorchEngine(spec.module, inputs, [TensorInfo(n, (), "float32") for n in spec.output_names])

        specs = load_model(model).graphs(height, width)
        self.encoder, self.decoder = engine("encoder"), engine("decoder")

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Image (1,3,H,W) -> tokens (1,N,C)."""
        return self.encoder.infer({"image": image})["tokens"]

    def decode(self, tokens_1: np.ndarray, tokens_2: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens of two images -> pts3d_1, conf_1, pts3d_2, conf_2 without the batch axis."""
        out = self.decoder.infer({"tokens_1": tokens_1, "tokens_2": tokens_2})
        return {name: array[0] for name, array in out.items()}

    def __enter__(self) -> TorchSide:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def open_side(side: Mapping[str, Any], shape: tuple[int, int]) -> AbstractContextManager[Side]:
    """A side out of {'variant': ...} or {'torch': where the model is}."""
    return TorchSide(side["torch"], *shape) if "torch" in side else Runner(Variant.from_json(side["variant"]))


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Agreement of `other` with `base` over some pairs, each side end to end: it decodes its own tokens.

    Request: base, other (see `open_side`), scenes (folders), views, shape, pair_graph, min_covisibility, truthful,
    pairs (how many, spread evenly over the pairs of all scenes). Returns heads (see `similarity.HeadAgreement`) and
    the pairs. Raises PqkError.
    """
    graph = PairGraph.model_validate(request["pair_graph"])
    scenes = []
    for folder in request["scenes"]:
        frames = load_frames(open_scene(Path(folder)), request["shape"][0], request["shape"][1], request["views"])
        scenes.append((frames, scene_pairs(frames, graph, request["min_covisibility"], request["truthful"])))
    every = [(number, i, j) for number, (_, pairs) in enumerate(scenes) for i, j in pairs]
    if not every:
        raise PqkError("there is no pair to compare")
    count = min(request["pairs"], len(every))
    chosen = [every[k * len(every) // count] for k in range(count)]
    agreement = Agreement()
    with ExitStack() as stack:
        base, other = (
            stack.enter_context(open_side(request[name], tuple(request["shape"]))) for name in ("base", "other")
        )
        for number, i, j in chosen:
            frames = scenes[number][0]
            a, b = (
                side.decode(side.encode(frames[i].image[None]), side.encode(frames[j].image[None]))
                for side in (base, other)
            )
            agreement.add(a, b)
    return {
        "heads": {head: asdict(found) for head, found in agreement.result().items()},
        "pairs": [[scenes[n][0][i].scene, scenes[n][0][i].name, scenes[n][0][j].name] for n, i, j in chosen],
    }
