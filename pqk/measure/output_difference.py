"""Sides run on the same pairs: how far their outputs are from those of the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.base import Array
from pqk.data.scenes.open import open_scene
from pqk.data.scenes.preprocess import Frame
from pqk.engines.variant import Runner, Variant
from pqk.errors import PqkError
from pqk.families.dust3r.inputs import Frames, load_frames, scene_pairs
from pqk.measure.similarity import Agreement
from pqk.settings.workload import PairGraph


class Side(Protocol):
    """Whatever turns images into tokens and tokens into predictions."""

    def encode(self, image: np.ndarray) -> Array: ...

    def decode(self, tokens_1: Array, tokens_2: Array) -> dict[str, np.ndarray]: ...


class TorchSide:
    """The model itself, eager in f32: what every export is held against."""

    def __init__(self, model: str, height: int, width: int) -> None:
        from backends.base import TensorInfo
        from backends.reference import TorchEngine
        from pqk.families.checkpoint import load_model

        def engine(name: str) -> TorchEngine:
            spec = specs[name]
            inputs = [TensorInfo(n, tuple(spec.inputs[n].shape), "float32") for n in spec.input_names]
            return TorchEngine(spec.module, inputs, [TensorInfo(n, (), "float32") for n in spec.output_names])

        specs = load_model(model).graphs(height, width)
        self.encoder, self.decoder = engine("encoder"), engine("decoder")

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Image (1,3,H,W) -> tokens (1,N,C)."""
        return self.encoder.infer({"image": image})["tokens"]

    def decode(self, tokens_1: Array, tokens_2: Array) -> dict[str, np.ndarray]:
        """Tokens of two images -> pts3d_1, conf_1, pts3d_2, conf_2 without the batch axis."""
        out = self.decoder.infer({"tokens_1": tokens_1, "tokens_2": tokens_2})
        return {name: array[0] for name, array in out.items()}

    def __enter__(self) -> TorchSide:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def open_side(side: Mapping[str, Any], shape: Sequence[int]) -> AbstractContextManager[Side]:
    """A side out of {'variant': ...} or {'torch': where the model is}."""
    if "torch" in side:
        return TorchSide(side["torch"], shape[0], shape[1])
    return Runner(Variant.from_json(side["variant"]))


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Agreement of each of `others` with `base` over some pairs, each side end to end: it decodes its own tokens.

    Request: base (see `open_side`), others (a list of such), scenes (folders), views, shape, pair_graph,
    min_covisibility, truthful, pairs (how many, spread evenly over the pairs of all scenes). Returns heads (for each of
    `others` in turn: see `similarity.HeadAgreement`) and the pairs: number of the scene, two names. Each side runs
    once, and one is open at a time; memory holds the outputs of `base`, 8 MB for a pair of 512x512 pixels. Raises
    PqkError.
    """
    height, width = shape = request["shape"]
    graph = PairGraph.model_validate(request["pair_graph"])
    every: list[tuple[int, int, int]] = []

    def frames_of(scene: int) -> Frames:
        return load_frames(open_scene(Path(request["scenes"][scene])), height, width, request["views"])

    for scene in range(len(request["scenes"])):
        pairs = scene_pairs(frames_of(scene), graph, request["min_covisibility"], request["truthful"])
        every += [(scene, i, j) for i, j in pairs]
    if not every:
        raise PqkError("there is no pair to compare")
    count = min(request["pairs"], len(every))
    taken = [every[k * len(every) // count] for k in range(count)]
    opened = {scene: frames_of(scene) for scene, _, _ in taken}
    chosen = [(opened[scene][i], opened[scene][j]) for scene, i, j in taken]
    expected = list(_outputs(request["base"], shape, chosen))
    heads = []
    for other in request["others"]:
        agreement = Agreement()
        for a, b in zip(expected, _outputs(other, shape, chosen), strict=True):
            agreement.add(a, b)
        heads.append({head: asdict(found) for head, found in agreement.result().items()})
    return {
        "heads": heads,
        "pairs": [[scene, a.name, b.name] for (scene, _, _), (a, b) in zip(taken, chosen, strict=True)],
    }


def _outputs(
    side: Mapping[str, Any], shape: Sequence[int], pairs: Sequence[tuple[Frame, Frame]]
) -> Iterator[dict[str, np.ndarray]]:
    """The predictions of a side for each pair, one at a time."""
    with open_side(side, shape) as opened:
        for first, second in pairs:
            yield opened.decode(opened.encode(first.image[None]), opened.encode(second.image[None]))
