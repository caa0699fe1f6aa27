"""Puts the scripts on the path, offers `edge_eval` and `edge_power`, and runs an export through its runtimes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from run_toys import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import edge_eval
import edge_power

__all__ = ["QUICK", "SCRIPT", "edge_eval", "edge_power", "outputs_of"]

SCRIPT = REPOSITORY / "scripts" / "edge_eval.py"
QUICK = ["--seconds", "0", "--pairs", "3", "--warmup", "1"]


def outputs_of(folder: Path, runtimes: Iterable[str]) -> list[dict[str, np.ndarray]]:
    """What each runtime computes of the same two images, with the functions that are timed."""
    about = edge_eval.read_export(folder)
    images, _ = edge_eval.load_images(None, about["preprocessing"])
    found = []
    for name in runtimes:
        runtime = edge_eval.choose_runtime(name, about)
        encode, decode = (runtime.load(folder, about["graphs"][part]) for part in ("encoder", "decoder"))
        a, b = (encode({"image": image})["tokens"] for image in images)
        assert not np.array_equal(a, b)  # the second run must not overwrite the first one's result
        found.append(decode({"tokens_1": a, "tokens_2": b}))
    return found
