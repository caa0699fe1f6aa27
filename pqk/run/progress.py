"""Tells the parent of a worker process how far its task is.

A module of its own, as everything that a task imports is in the key of what it makes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.compress.train import Progress

PREFIX = "pqk-progress "
"""Begins the lines on a worker's stdout that are meant for its parent."""


def tell(news: dict[str, Any]) -> None:
    """Say how far this worker is: 'text', and the 'share' done. Nothing is visible where nobody listens."""
    print(PREFIX + json.dumps(news), flush=True)


def tell_training(p: Progress) -> None:
    """Tell the progress of a training: step, loss, rate, time left, and the last validation."""
    left = f", {p.seconds * (1 - p.share) / p.share / 60:.1f} min left" if p.share else ""
    text = f"step {p.step}, loss {p.loss:.3f}, {p.samples_per_second:.1f} pairs/s{left}"
    if p.history:
        last = p.history[-1]
        text += f", AbsRel {last['absrel']:.4f}"
        if "drop_pct" in last:
            text += f" (drop {last['drop_pct']:+.1f} %)"
    tell({"text": text, "share": p.share})
