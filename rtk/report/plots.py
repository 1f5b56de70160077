"""Plots of accuracy against sparsity: the mean over seeds, its spread, and every seed.

Figures are made and saved without pyplot, so that a caller's figures, backend and interactive
state stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from rtk.report.axes import INK, SIZE, add_legend, draw_panel, set_limits
from rtk.report.results import MIOU, OOD
from rtk.report.study import Panel, Study, metric_name
from rtk.report.table import percent
from rtk.runs import atomic_write

DPI = 150
_WIDTH, _HEIGHT = 6.0, 4.0  # of a plot, in inches
_COLUMNS = 4  # panels beside each other in the overview
_X_LABEL = "sparsity (%), log scale of the weights left"


@dataclass(frozen=True)
class Plot:
    """A plot that was written.

    Args:
        path: of the PNG.
        png: its bytes.
        inches: its width where its text has the size of a page's.
        alt: what it shows, for those who cannot see it.
        panel: what it is about; None for the overview.
    """

    path: Path
    png: bytes
    inches: float
    alt: str
    panel: Panel | None


def _caption(study: Study, panels: list[Panel], metrics: list[str], dots: bool) -> str:
    """Return what the marks mean, and which attack was run if a metric has one."""
    lines = [line for panel in panels for line in study.series(panel).values()]
    settings = [setting for line in lines for setting in line]
    seeds = {study.seeds(s, v) for s in settings for v in study.variants} - {0}
    if max(seeds) > 1:
        number = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
        parts = [f"mean over {number} seeds, band ± 1 standard deviation"]
        parts += ["dots: single seeds"] if dots else []
    else:
        parts = ["one seed"]
    attacks = study.distinct("attack")
    if "pgd_top1" in metrics and attacks and "attack" not in study.varying:
        parts.append(f"PGD: {attacks[0]}")
    return ", ".join(parts)


def _y_label(metric: str) -> str:
    accuracy = "" if metric == MIOU or metric.startswith(OOD) else " accuracy"
    return f"{metric_name(metric)}{accuracy} (%)"


def accuracy_figure(study: Study, panel: Panel, metric: str) -> Figure:
    """Return the plot of one of the `metrics` of `study` in one of its panels."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    draw_panel(axes, study, panel, metric, _WIDTH - 0.8)
    set_limits(axes)
    axes.set_xlabel(_X_LABEL, fontsize=SIZE, color=INK)
    axes.set_ylabel(_y_label(metric), fontsize=SIZE, color=INK)
    schemes = [scheme for scheme in study.series(panel) if scheme != "dense"]
    title = ", ".join(panel.names + (schemes if len(schemes) == 1 else []))
    axes.set_title(
        textwrap.fill(title, 62), loc="left", fontsize=SIZE + 1, fontweight="bold", color=INK
    )
    add_legend(figure, study, [panel], _caption(study, [panel], [metric], dots=True))
    return figure


def _strips(study: Study) -> list[list[Panel]]:
    """Return what stands beside each other: a target's panels, or targets that have one each.

    Segmentations, which have metrics of their own, are never beside others.
    """
    panels = sorted(study.panels, key=lambda panel: study.panel_metrics(panel) == [MIOU])
    by_target = [list(group) for _, group in groupby(panels, key=lambda p: (p.target, p.context))]
    if all(len(group) == 1 for group in by_target):
        by_target = [list(group) for _, group in groupby(panels, key=study.panel_metrics)]
    return [group[i : i + _COLUMNS] for group in by_target for i in range(0, len(group), _COLUMNS)]


def overview_figure(study: Study) -> Figure:
    """Return all panels of `study`: rows metric, columns transfer and granularity."""
    strips = _strips(study)
    rows = [(strip, metric) for strip in strips for metric in study.panel_metrics(strip[0])]
    columns = max(map(len, strips))
    width, height = max(5.0, 0.7 + 2.9 * columns), 0.9 + 2.3 * len(rows)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    inches = (width - 0.7) / columns - 0.3
    first = study.panels[0].names
    shared = [name for name in first if all(name in panel.names for panel in study.panels)]
    for axes_row, (strip, metric) in zip(grid, rows, strict=True):
        for axes, panel in zip(axes_row, strip, strict=False):
            draw_panel(axes, study, panel, metric, inches, small=True)
            metrics = study.panel_metrics(strip[0])
            if metric == metrics[0]:
                title = ", ".join(name for name in panel.names if name not in shared)
                title = textwrap.fill(title, int(inches * 72 / SIZE / 0.6))
                axes.set_title(title, loc="left", fontsize=SIZE, fontweight="bold", color=INK)
            if metric == metrics[-1]:
                axes.set_xlabel("sparsity (%)", fontsize=SIZE, color=INK)
        for axes in axes_row[len(strip) :]:
            axes.set_visible(False)
        set_limits(axes_row[0])
        axes_row[0].set_ylabel(_y_label(metric), fontsize=SIZE, color=INK)
    if shared:
        title = textwrap.fill(", ".join(shared), int(width * 10))
        style = {"fontsize": SIZE + 1, "fontweight": "bold", "color": INK}
        figure.suptitle(title, x=0.01, ha="left", **style)
    caption = _caption(study, study.panels, study.metrics, dots=False)
    add_legend(figure, study, study.panels, caption)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return `figure` as a PNG."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name with a $ is a name, not a formula
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def describe(study: Study, panel: Panel, metric: str) -> str:
    """Return the plot's alternative text: what it shows, and the numbers at both ends."""
    parts = []
    for scheme, settings in study.series(panel).items():
        for variant in study.variants:
            ends = []
            for setting in dict.fromkeys([settings[0], settings[-1]]):
                estimate = study.estimate(setting, variant, metric)
                if estimate:
                    where = percent(setting.sparsity)
                    ends.append(f"{100 * estimate.mean:.1f} % at {where} sparsity")
            parts.append(f"{variant} ({scheme}): {', '.join(ends) or 'no data'}")
    what = f"{_y_label(metric)} against sparsity, {', '.join(panel.names)}"
    return f"{what}. {'; '.join(parts)}."


def file_name(panel: Panel, metric: str) -> str:
    """Return the plot's file name: its panel in safe characters, made unique by a hash if cut."""
    parts = [panel.target, *panel.context, panel.transfer or "pretrained", panel.granularity]
    names = [part or "dense" for part in [*parts, metric]]
    slug = "_".join(re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") for name in names)
    plain = all(re.fullmatch(r"[A-Za-z0-9._\[\]-]+", name) for name in names)
    if len(slug) > 100 or not plain:
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:6]
        slug = f"{slug[:90]}-{digest}"
    return f"{slug}.png"


def _plot(path: Path, figure: Figure, alt: str, panel: Panel | None) -> Plot:
    return Plot(path, to_png(figure), figure.get_size_inches()[0], alt, panel)


def write_plots(study: Study, folder: Path) -> list[Plot]:
    """Write the overview and a plot per panel and metric into `folder`; the overview is first."""
    alt = f"Overview: {len(study.panels)} panels of accuracy against sparsity, each a plot below."
    plots = [_plot(folder / "overview.png", overview_figure(study), alt, None)]
    for panel in study.panels:
        for metric in study.metrics:
            settings = [setting for line in study.series(panel).values() for setting in line]
            if any(study.estimate(s, v, metric) for s in settings for v in study.variants):
                path = folder / file_name(panel, metric)
                figure = accuracy_figure(study, panel, metric)
                plots.append(_plot(path, figure, describe(study, panel, metric), panel))
    for plot in plots:
        atomic_write(plot.path, plot.png)
    return plots
