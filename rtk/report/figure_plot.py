"""Draws a figure of the paper: lines over the sparsity, or a difference over the distance."""

from __future__ import annotations

import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from rtk.report.axes import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    SIZE,
    STYLES,
    set_limits,
    set_sparsity_ticks,
    sparsity_position,
    style_axes,
)
from rtk.report.figure import (
    FigureData,
    Measure,
    PanelKey,
    is_out_of_distribution,
)
from rtk.report.plots import DPI
from rtk.report.results import MIOU
from rtk.report.study import short_name

_COLUMNS = (4, 3)  # panels beside each other: what leaves fewer gaps in the last row
_WIDTH, _HEIGHT = 3.3, 2.7  # of a panel, in inches


def draw_figure(data: FigureData) -> Canvas:
    """Return the plot of `data`."""
    return _scatter(data) if data.figure.scatter else _lines(data)


def _y_label(measure: Measure) -> str:
    plain = measure.metric == MIOU or is_out_of_distribution(measure)
    name = measure.name.split(" (")[0]
    return f"{name}{'' if plain else ' accuracy'} (%)"


def _lines(data: FigureData) -> Canvas:
    """Draw panels in columns, and for each measure a row of them."""
    count = len(data.panels)
    columns = min(count, min(_COLUMNS, key=lambda n: -count % n))
    rows = math.ceil(count / columns)
    width, height = max(5.0, 0.5 + _WIDTH * columns), 0.8 + _HEIGHT * rows * len(data.measures)
    canvas = Canvas(figsize=(width, height), dpi=DPI, layout="constrained")
    grid = canvas.subplots(rows * len(data.measures), columns, squeeze=False)
    inches = (width - 0.5) / columns - 0.6
    for axes in grid.flat:
        axes.set_visible(False)
    for i, measure in enumerate(data.measures):
        for j, panel in enumerate(data.panels):
            axes = grid[i * rows + j // columns, j % columns]
            axes.set_visible(_draw_panel(axes, data, panel, measure, inches))
            if j % columns == 0:
                axes.set_ylabel(_y_label(measure), fontsize=SIZE, color=INK)
            if i == len(data.measures) - 1 and j + columns >= count:  # the lowest of its column
                axes.set_xlabel("sparsity (%)", fontsize=SIZE, color=INK)
    canvas.suptitle(
        textwrap.fill(data.figure.title, int(width * 10)),
        x=0.01,
        ha="left",
        fontsize=SIZE + 1,
        fontweight="bold",
        color=INK,
    )
    handles = [
        Line2D([], [], color=c, marker=m, ls=s, ms=5, mec="white", label=line.label)
        for line, (c, m, s) in zip(data.figure.lines, _looks(data), strict=True)
    ]
    canvas.legend(
        handles=handles,
        loc="outside lower left",
        ncols=min(len(handles), int(width / 1.8)),
        frameon=False,
        fontsize=SIZE,
        labelcolor=INK,
        alignment="left",
    )
    return canvas


def _looks(data: FigureData) -> list[tuple[str, str, str]]:
    """Return colour, marker and dashes of each line: baselines are dashed."""
    return [
        (COLOURS[i % 7], MARKERS[i % 7], STYLES[1 if line.against is None else 0])
        for i, line in enumerate(data.figure.lines)
    ]


def _draw_panel(
    axes: Axes, data: FigureData, panel: PanelKey, measure: Measure, inches: float
) -> bool:
    """Draw means, bands of a standard deviation and single seeds; return whether there are any."""
    seen: set[float] = set()
    for line, (colour, marker, style) in zip(data.figure.lines, _looks(data), strict=True):
        points = [
            p for p in data.points if (p.panel, p.measure, p.line) == (panel, measure, line.label)
        ]
        if not points:
            continue
        x = [sparsity_position(point.sparsity) for point in points]
        means = [100 * point.estimate.mean for point in points]
        stds = [100 * (point.estimate.spread or 0) for point in points]
        axes.plot(
            x, means, style, color=colour, marker=marker, ms=4.5, lw=1.6, mec="white", zorder=3
        )
        low, high = zip(*((m - s, m + s) for m, s in zip(means, stds, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.13, lw=0, zorder=1)
        for place, point in zip(x, points, strict=True):
            seeds = [100 * value for value in point.values.values()]
            axes.scatter([place] * len(seeds), seeds, s=6, color=colour, alpha=0.35, lw=0, zorder=2)
        seen |= {point.sparsity for point in points}
    if seen:
        set_sparsity_ticks(axes, sorted(seen), inches)
        set_limits(axes)
    style_axes(axes)
    title = textwrap.fill(data.panel_name(panel), int(inches * 72 / SIZE / 0.55))
    if measure.attack is not None or is_out_of_distribution(measure):
        title += f"\n{measure.attack or measure.name}"
    axes.set_title(title, loc="left", fontsize=SIZE, fontweight="bold", color=INK)
    return bool(seen)


def _scatter(data: FigureData) -> Canvas:
    """Draw the difference at high sparsity against the distance, a point a target."""
    canvas = Canvas(figsize=(6.4, 4.4), dpi=DPI, layout="constrained")
    axes = canvas.subplots()
    axes.axhline(0, color=GREY, lw=0.8)
    for distance, comparison in data.by_distance():
        difference = comparison.test.difference
        colour = COLOURS[{comparison.line: 1, comparison.against: 0}.get(comparison.winner, 6)]
        axes.errorbar(
            [distance],
            [100 * difference.mean],
            yerr=[100 * (difference.spread or 0)],
            color=colour,
            marker="o",
            ms=5,
            capsize=2,
            lw=1.2,
        )
        axes.annotate(
            short_name(data.target(comparison.panel)),
            (distance, 100 * difference.mean),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=SIZE - 2,
            color=INK,
        )
    style_axes(axes)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("Fréchet distance from the source", fontsize=SIZE, color=INK)
    lines = next(line for line in data.figure.lines if line.against)
    axes.set_ylabel(f"{lines.label} - {lines.against} (points)", fontsize=SIZE, color=INK)
    axes.set_title(
        textwrap.fill(data.figure.title, 62),
        loc="left",
        fontsize=SIZE + 1,
        fontweight="bold",
        color=INK,
    )
    return canvas
