"""Gives quality numbers their 95 % interval: the drop over scenes, a mean over scenes, paired ratios over rounds.

Pairs of one scene repeat each other, so a scene is the unit that is resampled (a cluster): Miller 2024, arXiv
2411.00640, section 2.2. A drop is a ratio of sums, linearised as in Cochran 1977, Sampling Techniques, section 6.3.
With equally many pairs per scene the intervals cover as they say, from two scenes on; with 1 to 9 pairs in each of 3 to
8 scenes they cover in about 92 % instead of 95 % (tests/measure/test_intervals.py).
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
    found = _ratio(mine, teacher, groups, level)
    sign = -1 if higher_is_better else 1
    return _around(100 * sign * (found.value - 1), None if found.half is None else 100 * found.half, found.groups)


def mean_interval(values: Sequence[float], groups: Sequence[Hashable], level: float = LEVEL) -> Interval:
    """Gives the mean of samples with its interval over groups, which may hold unlike numbers of samples.

    Raises ValueError for lists of unlike length or none.
    """
    if len(values) != len(groups) or not values:
        raise ValueError(f"needs equally many values and groups, got {len(values)} and {len(groups)}")
    return _ratio(values, [1.0] * len(values), groups, level)


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
    if math.fsum(teacher) == 0:
        raise ValueError("the difference is undefined: the teacher's values are 0")
    found = _ratio([a - b for a, b in zip(one, other, strict=True)], teacher, groups, level)
    sign = -1 if higher_is_better else 1
    return _around(100 * sign * found.value, None if found.half is None else 100 * found.half, found.groups)


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


def within(found: Interval, limit: float) -> bool | None:
    """Says whether a value is at most `limit` away from 0, by its whole interval; None where it may or may not be.

    Where the interval is unknown the value alone decides.
    """
    if found.low is None or found.high is None:
        return abs(found.value) <= limit
    if max(abs(found.low), abs(found.high)) <= limit:
        return True
    return None if found.low <= limit and found.high >= -limit else False


def groups_to_decide(interval: Interval, limit: float) -> int | None:
    """Says about how many groups would put `limit` outside of the interval, if the value stays as it is.

    The width falls with the root of the number of groups. None where the value lies on the limit, or nothing is known.
    """
    half, away = interval.half, abs(interval.value - limit)
    if half is None or half >= 1e5 * away:  # more than any number below, or than a float can hold
        return None
    needed = interval.groups * (half / away) ** 2
    return math.ceil(needed) if needed < 1e9 else None


def _ratio(parts: Sequence[float], wholes: Sequence[float], groups: Sequence[Hashable], level: float) -> Interval:
    """Gives sum(parts) / sum(wholes) with its interval: se = sqrt(n / (n - 1) sum r_g^2) / sum(wholes), where r_g is
    the sum of p - ratio w over group g. No interval for a single group."""
    total = math.fsum(wholes)
    ratio = math.fsum(parts) / total
    residuals = _sums([p - ratio * w for p, w in zip(parts, wholes, strict=True)], groups)
    count = len(residuals)
    if count < 2:
        return Interval(ratio, None, None, count)
    error = math.sqrt(count / (count - 1) * math.fsum(r * r for r in residuals)) / abs(total)
    return _around(ratio, t_quantile(0.5 + level / 2, count - 1) * error, count)


def _around(value: float, half: float | None, groups: int) -> Interval:
    value += 0.0  # -0.0 would print as one
    return Interval(value, None, None, groups) if half is None else Interval(value, value - half, value + half, groups)


def _sums(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    found: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        found.setdefault(group, []).append(value)
    return [math.fsum(each) for each in found.values()]


@cache
def t_quantile(share: float, freedom: float) -> float:
    """Gives the quantile of Student's t with so many degrees of freedom."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, share))


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
