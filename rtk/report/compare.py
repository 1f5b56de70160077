"""Two folders of kept figures side by side: does a second run give the numbers of the first?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk.errors import RtkError
from rtk.report.figure import Point, reduce_results
from rtk.report.figure_table import text_table
from rtk.report.kept import read_kept
from rtk.report.paper import PAPER

_WIDE = 2.0  # standard errors of a difference of means; beyond lies a point in 20 by chance


@dataclass(frozen=True)
class Agreement:
    """How near a second run of a figure came to the first.

    Args:
        name: of the figure.
        points: that both have.
        within: whose means differ by at most two standard errors of the difference, sqrt((sd1^2 +
            sd2^2) / n).
        largest: difference of means, in the unit of the values.
        typical: mean of the standard deviations over the seeds, of the first.
    """

    name: str
    points: int
    within: int
    largest: float
    typical: float


def agreement(folder: str | Path, other: str | Path) -> list[Agreement]:
    """Compare the figures that both folders have, point by point.

    Raises:
        RtkError: where they have no figure in common, or a file is damaged.
    """
    found = []
    for name in PAPER:
        paths = [Path(each) / f"{name}.csv" for each in (folder, other)]
        if all(path.is_file() for path in paths):
            first, second = (_points(path) for path in paths)
            shared = [(point, second[key]) for key, point in first.items() if key in second]
            if shared:
                found.append(_agreement(name, shared))
    if not found:
        raise RtkError(f"report: {folder} and {other} have no kept figure in common")
    return found


def compare_kept(folder: str | Path, other: str | Path) -> str:
    """Return `agreement` as a text table, in percent and points."""
    heads = ("figure", "points", "within 2 se", "largest difference", "sd over seeds")
    rows = [
        (
            each.name,
            str(each.points),
            str(each.within),
            f"{100 * each.largest:.2f}",
            f"{100 * each.typical:.2f}",
        )
        for each in agreement(folder, other)
    ]
    return text_table(heads, rows)


def _points(path: Path) -> Mapping[Any, Point]:
    kept = read_kept(path)
    data = reduce_results(kept.figure, kept.results, kept.distances, kept.features)
    return {(p.panel, p.measure, p.line, p.pretrain, p.sparsity): p for p in data.points}


def _agreement(name: str, shared: list[tuple[Point, Point]]) -> Agreement:
    differences, within = [], 0
    spreads = [ours.estimate.spread or 0.0 for ours, _ in shared]
    for ours, theirs in shared:
        a, b = ours.estimate, theirs.estimate
        difference = abs(a.mean - b.mean)
        error = math.sqrt((a.spread or 0.0) ** 2 / a.n + (b.spread or 0.0) ** 2 / b.n)
        differences.append(difference)
        within += difference <= _WIDE * error
    return Agreement(name, len(shared), within, max(differences), sum(spreads) / len(spreads))
