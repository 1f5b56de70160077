"""The table of a figure: every point with its spread and its test, and what was compared."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rtk.report.figure import Comparison, FigureData
from rtk.report.statistics import Estimate, PairedTest
from rtk.report.table import percent

COLUMNS = (
    "metric",
    "sparsity",
    "line",
    "pretraining",
    "mean",
    "sd",
    "n",
    "against",
    "difference",
    "se",
    "pairs",
    "p (t-test)",
    "p (Wilcoxon)",
    "runs",
)


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def table_csv(data: FigureData) -> str:
    """Return a row per point: fractions unrounded, and the folders that they come from."""
    baselines = {line.label: line.against for line in data.figure.lines}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*data.figure.panels, "distance", *COLUMNS])
    for point in data.points:
        estimate, test = point.estimate, point.test
        distance = data.distances.get(data.target(point.panel) or "")
        compared = ["", "", "", "", "", ""]
        if test is not None:
            compared = [
                baselines[point.line] or "",
                _exact(test.difference.mean),
                _exact(test.difference.spread),
                str(test.n),
                _exact(test.t),
                _exact(test.wilcoxon),
            ]
        writer.writerow(
            [
                *("" if value is None else value for value in point.panel),
                _exact(distance),
                point.measure.name,
                _exact(point.sparsity),
                point.line,
                point.pretrain,
                _exact(estimate.mean),
                _exact(estimate.spread),
                estimate.n,
                *compared,
                " ".join(point.runs),
            ]
        )
    return buffer.getvalue()


def plus_minus(estimate: Estimate, sign: str = "") -> str:
    """Return a fraction in percent, or a difference in points, with what stands after its ±."""
    number = f"{100 * estimate.mean:{sign}.2f}"
    return number if estimate.spread is None else f"{number} ± {100 * estimate.spread:.2f}"


def p_value(p: float | None) -> str:
    """Return a p-value as text: two digits, < 0.001, or - where there is none."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _test(test: PairedTest | None) -> list[str]:
    if test is None:
        return ["", "", "", ""]
    difference = plus_minus(test.difference, "+")
    return [difference, str(test.n), p_value(test.t), p_value(test.wilcoxon)]


POINT_HEADS = (
    "panel",
    "metric",
    "sparsity",
    "line",
    "pretraining",
    "mean ± sd (%)",
    "n",
    "difference ± se (points)",
    "pairs",
    "p, t-test",
    "p, Wilcoxon",
)


def point_rows(data: FigureData) -> list[list[str]]:
    """Return the rows under POINT_HEADS, in percent and points."""
    return [
        [
            data.panel_name(point.panel),
            point.measure.name,
            percent(point.sparsity),
            point.line,
            point.pretrain,
            plus_minus(point.estimate),
            str(point.estimate.n),
            *_test(point.test),
        ]
        for point in data.points
    ]


COMPARISON_HEADS = (
    "panel",
    "metric",
    "line",
    "against",
    "sparsities",
    "difference ± se (points)",
    "pairs",
    "p, t-test",
    "p, Wilcoxon",
    "ahead",
)


def _over(data: FigureData, comparison: Comparison) -> str:
    return "all" if comparison.over == "all" else f"from {percent(data.figure.high)}"


def comparison_rows(data: FigureData) -> list[list[str]]:
    """Return the rows under COMPARISON_HEADS."""
    return [
        [
            data.panel_name(comparison.panel),
            comparison.measure.name,
            comparison.line,
            comparison.against,
            _over(data, comparison),
            *_test(comparison.test),
            comparison.winner,
        ]
        for comparison in data.comparisons
    ]


def sentences(data: FigureData) -> list[str]:
    """Return what came out, in a sentence for each measure and line that is compared."""
    found = []
    for measure in data.measures:
        for line in data.figure.lines:
            tests = [
                point.test
                for point in data.points
                if (point.measure, point.line) == (measure, line.label) and point.test
            ]
            if not tests:
                continue
            ahead = sum(test.difference.mean > 0 for test in tests)
            clear = [test for test in tests if test.t is not None and test.t < 0.05]
            over = [
                c
                for c in data.comparisons
                if (c.measure, c.line, c.over) == (measure, line.label, "all")
            ]
            won = sum(c.winner == line.label for c in over)
            lost = sum(c.winner == line.against for c in over)
            found.append(
                f"{measure.name}: {line.label} is ahead of {line.against} at {ahead} of "
                f"{len(tests)} points, by p < 0.05 at "
                f"{sum(t.difference.mean > 0 for t in clear)} and behind at "
                f"{sum(t.difference.mean < 0 for t in clear)}; over all sparsities it wins "
                f"{won} of {len(over)} panels, loses {lost} and matches {len(over) - won - lost}."
            )
    if data.correlation is not None:
        coefficient, p = data.correlation
        found.append(
            f"The farther the target, the more robust tickets gain: rank correlation "
            f"{coefficient:+.2f} over {len(data.by_distance())} targets, p {p_value(p)}."
            if coefficient > 0
            else f"Robust tickets do not gain with the target's distance: rank correlation "
            f"{coefficient:+.2f} over {len(data.by_distance())} targets, p {p_value(p)}."
        )
    return found


def notes(data: FigureData) -> list[str]:
    """Return what the numbers mean, and what weakens them."""
    texts = [
        "n counts seeds; sd: sample standard deviation over them. Differences are paired by "
        "pretraining and transfer seed; se: their standard error. Wilcoxon's test cannot fall "
        "under 0.05 below six pairs.",
        "Over many sparsities a pair is a seed's mean difference, sparsity 0 left out; ahead is "
        "who wins by p < 0.05 in the t-test, else it is a match. Nothing is corrected for the "
        "number of tests.",
    ]
    pretrained = {seed for point in data.points for seed, _ in point.values}
    pairs = [point.test.n for point in data.points if point.test]
    if pairs and max(pairs) > len(pretrained):
        texts.append(
            f"The pairs share {len(pretrained)} pretraining seed"
            f"{'s' if len(pretrained) > 1 else ''}, so they are not independent and the "
            "p-values are too small."
        )
    strengths = {
        line.label: {r.pretrain for r in data.results if r.robust}
        for line in data.figure.lines
        if "pretrain" not in line.where and line.where.get("robust")
    }
    if any(len(names) > 1 for names in strengths.values()):
        names = ", ".join(sorted(set().union(*strengths.values())))
        texts.append(
            f"Of the strengths of pretraining ({names}) each panel shows the one that is best "
            "where least is pruned, on the same test images, as the paper chooses after Salman et "
            "al. 2020: a choice that favours robust."
        )
    if data.features:
        texts.append(f"Distances are in {data.features}.")
    return texts


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    )
