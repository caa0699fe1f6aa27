"""Gives a number of a whole set a value for each of its samples, by the jackknife: `set_values`."""

from __future__ import annotations

import math
from collections.abc import Sequence


def set_values(whole: float, without: Sequence[float]) -> list[float]:
    """Returns a value per sample of a number that is no mean over samples; their mean is the number itself.

    whole: the number of all n samples. without: of the set without each sample in turn, nan where that leaves nothing
    to compute it from: such a sample then counts as one that changes nothing. With m the mean of `without`, a value is
    whole + (n - 1) (m - without_i), and the standard error of the mean of the values, as of n independent ones, is the
    jackknife's: sqrt((n - 1) / n sum((without_i - m)^2)) (Efron & Stein 1981, Annals of Statistics 9, 586; Efron &
    Tibshirani 1993, An Introduction to the Bootstrap, chapter 11). These are Tukey's pseudo-values, moved so that their
    mean is `whole` instead of the estimate that the jackknife corrects for bias. So means, and differences and ratios
    of means of the same samples, have the intervals of `pqk.stats.intervals`. A value by itself may lie outside of the
    number's range. The number must change little by one sample: the jackknife fails for medians.
    """
    left = [whole if math.isnan(each) else each for each in without]
    mean = math.fsum(left) / len(left)
    return [whole + (len(left) - 1) * (mean - each) for each in left]
