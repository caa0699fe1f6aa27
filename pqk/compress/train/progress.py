"""Reports the progress of a training to the parent of a worker process: `tell_training`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pqk.store.progress import tell

if TYPE_CHECKING:
    from pqk.compress.train.loop import Progress
    from pqk.families.contract import Family


def tell_training(family: Family) -> Callable[[Progress], None]:
    """Returns a function that reports step, loss, rate, time left, and the main metric of the last validation."""
    name, unit = family.settings_part().METRICS[0].name, family.learning_part().UNIT

    def report(p: Progress) -> None:
        left = f", {p.seconds * (1 - p.share) / p.share / 60:.1f} min left" if p.share else ""
        text = f"step {p.step}, loss {p.loss:.3f}, {p.samples_per_second:.1f} {unit}/s{left}"
        if p.history:
            last = p.history[-1]
            text += f", {name} {last[name]:.4f}"
            if "drop_pct" in last:
                text += f" (drop {last['drop_pct']:+.1f} %)"
        tell({"text": text, "share": p.share})

    return report
