"""Timing of variants side by side in one process: every round runs each of them once, in an order drawn anew."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pqk.data.scenes.open import open_scene
from pqk.data.scenes.pairs import image_similarity, pair_graph
from pqk.engines.variant import Runner, Variant
from pqk.families.dust3r.inputs import load_frames
from pqk.measure.noise import Clocks, drift_pct, load_between, load_now, read_clocks
from pqk.stats.latency import speedup

ORDER_SEED = 0
"""Of the order in each round: in a fixed rotation a variant would always run after the same other one."""

VIEWS = 6
"""Images of the scene that is timed, put together out of several where these have fewer."""

LEAST_ROUNDS = 3
"""Timed whatever the ceiling says: a median needs them."""

LEAST_FOR_ENOUGH = 10
"""Rounds before an interval may end a timing."""

Samples = Mapping[str, Sequence[float]]


def time_variants(request: dict[str, Any], read: Callable[[], Clocks] = read_clocks) -> dict[str, Any]:
    """Raw samples in milliseconds per variant (pair, encoder, decoder, device where engines tell it), seconds a scene.

    Request: variants, scenes (folders), shape [H, W], views, pair_graph, efficiency; of the latter see `why_to_end`.
    Fed are the first VIEWS images of the scenes and the pairs of the pair graph over them, whatever they share: what is
    in a picture moves no time. Samples with one index are of one round and of the same pair. t_scene encodes each image
    once and decodes every pair; it is the median of two rounds. `timing` says how it went: rounds, seconds, what ended
    it, seed of the order, drift in percent (of the variant that drifted most), and loads in cores
    (`pqk.measure.noise`).
    """
    variants = [Variant.from_json(v) for v in request["variants"]]
    images = timed_images(request["scenes"], request["shape"], request["views"])
    graph = request["pair_graph"]
    alike = image_similarity(image[0] for image in images) if graph["kind"] == "topk" else None
    pairs = pair_graph(len(images), graph["kind"], graph["k"], graph["symmetrize"], alike)
    efficiency = request["efficiency"]
    runners = [Runner(variant) for variant in variants]
    names = [variant.name for variant in variants]
    samples: dict[str, dict[str, list[float]]] = {n: {"pair": [], "encoder": [], "decoder": []} for n in names}
    for _ in range(max(1, efficiency["warmup"])):
        for runner in runners:
            runner.timed_pair(images[0], images[1])
    random = np.random.default_rng(ORDER_SEED)
    before = load_now(read=read)
    gc.collect()
    gc.disable()
    begin, began, rounds, ended = read(), time.monotonic(), 0, None
    while ended is None:
        i, j = pairs[rounds % len(pairs)]
        for which in random.permutation(len(runners)):
            times = runners[which].timed_pair(images[i], images[j])
            kept = samples[names[which]]
            kept["pair"].append(times.pair_ms)
            kept["encoder"].extend(times.encoder_ms)
            kept["decoder"].append(times.decoder_ms)
            if times.device_ms is not None:
                kept.setdefault("device", []).append(times.device_ms)
        rounds += 1
        seconds = (time.monotonic() - began) / len(runners)
        ended = why_to_end(rounds, seconds, [samples[name]["pair"] for name in names], efficiency)
    end = read()
    after = load_now(read=read)
    scenes = _scene_times(dict(zip(names, runners, strict=True)), images, pairs, 4 * efficiency["max_seconds"], random)
    gc.enable()
    drifts = [found for name in names if (found := drift_pct(samples[name]["pair"])) is not None]
    return {
        "variants": {name: {**samples[name], "scene_s": scenes[name], "scene_pairs": len(pairs)} for name in names},
        "timing": {
            "rounds": rounds,
            "seconds": round(end.wall - begin.wall, 3),
            "ended_by": ended,
            "order_seed": ORDER_SEED,
            "drift_pct": max(drifts, key=abs, default=None),
            "load_before": round(before, 3),
            "load_during": round(load_between(begin, end), 3),
            "load_after": round(after, 3),
            "own_cores": round((end.own - begin.own) / (end.wall - begin.wall), 3),
        },
    }


def timed_images(scenes: Sequence[str], shape: Sequence[int], views: int | None) -> list[np.ndarray]:
    """The first VIEWS images (1,3,H,W) of the scenes, `views` of each at most, in their order."""
    images: list[np.ndarray] = []
    for folder in scenes:
        frames = load_frames(open_scene(Path(folder)), shape[0], shape[1], views)
        images += [frames[k].image[None] for k in range(min(len(frames), VIEWS - len(images)))]
        if len(images) == VIEWS:
            break
    return images


def why_to_end(
    rounds: int, seconds: float, pair_ms: Sequence[Sequence[float]], efficiency: Mapping[str, Any]
) -> str | None:
    """Says what ends a timing after so many rounds and seconds per variant; None: another round.

    'minimum': both `min_rounds` and `min_seconds` are reached. 'ceiling': `max_seconds` is, though never before
    LEAST_ROUNDS. 'interval': every variant's speed against the first one is known to +- `enough_pct` percent, where
    that is not null, and not before LEAST_FOR_ENOUGH rounds.
    """
    if rounds >= efficiency["min_rounds"] and seconds >= efficiency["min_seconds"]:
        return "minimum"
    if rounds >= LEAST_ROUNDS and seconds >= efficiency["max_seconds"]:
        return "ceiling"
    enough = efficiency["enough_pct"]
    if enough is None or rounds < LEAST_FOR_ENOUGH or len(pair_ms) < 2:
        return None
    found = [speedup(pair_ms[0], other) for other in pair_ms[1:]]
    known = all(ratio.half is not None and ratio.half <= enough / 100 * ratio.value for ratio in found)
    return "interval" if known else None


def _scene_times(
    runners: Mapping[str, Runner],
    images: Sequence[np.ndarray],
    pairs: Sequence[tuple[int, int]],
    limit_s: float,
    random: np.random.Generator,
) -> dict[str, list[float]]:
    """Seconds of a whole scene per variant, twice; once where the first time took longer than `limit_s` per variant."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    began, names = time.monotonic(), list(runners)
    for turn in range(2):
        if turn and time.monotonic() - began > limit_s * len(names):  # a slow model must not hold the run once more
            break
        for which in random.permutation(len(names)):
            runner = runners[names[which]]
            start = time.perf_counter()
            tokens = [runner.encode(image) for image in images]
            for i, j in pairs:
                runner.decoder.infer({"tokens_1": tokens[i], "tokens_2": tokens[j]})
            found[names[which]].append(time.perf_counter() - start)
    return found
