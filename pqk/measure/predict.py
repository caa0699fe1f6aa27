"""The engines of a variant over the scenes: the predictions of every pair, and what was executed. No score in sight."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends import registry
from backends.base import Array, Kernel, executed_precision, matched_by_size
from pqk.data.scenes.open import open_scene
from pqk.data.scenes.pairs import spread
from pqk.data.scenes.preprocess import Frame
from pqk.engines.variant import Runner, Variant
from pqk.errors import CheckFailed
from pqk.families.dust3r.inputs import Kept, load_frames, scene_pairs
from pqk.files import clear_write_errors
from pqk.measure.predictions import ABOUT, KERNELS, Writer
from pqk.settings.keep import keep_for
from pqk.settings.workload import PairGraph

Arrays = dict[str, np.ndarray]
_TOKENS = 512 * 2**20  # bytes of tokens that a scene keeps: 160 images of the full-size model at 512x384


class Take(Protocol):
    """Gets a pair: scene (its place in the list), first and second (names of its images), places (of these in the
    scene); its two frames; its arrays; and those of the reference where one runs beside it."""

    def __call__(
        self, pair: dict[str, Any], frames: tuple[Frame, Frame], arrays: Arrays, reference: Arrays | None
    ) -> None: ...


def predict(request: dict[str, Any]) -> dict[str, Any]:
    """Write the predictions of a variant into the folder request['out']; the rest of the request: see `run_pairs`."""
    out = Path(request["out"])
    with Writer(out) as writer:
        about = run_pairs(request, lambda pair, frames, arrays, reference: writer.add(pair, arrays))
    with clear_write_errors(out):
        (out / KERNELS).write_text(json.dumps(about.pop("kernels"), indent=0))
        (out / ABOUT).write_text(json.dumps(about, indent=1))
    return {}


def run_pairs(request: Mapping[str, Any], take: Take) -> dict[str, Any]:
    """Run every pair of every scene, one at a time, and hand it to `take`.

    Request: variant, reference (a variant to run beside it, or absent), scenes (folders), views, shape, pair_graph,
    min_covisibility, truthful (whether pairs are chosen by their ground truth), pairs_per_scene (how many of each
    scene, see `pqk.data.scenes.pairs.spread`; null or absent: all), seed, keep (keep-list or []). Returns measured
    (engine or emulated), size_bytes (files that ship), executed (share of FLOPs per precision), matched_by_size (share
    of FLOPs whose kernel only their number tells), flops, kernels (rows).
    Raises CheckFailed when a kept node ran in an int8 kernel, PqkError for what the scenes and engines raise.
    """
    variant = Variant.from_json(request["variant"])
    reference = Variant.from_json(request["reference"]) if request.get("reference") else None
    graph = PairGraph.model_validate(request["pair_graph"])
    height, width = request["shape"]
    with ExitStack() as engines:
        runner = engines.enter_context(Runner(variant))
        teacher: Runner | None = None
        if reference is not None:  # a variant against itself needs no second copy in memory
            teacher = runner if reference == variant else engines.enter_context(Runner(reference))
        for number, folder in enumerate(request["scenes"]):
            frames = load_frames(open_scene(Path(folder)), height, width, request["views"], request["seed"])
            pairs = scene_pairs(frames, graph, request["min_covisibility"], request["truthful"])
            pairs = spread(pairs, request.get("pairs_per_scene"))
            predicted = _decoded(runner, frames, pairs)
            taught: Iterable[Arrays | None] = [None] * len(pairs)
            if teacher is not None and teacher is not runner:
                taught = _decoded(teacher, frames, pairs)
            for (i, j), arrays, other in zip(pairs, predicted, taught, strict=True):
                # The scene by its place: a folder that is renamed later still has the same predictions.
                pair = {"scene": number, "first": frames.names[i], "second": frames.names[j], "places": [i, j]}
                take(pair, (frames[i], frames[j]), arrays, arrays if teacher is runner else other)
        if teacher is not None and teacher is not runner:
            teacher.close()  # profiling may compile once more, and a large model leaves no room for three
        kernels, measured, size = runner.kernels(), runner.measured, runner.size_bytes
        if request["keep"]:
            backend = registry.get(variant.backend)
            for name, engine in (("encoder", runner.encoder), ("decoder", runner.decoder)):
                broken = backend.kept_in_int8(engine, keep_for(request["keep"], name), kernels[name])
                if broken:
                    raise CheckFailed(
                        f"{name}: {len(broken)} kept nodes ran in int8 kernels, the first is {broken[0].name} "
                        f"({broken[0].implementation})"
                    )
    of_a_pair = [*kernels["encoder"], *kernels["encoder"], *kernels["decoder"]]
    return {
        "measured": measured,
        "size_bytes": size,
        "executed": executed_precision(of_a_pair),
        "matched_by_size": matched_by_size(of_a_pair),
        "flops": sum(k.flops for k in of_a_pair),
        "kernels": {name: [_row(k) for k in listed] for name, listed in kernels.items()},
    }


def _decoded(runner: Runner, frames: Sequence[Frame], pairs: list[tuple[int, int]]) -> Iterator[Arrays]:
    """The predictions of each pair. An image is encoded when it is needed, and again where too many came between."""
    tokens = Kept(len(frames), lambda k: runner.encode(frames[k].image[None]), _bytes_of, _TOKENS)
    for first, second in pairs:
        yield runner.decode(tokens[first], tokens[second])


def _bytes_of(tokens: Array) -> int:
    return math.prod(tokens.shape) * tokens.dtype.itemsize


def _row(kernel: Kernel) -> dict[str, Any]:
    shown = ("name", "type", "implementation", "precision", "time_us", "flops", "matched")
    return {name: getattr(kernel, name) for name in shown}
