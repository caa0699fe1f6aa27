"""Measures the host memory that a variant needs, as a task of a worker process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pqk.measure.footprint import peak_ram_bytes
from pqk.run.variants import Runner, Variant


def measure_memory(request: Mapping[str, Any]) -> dict[str, Any]:
    """Peak resident memory of a process that compiles one variant, always anew, and runs two pairs."""
    variant = Variant.from_json(request["variant"])
    # a model read from the cache of compiled ones takes another peak than one compiled
    variant = replace(variant, options={k: v for k, v in variant.options.items() if k != "cache_dir"})
    shape = variant.encoder.inputs[0].shape
    image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    with Runner(variant) as runner:
        for _ in range(2):
            runner.timed_pair(image, image)
        return {"peak_bytes": peak_ram_bytes()}
