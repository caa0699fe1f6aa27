"""Host memory of a variant, in two processes: one that compiles it, and one that loads the compiled model and runs it.

A compiler needs memory that is free again once the model runs: a device that only runs a model needs the second number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pqk.engines.variant import Runner, Variant
from pqk.measure.footprint import forget_peak, peak_ram_bytes, ram_bytes

SETTLED = 0.01
"""Growth, as a share, over two pairs up to which a process counts as settled."""

_PAIRS = 20  # that a process may take to settle


def measure_memory(request: dict[str, Any]) -> dict[str, Any]:
    """Measures this process, which must be fresh.

    Request: variant, compiled (folder of the compiled model), step: 'compile' makes the model, leaves it in `compiled`
    and gives peak_bytes; 'run', in another process afterwards, loads it from there and gives steady_bytes: the peak
    while a pair runs, once pairs need no more memory than those before. Null when the model was compiled anew, or
    memory still grew after 20 pairs. A backend that cannot keep compiled models compiles in both.
    """
    variant = Variant.from_json(request["variant"])
    options = {name: value for name, value in variant.options.items() if name != "cache_dir"}
    if variant.backend != "reference":  # which reads a graph as it is
        options["cache_dir"] = request["compiled"]
    image = np.random.default_rng(0).uniform(-1, 1, variant.encoder.inputs[0].shape).astype(np.float32)
    with Runner(replace(variant, options=options)) as runner:

        def pair() -> None:
            runner.timed_pair(image, image)

        if request["step"] == "compile":
            pair()
            return {"peak_bytes": peak_ram_bytes()}
        loaded = all(getattr(engine, "loaded_from_cache", True) for engine in (runner.encoder, runner.decoder))
        return {"steady_bytes": steady_bytes(pair) if loaded else None}


def steady_bytes(run: Callable[[], object]) -> int | None:
    """Gives the most memory that one more `run` needs, once that no longer grows; None when it still grows."""
    peaks: list[int] = []
    for _ in range(_PAIRS):
        counted = forget_peak()
        run()
        peaks.append(peak_ram_bytes() if counted else ram_bytes())
        if len(peaks) > 2 and peaks[-1] <= (1 + SETTLED) * peaks[-3]:
            return peaks[-1]
    return None
