"""A figure of the paper: which runs are its lines, what is compared, and the numbers of it all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rtk.report.results import OOD, Result
from rtk.report.statistics import (
    Estimate,
    PairedTest,
    mean,
    paired_test,
    rank_correlation,
    summarize,
)
from rtk.report.study import Replicate, metric_name, short_name

LEVEL = 0.05  # of significance
_OF_A_TICKET = ("scheme", "granularity", "draw_task")  # which a dense network has none of
PanelKey = tuple[Any, ...]


@dataclass(frozen=True)
class Line:
    """A line of a figure.

    Args:
        label: in the legend.
        where: the columns of results.csv that its runs agree in, e.g. {"robust": True}. Dense
            networks, at sparsity 0, are of every line whose pretraining they have.
        against: label of the line that it is tested against, seed by seed; None for a baseline.
    """

    label: str
    where: Mapping[str, Any]
    against: str | None = None


@dataclass(frozen=True)
class Figure:
    """What is drawn of a set of results, and compared.

    Args:
        name: fig1, tab2, ...: of the folder it lands in.
        title: what it shows.
        claim: what the paper found.
        lines: at most seven, in the order of the legend.
        panels: the columns of results.csv that tell panels apart.
        metrics: top1, pgd_top1 (a row of panels for each attack), ood_auc (for each other set) or
            miou; by the first one of several strengths of pretraining is chosen.
        high: from this sparsity on it counts as high.
        scatter: what is drawn is the difference at high sparsity against the targets' distance,
            instead of lines over the sparsity.
    """

    name: str
    title: str
    claim: str
    lines: tuple[Line, ...]
    panels: tuple[str, ...] = ("arch", "target")
    metrics: tuple[str, ...] = ("top1",)
    high: float = 0.9
    scatter: bool = False


@dataclass(frozen=True)
class Measure:
    """One number of a result: a metric, and which attack's or which other set's."""

    metric: str
    attack: str | None = None

    @property
    def name(self) -> str:
        """What it is called, e.g. PGD top-1 (pgd-linf-0.1, 20 steps)."""
        return metric_name(self.metric) + (f" ({self.attack})" if self.attack else "")

    def of(self, result: Result) -> float | None:
        """Return the number, or None where the result has none."""
        if self.attack is not None and result.attack != self.attack:
            return None
        return result.value(self.metric)


@dataclass(frozen=True)
class Point:
    """A point of a line: one sparsity, over the seeds.

    Args:
        panel: the values of the figure's `panels`.
        measure: what is on the y axis.
        line: its label.
        pretrain: the pretraining, of several strengths the chosen one.
        sparsity: what was asked for.
        values: (pretraining seed, transfer seed) -> value.
        runs: the folders that the values were read from.
        test: against the line's baseline at this sparsity; None where there is none.
    """

    panel: PanelKey
    measure: Measure
    line: str
    pretrain: str
    sparsity: float
    values: Mapping[Replicate, float]
    runs: tuple[str, ...]
    test: PairedTest | None = None

    @property
    def estimate(self) -> Estimate:
        """Mean and sample standard deviation over the seeds."""
        found = summarize(self.values.values())
        assert found is not None
        return found


@dataclass(frozen=True)
class Comparison:
    """A line against its baseline, over many sparsities: each seed's mean difference is one pair.

    Args:
        panel: where.
        measure: of what.
        line: label of the line.
        against: label of its baseline.
        over: "all" the sparsities above 0, or the "high" ones.
        test: of the seeds' means.
        pretrain: the pretraining of the line.
    """

    panel: PanelKey
    measure: Measure
    line: str
    against: str
    over: str
    test: PairedTest
    pretrain: str

    @property
    def winner(self) -> str:
        """The label of the better line, or match where the t-test cannot tell them apart."""
        if self.test.t is None or self.test.t >= LEVEL:
            return "match"
        return self.line if self.test.difference.mean > 0 else self.against


@dataclass(frozen=True)
class FigureData:
    """The numbers of a figure.

    Args:
        figure: what it is.
        results: all that it is made from.
        measures: the rows of panels.
        panels: their columns, where there are distances the farthest target first.
        points: of all lines, in the order of the table.
        comparisons: over many sparsities.
        distances: target -> Fréchet distance from the source; empty where none was measured.
        features: what the distances were measured with.
    """

    figure: Figure
    results: Sequence[Result]
    measures: list[Measure]
    panels: list[PanelKey]
    points: list[Point]
    comparisons: list[Comparison]
    distances: Mapping[str, float] = field(default_factory=dict)
    features: str = ""

    def target(self, panel: PanelKey) -> str | None:
        """Return the panel's target, where panels are told apart by it."""
        names = self.figure.panels
        return panel[names.index("target")] if "target" in names else None

    def panel_name(self, panel: PanelKey) -> str:
        """Return the panel's title: what tells it from the others, and its distance."""
        if len(self.panels) > 1:
            columns = zip(*self.panels, strict=True)
            differing = [v for v, c in zip(panel, columns, strict=True) if len(set(c)) > 1]
        else:
            differing = list(panel)
        name = ", ".join(short_name(value) for value in differing if value is not None)
        distance = self.distances.get(self.target(panel) or "")
        return name if distance is None else f"{name}, distance {distance:.4g}"

    @property
    def correlation(self) -> tuple[float, float] | None:
        """Spearman's of distance and difference at high sparsity, with its p-value."""
        pairs = self.by_distance()
        return rank_correlation([d for d, _ in pairs], [c.test.difference.mean for _, c in pairs])

    def by_distance(self) -> list[tuple[float, Comparison]]:
        """Return (distance, comparison at high sparsity) of each target, the farthest first."""
        return [
            (self.distances[target], comparison)
            for comparison in self.comparisons
            if comparison.over == "high" and comparison.measure == self.measures[0]
            if (target := self.target(comparison.panel)) in self.distances and target is not None
        ]


def column(result: Result, name: str) -> Any:
    """Return a column of a result: a field, or of what else result.json holds."""
    return getattr(result, name) if hasattr(result, name) else result.extra.get(name)


def reduce_results(
    figure: Figure,
    results: Sequence[Result],
    distances: Mapping[str, float] | None = None,
    features: str = "",
) -> FigureData:
    """Return the numbers of `figure` out of its results.

    Args:
        figure: what to make of them.
        results: in the order in which panels appear; those of no line are left out.
        distances: target -> distance, if known.
        features: what the distances were measured with.
    """
    distances = distances or {}
    tickets = [result for result in results if result.scheme != "dense"] or list(results)
    panels = list(dict.fromkeys(tuple(column(r, n) for n in figure.panels) for r in tickets))
    if distances and "target" in figure.panels:
        place = figure.panels.index("target")
        panels.sort(key=lambda panel: -distances.get(panel[place], 0.0))
    measures = list(_measures(figure, results))
    points: list[Point] = []
    comparisons: list[Comparison] = []
    for measure in measures:
        for panel in panels:
            inside = [r for r in results if _matches(r, zip(figure.panels, panel, strict=True))]
            lines = {
                line.label: _points(figure, panel, measure, line, inside) for line in figure.lines
            }
            for line in figure.lines:
                ours = lines[line.label]
                if line.against is not None:
                    theirs = lines[line.against]
                    ours = {s: _tested(point, theirs.get(s)) for s, point in ours.items()}
                    comparisons += _comparisons(figure, line, ours, theirs)
                points += ours.values()
    return FigureData(figure, results, measures, panels, points, comparisons, distances, features)


def _measures(figure: Figure, results: Sequence[Result]) -> Iterable[Measure]:
    for metric in figure.metrics:
        if metric == "pgd_top1":
            attacks = dict.fromkeys(r.attack for r in results if r.pgd_top1 is not None)
            yield from (Measure(metric, attack) for attack in attacks)
        elif metric == "ood_auc":
            names = dict.fromkeys(name for r in results for name in r.ood_metrics)
            yield from (Measure(name) for name in names)
        else:
            yield Measure(metric)


def _matches(result: Result, where: Iterable[tuple[str, Any]]) -> bool:
    dense = result.scheme == "dense"
    return all(
        column(result, name) == value
        for name, value in where
        if not (dense and name in _OF_A_TICKET)
    )


def _points(
    figure: Figure, panel: PanelKey, measure: Measure, line: Line, inside: list[Result]
) -> dict[float, Point]:
    """Return sparsity -> point of a line in a panel, of several strengths the best one."""
    by_strength: dict[str, list[Result]] = defaultdict(list)
    for result in inside:
        if _matches(result, line.where.items()):
            by_strength[result.pretrain].append(result)
    if not by_strength:
        return {}
    strength = max(by_strength, key=lambda name: _least_pruned(figure, by_strength[name]))
    found: dict[float, list[tuple[Replicate, float, str]]] = defaultdict(list)
    for result in by_strength[strength]:
        value = measure.of(result)
        if value is not None:
            found[result.sparsity].append((result.replicate, value, result.run))
    return {
        sparsity: Point(
            panel,
            measure,
            line.label,
            strength,
            sparsity,
            {replicate: value for replicate, value, _ in values},
            tuple(run for _, _, run in values),
        )
        for sparsity, values in sorted(found.items())
    }


def _least_pruned(figure: Figure, results: list[Result]) -> float:
    """Return the mean of the first metric where least is pruned: by it a strength is chosen."""
    first = figure.metrics[0]
    least = min(result.sparsity for result in results)
    values = [result.value(first) for result in results if result.sparsity == least]
    known = [value for value in values if value is not None]
    return mean(known) if known else -1.0


def _tested(point: Point, baseline: Point | None) -> Point:
    if baseline is None:
        return point
    return replace(point, test=paired_test(point.values, baseline.values))


def _comparisons(
    figure: Figure, line: Line, ours: dict[float, Point], theirs: dict[float, Point]
) -> Iterable[Comparison]:
    assert line.against is not None
    for over, lowest in (("all", 0.0), ("high", figure.high)):
        differences: dict[Replicate, list[float]] = defaultdict(list)
        shared = [s for s in ours if s in theirs and s > 0 and s >= lowest]
        for sparsity in shared:
            for seed, value in ours[sparsity].values.items():
                if seed in theirs[sparsity].values:
                    differences[seed].append(value - theirs[sparsity].values[seed])
        means = {seed: mean(values) for seed, values in differences.items()}
        test = paired_test(means, dict.fromkeys(means, 0.0))
        if test is not None:
            first = ours[shared[0]]
            yield Comparison(
                first.panel, first.measure, line.label, line.against, over, test, first.pretrain
            )


def is_out_of_distribution(measure: Measure) -> bool:
    """Whether a measure is an area under a curve, not an accuracy."""
    return measure.metric.startswith(OOD)
