"""Draws one panel, accuracy against sparsity, into matplotlib axes."""

from __future__ import annotations

import itertools
import math
import textwrap

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rtk.report.study import Panel, Setting, Study

# Okabe and Ito's palette, which the common colour blindnesses tell apart; without its yellow,
# which white swallows. Markers differ too, for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", ":", "-.")
INK, GREY, GRID = "#222222", "#666666", "#e3e3e3"
SIZE = 9  # of the text, in points

_SMALLEST_SPAN = 4.0  # percent on the y axis: less would blow noise up to a trend
_FIRST_LABELS = (0.9, 0.5, 0.95, 0.8, 0.98, 0.7)  # which sparsities a reader looks for
_SIDE_STEP = 0.08  # on the x axis, between variants that no line tells apart


def sparsity_position(sparsity: float) -> float:
    """Return where a sparsity lies on the x axis: -log10(1 - s), so 0, 90, 99 % are 0, 1, 2."""
    return -math.log10(1 - sparsity)


def draw_panel(
    axes: Axes, study: Study, panel: Panel, metric: str, inches: float, small: bool = False
) -> None:
    """Draw a line per scheme and variant: means, bands and, unless `small`, single seeds.

    Args:
        axes: to draw into.
        study: has the numbers.
        panel: which of them.
        metric: one of `study.metrics`.
        inches: width of the axes, for the labels that fit.
        small: one of many in a figure, so with less in it.
    """
    series = study.series(panel)
    for style, settings in zip(itertools.cycle(STYLES), series.values(), strict=False):
        for variant in study.variants:
            _draw_series(axes, study, settings, variant, metric, style, small)
    set_sparsity_ticks(axes, sorted({s.sparsity for line in series.values() for s in line}), inches)
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """Give axes a light grid, two spines and small grey ticks."""
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color=GREY, labelcolor=INK, labelsize=SIZE - 1)
    axes.tick_params(which="minor", length=2, color=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def _draw_series(
    axes: Axes,
    study: Study,
    settings: list[Setting],
    variant: str,
    metric: str,
    style: str,
    small: bool,
) -> None:
    """Draw the means as a line, their standard deviations as a band, the seeds as faint dots."""
    index = study.variants.index(variant)
    colour = COLOURS[index % len(COLOURS)]
    step = _SIDE_STEP * (index - (len(study.variants) - 1) / 2) if len(settings) == 1 else 0
    x, means, stds = [], [], []
    for setting in settings:
        estimate = study.estimate(setting, variant, metric)
        if estimate is None:
            continue
        x.append(sparsity_position(setting.sparsity) + step)
        means.append(100 * estimate.mean)
        stds.append(100 * (estimate.spread or 0))
        if estimate.n > 1 and not small:
            seeds = [100 * value for value in study.values(setting, variant, metric).values()]
            axes.scatter([x[-1]] * len(seeds), seeds, s=8, color=colour, alpha=0.4, lw=0, zorder=2)
    marker = MARKERS[index % len(MARKERS)]
    (line,) = axes.plot(x, means, style, color=colour, marker=marker, lw=1.6, zorder=3)
    line.set(markersize=4.5 if small else 5.5, markeredgecolor="white", markeredgewidth=0.6)
    if len(x) == 1:
        axes.errorbar(x, means, yerr=stds, fmt="none", ecolor=colour, lw=1.2, zorder=2)
    elif any(stds):
        low = [m - s for m, s in zip(means, stds, strict=True)]
        high = [m + s for m, s in zip(means, stds, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.13, lw=0, zorder=1)


def set_sparsity_ticks(axes: Axes, sparsities: list[float], inches: float) -> None:
    """Label the sparsities that occur, as far as the labels do not touch; a small tick else."""
    where = {sparsity: sparsity_position(sparsity) for sparsity in sparsities}
    left, right = where[sparsities[0]], where[sparsities[-1]]
    pad = 0.05 * (right - left) or 0.3
    texts = {sparsity: f"{100 * sparsity:.4g}" for sparsity in sparsities}
    digit = 0.6 * (SIZE - 1) / 72  # inches
    room = (max(map(len, texts.values())) + 1) * digit * (right - left + 2 * pad) / inches
    shown: list[float] = []
    wanted = [sparsities[-1], sparsities[0], *_FIRST_LABELS, *reversed(sparsities)]
    for sparsity in dict.fromkeys(s for s in wanted if s in where):
        if all(abs(where[sparsity] - where[other]) >= room for other in shown):
            shown.append(sparsity)
    axes.set_xlim(left - pad, right + pad)
    axes.set_xticks([where[s] for s in shown], [texts[s] for s in shown])
    axes.set_xticks([where[s] for s in sparsities if s not in shown], minor=True)


def set_limits(axes: Axes) -> None:
    """Widen the y axis to a few percent at least, and end it at 0 and 100 %."""
    low, high = axes.get_ylim()
    missing = max(0.0, _SMALLEST_SPAN - (high - low)) / 2
    axes.set_ylim(max(-1.0, low - missing), min(101.0, high + missing))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))


def _legend_columns(labels: list[str], points: float, most: int) -> int:
    """Return how many columns fit, `most` at most; each is as wide as its longest label."""
    for columns in range(most, 1, -1):
        parts = numpy.array_split([len(label) for label in labels], columns)
        if sum(0.6 * SIZE * max(part) + 40 for part in parts) <= points:
            return columns
    return 1


def _blank() -> Line2D:
    return Line2D([], [], ls="none", label=" ")


def add_legend(figure: Figure, study: Study, panels: list[Panel], caption: str) -> None:
    """Name the variants (colour, marker) and, where there are several, the schemes (line).

    Above them `caption`, in small print, says what the marks mean.
    """
    handles = [
        Line2D([], [], color=COLOURS[i % 7], marker=MARKERS[i % 7], ms=5.5, mec="white", label=name)
        for i, name in enumerate(study.variants)
    ]
    schemes = list(dict.fromkeys(s for panel in panels for s in study.series(panel)))
    most = len(handles)
    if len(schemes) > 1:  # in a column of their own, so both are filled up to one length
        lines = [
            Line2D([], [], color=GREY, ls=style, lw=1.6, label=scheme)
            for style, scheme in zip(itertools.cycle(STYLES), schemes, strict=False)
        ]
        missing = len(lines) - len(handles)
        handles += [_blank() for _ in range(missing)] + lines + [_blank() for _ in range(-missing)]
        most = 2
    labels = [str(handle.get_label()) for handle in handles]
    width, height = figure.get_size_inches()
    columns = _legend_columns(labels, width * 72, most)
    extra_rows = math.ceil(len(labels) / columns) - 1
    figure.set_size_inches(width, height + 0.2 * extra_rows)  # so that axes keep their height
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=SIZE,
        labelcolor=INK,
        title=textwrap.fill(caption, int(width * 72 / (0.56 * (SIZE - 1)))),
        title_fontsize=SIZE - 1,
        alignment="left",
    )
    legend.get_title().set_color(GREY)
