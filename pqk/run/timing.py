"""Timing of variants side by side in one process: every round runs each of them once, in turning order."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

from pqk.data.scene import open_scene
from pqk.run.inputs import load_frames
from pqk.run.variants import Runner, Variant


def time_variants(request: dict[str, Any]) -> dict[str, Any]:
    """Raw samples in milliseconds per variant: pair, encoder, decoder; and seconds per scene.

    Request: variants, scene (folder), shape [H, W], views, pairs (index pairs of that scene), efficiency {warmup,
    min_pairs, max_seconds}. A variant's rounds end when `min_pairs` are timed or `max_seconds` per variant are over
    (but never before three). t_scene encodes each image once and decodes every pair; it is the median of two rounds.
    """
    variants = [Variant.from_json(v) for v in request["variants"]]
    frames = load_frames(open_scene(Path(request["scene"])), request["shape"][0], request["shape"][1], request["views"])
    images = [frame.image[None] for frame in frames]
    pairs = [(int(i), int(j)) for i, j in request["pairs"]]
    efficiency = request["efficiency"]
    runners = [Runner(variant) for variant in variants]
    names = [variant.name for variant in variants]
    samples: dict[str, dict[str, list[float]]] = {n: {"pair": [], "encoder": [], "decoder": []} for n in names}
    for _ in range(max(1, efficiency["warmup"])):
        for runner in runners:
            runner.timed_pair(images[0], images[1])
    gc.collect()
    gc.disable()
    began, rounds = time.monotonic(), 0
    limit = efficiency["max_seconds"] * len(runners)
    while rounds < efficiency["min_pairs"] and (rounds < 3 or time.monotonic() - began < limit):
        i, j = pairs[rounds % len(pairs)]
        for turn in range(len(runners)):
            which = (rounds + turn) % len(runners)
            times = runners[which].timed_pair(images[i], images[j])
            kept = samples[names[which]]
            kept["pair"].append(times.pair_ms)
            kept["encoder"].extend(times.encoder_ms)
            kept["decoder"].append(times.decoder_ms)
        rounds += 1
    scenes: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(2):
        if turn and time.monotonic() - began > 4 * limit:  # a slow model must not hold the run for its second round
            break
        for name, runner in zip(names, runners, strict=True):
            start = time.perf_counter()
            tokens = [runner.encode(image) for image in images]
            for i, j in pairs:
                runner.decoder.infer({"tokens_1": tokens[i], "tokens_2": tokens[j]})
            scenes[name].append(time.perf_counter() - start)
    gc.enable()
    return {
        "variants": {name: {**samples[name], "scene_s": scenes[name], "scene_pairs": len(pairs)} for name in names},
        "rounds": rounds,
    }
