"""Quality of one variant over the test scenes, and what its engines executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.base import Kernel, executed_precision, matched_by_size
from pqk.data.preprocess import Frame
from pqk.data.scene import open_scene
from pqk.errors import CheckFailed, PqkError
from pqk.measure.quality import pair_truth, score_against_reference, score_pair, summarise
from pqk.run.inputs import load_frames, scene_pairs
from pqk.run.variants import Runner, Variant
from pqk.spec.keep import keep_for
from pqk.spec.workload import PairGraph

_AHEAD = 4  # pairs that may wait for their scores


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    """Score every pair of every scene.

    Request: variant, reference (a variant whose output plays the truth, or null), scenes (folders), views, shape,
    pair_graph, min_covisibility, quality (the evaluation's section), seed, keep (keep-list or []), and, needed only
    with a reference, min_conf (the bound above which its activation gives confidences). Returns summary
    (mean per metric), pairs (a row of scores each), measured (engine or emulated), size_bytes (files that ship),
    executed (share of FLOPs per precision), flops, kernels (rows).
    Pairs whose first view has fewer than quality.min_valid_pixels of ground truth are not scored.
    Raises PqkError when a score cannot be computed or no pair is left, CheckFailed when a kept node ran in an int8
    kernel.
    """
    variant = Variant.from_json(request["variant"])
    reference = Variant.from_json(request["reference"]) if request["reference"] else None
    waiting: list[tuple[dict[str, str], Future[dict[str, Any] | None]]] = []
    names: list[str] = []
    graph = PairGraph.model_validate(request["pair_graph"])
    height, width = request["shape"]
    with ExitStack() as engines:
        # Scores are computed beside the engines: most of scoring is one thread in numpy, which frees the interpreter.
        scorer = engines.enter_context(ThreadPoolExecutor(1, "score"))
        runner = engines.enter_context(Runner(variant))
        teacher: Runner | None = None
        if reference is not None:  # the Teacher against itself needs no second copy in memory
            teacher = runner if reference == variant else engines.enter_context(Runner(reference))
        for folder in request["scenes"]:
            scene = open_scene(Path(folder))
            names.append(scene.name)
            frames = load_frames(scene, height, width, request["views"], request["seed"])
            truthful = reference is None
            pairs = scene_pairs(frames, graph, request["min_covisibility"], truthful)
            tokens = [runner.encode(f.image[None]) for f in frames]
            taught = [teacher.encode(f.image[None]) for f in frames] if teacher else []
            for i, j in pairs:
                out = runner.decode(tokens[i], tokens[j])
                if teacher:
                    job = scorer.submit(_against, out, teacher.decode(taught[i], taught[j]), request)
                else:
                    job = scorer.submit(_against_truth, out, frames[i], frames[j], request)
                pair = {"scene": scene.name, "first": frames[i].name, "second": frames[j].name}
                waiting.append((pair, job))
                if len(waiting) > _AHEAD:  # bounds the predictions in memory, and stops soon after a failure
                    _scores(variant, *waiting[-_AHEAD - 1])
        rows = [{**pair, **scores} for pair, job in waiting if (scores := _scores(variant, pair, job)) is not None]
        if not rows:
            wanted = request["quality"]["min_valid_pixels"]
            raise PqkError(
                f"there is no pair to evaluate: none of {', '.join(names)} has a view with {wanted} valid depth pixels "
                "(quality.min_valid_pixels)"
            )
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
    plain = [{k: v for k, v in row.items() if k not in ("scene", "first", "second")} for row in rows]
    return {
        "summary": summarise(plain),
        "pairs": rows,
        "scenes": names,
        "measured": measured,
        "size_bytes": size,
        "executed": executed_precision(of_a_pair),
        "matched_by_size": matched_by_size(of_a_pair),
        "flops": sum(k.flops for k in of_a_pair),
        "kernels": {name: [_row(k) for k in listed] for name, listed in kernels.items()},
    }


def _scores(variant: Variant, pair: Mapping[str, str], job: Future[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Wait for a pair's scores. Raises PqkError that names the pair."""
    try:
        return job.result()
    except PqkError as error:
        where = f"{pair['first']} and {pair['second']}"
        raise PqkError(f"{variant.name} on scene {pair['scene']}, {where}: {error}") from error


def _row(kernel: Kernel) -> dict[str, Any]:
    shown = ("name", "type", "implementation", "precision", "time_us", "flops", "matched")
    return {name: getattr(kernel, name) for name in shown}


def _against_truth(
    out: Mapping[str, np.ndarray], first: Frame, second: Frame, request: dict[str, Any]
) -> dict[str, Any] | None:
    """Scores of a pair, or None when it has too little ground truth to be scored."""
    truth = pair_truth(first, second)
    if int(truth.valid1.sum()) < request["quality"]["min_valid_pixels"]:
        return None
    return dict(score_pair(out, truth, **_options(request)))


def _against(
    out: Mapping[str, np.ndarray], teacher: Mapping[str, np.ndarray], request: dict[str, Any]
) -> dict[str, Any] | None:
    return dict(score_against_reference(out, teacher, **_options(request), min_conf=request["min_conf"]))


def _options(request: dict[str, Any]) -> dict[str, Any]:
    quality = request["quality"]
    return {"align": quality["scale_alignment"], "chamfer_points": quality["chamfer_points"], "seed": request["seed"]}


def write_evaluation(folder: Path, result: dict[str, Any]) -> None:
    """Keep the result as evidence: scores per pair, and the kernels that ran."""
    kernels = result.pop("kernels")
    (folder / "quality.json").write_text(json.dumps(result, indent=1))
    (folder / "kernels.json").write_text(json.dumps(kernels, indent=0))
