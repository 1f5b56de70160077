"""The statistics that tables and plots show: means, their spread, paired differences."""

from __future__ import annotations

import math
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
