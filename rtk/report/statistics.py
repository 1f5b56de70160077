"""The statistics that tables and plots show: means, their spread, paired differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: in the unit of the values.
        spread: what stands after ±, in the same unit; None where one value gives none.
        n: number of values, at least 1.
    """

    mean: float
    spread: float | None
    n: int


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean of at least one value."""
    values = list(values)
    return math.fsum(values) / len(values)


def sample_std(values: Iterable[float]) -> float | None:
    """Return sqrt(sum (x - mean)^2 / (n - 1)), or None for fewer than two values."""
    values = list(values)
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def summarize(values: Iterable[float]) -> Estimate | None:
    """Return mean and sample standard deviation, or None for no values."""
    values = list(values)
    return Estimate(mean(values), sample_std(values), len(values)) if values else None


def paired_difference(ours: Mapping[K, float], theirs: Mapping[K, float]) -> Estimate | None:
    """Return the mean of ours - theirs over the seeds that both have, and its standard error.

    The error is sample_std(differences) / sqrt(n): what both sides of a pair share (the data
    order, the start of the new classifier) cancels, which two separate errors would count twice.

    Args:
        ours: seed -> value.
        theirs: seed -> value.

    Returns:
        The estimate, its spread None for a single pair; None where no seed is in both.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    std = sample_std(differences)
    error = None if std is None else std / math.sqrt(len(differences))
    return Estimate(mean(differences), error, len(differences))


@dataclass(frozen=True)
class PairedTest:
    """Ours against theirs over the seeds that both have.

    Args:
        difference: mean of ours - theirs; its spread is the standard error.
        t: two-sided p-value of the paired t-test; None where it has none: a single pair, or
            differences that are all the same.
        wilcoxon: of the signed-rank test, likewise, which assumes no normal distribution. Below
            six pairs it cannot fall under 0.05.
    """

    difference: Estimate
    t: float | None
    wilcoxon: float | None

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.difference.n


def paired_test(ours: Mapping[K, float], theirs: Mapping[K, float]) -> PairedTest | None:
    """Return the paired difference with scipy's tests of it, or None where no seed is in both.

    Pairs that share a pretrained network are not independent, which makes a p-value too small.
    """
    difference = paired_difference(ours, theirs)
    if difference is None:
        return None
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if len({a - b for a, b in pairs}) < 2:
        return PairedTest(difference, None, None)
    from scipy import stats  # costs half a second

    first, second = (list(side) for side in zip(*pairs, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of precision, where differences are nearly the same
        t = float(stats.ttest_rel(first, second).pvalue)
        rank = float(stats.wilcoxon(first, second).pvalue)
    return PairedTest(difference, *(p if math.isfinite(p) else None for p in (t, rank)))


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float] | None:
    """Return Spearman's coefficient and its p-value; None for fewer than three or equal values."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    from scipy import stats

    found = stats.spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)
