"""Tells the parent of a worker process how far a training is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pqk.store.progress import tell

if TYPE_CHECKING:
    from pqk.compress.train.loop import Progress


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
