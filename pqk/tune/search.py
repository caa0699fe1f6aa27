"""Searches mixed precision by measurement: which of the worst nodes must compute in float.

`search` is independent of models and engines: it gets the nodes, worst first, and a function that measures a choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pqk.errors import PqkError
from pqk.files import atomic_path
from pqk.paths import shown
from pqk.report.plots import pareto_front
from pqk.settings.keep import keep_patterns
from pqk.settings.quant import Quant, load_quant
from pqk.settings.yamlfile import read_text

SAME_TIME = 0.02  # two timings of the same graphs differ by up to this share (docs/howto-tune.md)

Evaluate = Callable[[tuple[str, ...]], tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One measured choice: the nodes in float, the drop in percent, the median pair time in milliseconds."""

    names: tuple[str, ...]
    drop_pct: float
    t_pair_p50_ms: float


@dataclass(frozen=True)
class TuneResult:
    """All measured points in the order of measurement, the Pareto front by rising time, and the winner.

    The winner is within the limit. Among the points whose time is within SAME_TIME of the fastest such point, it has
    the fewest nodes in float, then the lowest drop. None: no point is within the limit.
    """

    max_drop: float
    points: tuple[Point, ...]
    front: tuple[Point, ...] = field(init=False)
    winner: Point | None = field(init=False)

    def __post_init__(self) -> None:
        front = pareto_front([(p.t_pair_p50_ms, p.drop_pct) for p in self.points])
        within = [p for p in self.points if p.drop_pct <= self.max_drop]
        object.__setattr__(self, "front", tuple(self.points[index] for index in front))
        fastest = min((p.t_pair_p50_ms for p in within), default=math.inf)
        as_fast = [p for p in within if p.t_pair_p50_ms <= fastest * (1 + SAME_TIME)]
        object.__setattr__(
            self, "winner", min(as_fast, key=lambda p: (len(p.names), p.drop_pct, p.t_pair_p50_ms), default=None)
        )


def search(ranked: Sequence[str], evaluate: Evaluate, max_drop: float, max_evaluations: int = 24) -> TuneResult:
    """Finds the choice of float nodes with the lowest time whose drop is at most `max_drop` percent.

    ranked: names of nodes, the one with the largest share of the error first. evaluate: float nodes -> (drop in
    percent, median pair time in ms); it is slow, and never called twice for the same nodes. A NaN drop counts as
    infinite.
    Three steps. The worst 0, 1, 2, 4, ... nodes and all of them are measured until one choice is within the limit;
    then the smallest sufficient number is bisected; then single nodes of that choice go back to int8, the one with the
    smallest share first, as long as the drop stays within the limit and the time does not rise. The assumption that
    more float means a lower drop only saves measurements: the winner is always a measured point.
    Raises PqkError for a NaN limit, a name given twice, or fewer than two evaluations.
    """
    names = tuple(ranked)
    if math.isnan(max_drop) or len(set(names)) != len(names):
        raise PqkError("the drop limit must be a number, and no node may be ranked twice")
    if max_evaluations < 2:
        raise PqkError(f"tuning needs at least 2 evaluations, got {max_evaluations}")
    points: dict[tuple[str, ...], Point] = {}

    def measure(chosen: tuple[str, ...]) -> Point | None:
        """Returns the point of a choice; None when the evaluations are used up."""
        if chosen not in points:
            if len(points) == max_evaluations:
                return None
            drop, time = evaluate(chosen)
            points[chosen] = Point(chosen, math.inf if math.isnan(drop) else drop, time)
        return points[chosen]

    def within(point: Point) -> bool:
        return point.drop_pct <= max_drop

    low, best = -1, None  # `low` worst nodes are not enough
    for count in _steps(len(names), max_evaluations):
        point = measure(names[:count])
        if point is None:
            break
        if within(point):
            best = point
            break
        low = count
    while best is not None and len(best.names) - low > 1:
        middle = (low + len(best.names)) // 2
        point = measure(names[:middle])
        if point is None:
            break
        if within(point):
            best = point
        else:
            low = middle
    longest = best.t_pair_p50_ms * (1 + SAME_TIME) if best else math.inf
    for name in reversed(best.names if best else ()):
        assert best is not None
        point = measure(tuple(other for other in best.names if other != name))
        if point is None:
            break
        if within(point) and point.t_pair_p50_ms <= longest:
            best = point
    return TuneResult(max_drop, tuple(points.values()))


def _steps(count: int, limit: int) -> list[int]:
    """Returns 0, 1, 2, 4, ... and `count`: at most `limit` of them, so that the last one is always reached."""
    steps = [0]
    while (following := max(1, 2 * steps[-1])) < count and len(steps) < limit - 1:
        steps.append(following)
    return [*steps, count] if count else steps


def write_quant_yaml(
    base: Path | str, names: Sequence[str], out: Path | str, load: Callable[[Path | str], Quant] = load_quant
) -> Quant:
    """Writes `base` to `out` with the nodes `names` added to ptq.keep_list; returns the file as read back.

    names: as in `keep_patterns`. load: the family's reader of quant.yaml. The rest of the file is unchanged, comments
    included. Names that are in the list already are not repeated.
    Raises PqkError when `base` is not a valid quant.yaml, or `out` cannot be written; `out` is then unchanged.
    """
    listed = load(base).ptq.keep_list
    added = [entry for entry in keep_patterns(dict.fromkeys(names)) if entry not in listed]
    text = _insert(read_text(base), added)
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
        if load(temporary).ptq.keep_list != (*listed, *added):
            raise PqkError(f"{shown(base)}: nothing can be added to its ptq.keep_list; write it as a plain list")
    return load(out)


def write_without(
    base: Path | str, entries: Collection[str], out: Path, load: Callable[[Path | str], Quant] = load_quant
) -> Quant:
    """Writes `base` to `out` with `entries` taken out of ptq.keep_list; returns the file as read back.

    load: the family's reader of quant.yaml. The rest of the file is unchanged, comments included. Raises PqkError as
    `write_quant_yaml` does.
    """
    left = tuple(entry for entry in load(base).ptq.keep_list if entry not in entries)
    text = read_text(base)
    node, _ = _keep_list(text)
    for item in reversed([item for item in node.value if item.value in entries]):
        start, end = item.start_mark.index, item.end_mark.index
        before, after = text[:start].rstrip(), text[end:].lstrip(" ")
        if not node.flow_style:
            text = before.removesuffix("-").rstrip() + "\n" + text[end:].partition("\n")[2]
        elif after.startswith(","):
            text = text[:start] + after[1:].lstrip(" ")
        else:
            text = before.removesuffix(",") + text[end:]
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
        if load(temporary).ptq.keep_list != left:
            raise PqkError(f"{shown(base)}: nothing can be taken out of its ptq.keep_list; write it as a plain list")
    return load(out)


def _keep_list(text: str) -> tuple[Any, int]:
    """Returns the YAML node of ptq.keep_list in a quant.yaml, and the column of its name."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    column = 0
    for key in ("ptq", "keep_list"):
        name_node, node = next(pair for pair in node.value if pair[0].value == key)
        column = name_node.start_mark.column
    return node, column


def _insert(text: str, entries: Sequence[str]) -> str:
    """Returns a quant.yaml with entries added after the last one of its ptq.keep_list."""
    node, column = _keep_list(text)
    quoted = ["'" + entry.replace("'", "''") + "'" for entry in entries]
    place = node.value[-1].end_mark.index if node.value else node.start_mark.index + 1
    if node.flow_style:
        more = [f",\n{' ' * (column + 2)}{entry}" for entry in quoted]
        if more and not node.value:
            more[0] = quoted[0]
    else:
        more = [f"\n{' ' * node.start_mark.column}- {entry}" for entry in quoted]
        place = text.find("\n", place) if "\n" in text[place:] else len(text)  # behind a comment on the last entry
    return text[:place] + "".join(more) + text[place:]
