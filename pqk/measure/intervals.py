"""Gives quality numbers their 95 % interval: the drop over scenes, a mean over scenes, paired ratios over rounds.

Pairs of one scene repeat each other, so a scene is the unit that is resampled (a cluster): Miller 2024, arXiv
2411.00640, section 2.2. Ratios are linearised (Cochran 1977, Sampling Techniques, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A number and what is known of its error.

    low, high: None when there are fewer than two groups. groups: independent parts that it was computed from. At most
    `value` itself when all groups agree exactly.
    """

    value: float
    low: float | None
    high: float | None
    groups: int

    @property
    def half(self) -> float | None:
        """Half the width, as in 0.8 ± 0.5; None when unknown."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def ends(self) -> list[float] | None:
        """[low, high] for a record; None when unknown."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def drop_interval(
    mine: Sequence[float],
    teacher: Sequence[float],
    groups: Sequence[Hashable],
    higher_is_better: bool = False,
    level: float = LEVEL,
) -> Interval:
    """Gives the drop in percent, positive is worse, with its interval over groups.

    mine, teacher: the metric of each sample under both models; groups: its scene. The drop is 100 (sum(mine) /
    sum(teacher) - 1), its standard error that of the linearised ratio with groups as clusters, the interval Student's
    with (groups - 1) degrees of freedom. Raises ValueError for lists of unlike length or none, and where the Teacher's
    values add up to 0 and the model's do not.
    """
    if not len(mine) == len(teacher) == len(groups) or not mine:
        raise ValueError(f"needs equally many values, got {len(mine)}, {len(teacher)} and {len(groups)}")
    total = math.fsum(teacher)
    if total == 0:
        if any(mine):
            raise ValueError(f"the drop is undefined: the teacher's value is 0 and the model's is {math.fsum(mine)}")
        return Interval(0.0, 0.0, 0.0, len(set(groups)))
    ratio = math.fsum(mine) / total
    residuals = _sums([m - ratio * t for m, t in zip(mine, teacher, strict=True)], groups)
    value = 100 * (ratio - 1)
    half = _half(residuals, level)
    if half is None:
        low = high = None
    else:
        half *= 100 / abs(total)
        low, high = value - half, value + half
    if higher_is_better:
        value, low, high = -value, None if high is None else -high, None if low is None else -low
    return Interval(value + 0.0, low, high, len(residuals))


def mean_interval(values: Sequence[float], groups: Sequence[Hashable], level: float = LEVEL) -> Interval:
    """Gives the mean of samples with its interval over groups, which may hold unlike numbers of samples.

    Raises ValueError for lists of unlike length or none.
    """
    if len(values) != len(groups) or not values:
        raise ValueError(f"needs equally many values and groups, got {len(values)} and {len(groups)}")
    mean = math.fsum(values) / len(values)
    residuals = _sums([value - mean for value in values], groups)
    half = _half(residuals, level)
    if half is None:
        return Interval(mean, None, None, len(residuals))
    half /= len(values)
    return Interval(mean, mean - half, mean + half, len(residuals))


def difference_interval(
    one: Sequence[float],
    other: Sequence[float],
    teacher: Sequence[float],
    groups: Sequence[Hashable],
    higher_is_better: bool = False,
    level: float = LEVEL,
) -> Interval:
    """Gives by how many points the drop of `one` exceeds that of `other`, paired sample by sample.

    All values are of the same samples, so what scenes have in common cancels. Positive: `one` is worse. Raises
    ValueError as `drop_interval` does, and for a Teacher whose values add up to 0.
    """
    if not len(one) == len(other) == len(teacher) == len(groups) or not one:
        raise ValueError("needs equally many values of both models, of the teacher, and groups")
    total = math.fsum(teacher)
    if total == 0:
        raise ValueError("the difference is undefined: the teacher's values are 0")
    differences = [a - b for a, b in zip(one, other, strict=True)]
    ratio = math.fsum(differences) / total
    residuals = _sums([d - ratio * t for d, t in zip(differences, teacher, strict=True)], groups)
    value, half = 100 * ratio, _half(residuals, level)
    sign = -1 if higher_is_better else 1
    if half is None:
        return Interval(sign * value, None, None, len(residuals))
    half *= 100 / abs(total)
    return Interval(sign * value, sign * value - half, sign * value + half, len(residuals))


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Gives the median of independent values with the interval of the sign test: two order statistics.

    Conover 1999, Practical Nonparametric Statistics, section 3.2. Its coverage is at least `level`; below 6 values no
    pair of order statistics reaches 95 %, and the ends are None. Raises ValueError for an empty list.
    """
    if not values:
        raise ValueError("needs at least one value")
    ordered = sorted(values)
    count = len(ordered)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    rank = _sign_rank(count, level)
    if rank is None:
        return Interval(middle, None, None, count)
    return Interval(middle, ordered[rank], ordered[count - 1 - rank], count)


def groups_to_decide(interval: Interval, limit: float) -> int | None:
    """Says about how many groups would put `limit` outside of the interval, if the value stays as it is.

    The width falls with the root of the number of groups. None where the value lies on the limit, or nothing is known.
    """
    half, away = interval.half, abs(interval.value - limit)
    if half is None or away == 0:
        return None
    needed = interval.groups * (half / away) ** 2
    return math.ceil(needed) if needed < 1e9 else None


def _sums(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    found: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        found.setdefault(group, []).append(value)
    return [math.fsum(each) for each in found.values()]


def _half(residuals: Sequence[float], level: float) -> float | None:
    """Half the width for a sum whose clusters left these residuals; None for a single cluster."""
    count = len(residuals)
    if count < 2:
        return None
    return t_quantile(0.5 + level / 2, count - 1) * math.sqrt(count / (count - 1) * math.fsum(r * r for r in residuals))


@cache
def t_quantile(share: float, freedom: int) -> float:
    """Gives the quantile of Student's t with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))


@cache
def _sign_rank(count: int, level: float) -> int | None:
    """Gives the rank r (from 0) for which [x_r, x_(n-1-r)] covers the median with at least `level`; None for none."""
    tail, rank = 0.0, -1
    for k in range(count // 2):
        tail += math.comb(count, k) * 0.5**count
        if 2 * tail > 1 - level:
            break
        rank = k
    return rank if rank >= 0 else None
