"""Plots of bench/masked_conv2d_sweep.py's table: speed-up against density, one PNG a direction.

python bench/plot_masked_conv2d.py bench/results/<gpu>/masked_conv2d.json [--out FOLDER]

A panel is a granularity, a line the geometric mean over a network's 3x3 or 1x1 shapes, each counted
once; the stems are left out. Solid lines are against cuDNN on ready masked weights, dashed ones
against `F.conv2d(x, w * m)`. A shape that has too few groups for a density, so that its mask keeps
half as much again or less than two thirds of it, is left out there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Row = dict[str, Any]
WAYS = {"forward": "forward", "input": "input gradient", "weight": "weight gradient"}
# Title, granularity, what is timed.
PANELS = (
    ("element", "element", "rtk"),
    ("row", "row", "rtk"),
    ("kernel", "kernel", "rtk"),
    ("2:4", "2:4", "rtk"),
    ("block-64", "block-64", "rtk"),
    ("channel, masked", "channel", "rtk"),
    ("channel, compact", "channel", "compact"),
    ("channel, compact, inputs too", "channel", "inner"),
)
PEERS = {"ready": "-", "masked": "--"}
# Okabe and Ito's palette; markers differ too, for print in grey.
_LOOKS = (("#0072B2", "o"), ("#56B4E9", "s"), ("#D55E00", "^"), ("#E69F00", "D"))
_INK, _GREY, _GRID = "#222222", "#666666", "#e3e3e3"
_TICKS = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def rows_of(table: dict[str, Any]) -> list[Row]:
    """Return the rows of layers, without the peers' own and the stems'."""
    rows = [row for row in table["rows"].values() if "granularity" in row]
    return [row for row in rows if "-3to" not in row["shape"]]


def classes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (network, filter) of every line."""
    return sorted({(row["network"], row["shape"].split("-")[0]) for row in rows}, reverse=True)


def speed_ups(
    rows: Sequence[Row], of: tuple[str, str], granularity: str, ours: str, peer: str, way: int
) -> dict[float, float]:
    """Return density -> geometric mean of the peer's time over ours."""
    logs: dict[float, list[float]] = {}
    for row in rows:
        if (
            (row["network"], row["shape"].split("-")[0]) == of
            and row["granularity"] == granularity
            and 2 / 3 <= row["kept"] / row["density"] <= 3 / 2
            and min(row[peer][way], row[ours][way]) > 0
        ):
            logs.setdefault(row["density"], []).append(math.log(row[peer][way] / row[ours][way]))
    return {density: math.exp(sum(each) / len(each)) for density, each in sorted(logs.items())}


def draw(table: dict[str, Any], way: str) -> Figure:
    """Return the figure of one direction: forward, input or weight."""
    rows = rows_of(table)
    figure = Figure(figsize=(13, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 4, sharey=True)
    lines = classes(rows)
    for axes, (title, granularity, ours) in zip(grid.flat, PANELS, strict=False):
        for of, (colour, marker) in zip(lines, _LOOKS, strict=False):
            for peer, style in PEERS.items():
                points = speed_ups(rows, of, granularity, ours, peer, list(WAYS).index(way))
                axes.plot(
                    [*points],
                    [*points.values()],
                    color=colour,
                    marker=marker,
                    markersize=4.5,
                    markerfacecolor=colour if peer == "ready" else "white",
                    linestyle=style,
                    linewidth=1.5,
                )
        _finish(axes, title)
    for row in grid:
        row[0].set_ylabel("times as fast as the peer", color=_INK)
    for axes in grid[1]:
        axes.set_xlabel("weights kept (%), log scale", color=_INK)
    _legend(figure, lines)
    figure.suptitle(
        f"Masked convolutions, {WAYS[way]}: rtk against its peers, {table['gpu'] or 'CPU'}, "
        f"torch {table['torch'].split('+')[0]}, bf16",
        color=_INK,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    return figure


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.axhline(1, color=_GREY, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xlim(1.25, 0.008)
    axes.xaxis.set_major_locator(FixedLocator([1, 0.5, 0.3, 0.1, 0.05, 0.02, 0.01]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8, color=_GREY, labelcolor=_INK, labelleft=True)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)


def _legend(figure: Figure, lines: Sequence[tuple[str, str]]) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, label=f"{network}, {taps}")
        for (network, taps), (colour, marker) in zip(lines, _LOOKS, strict=False)
    ]
    handles += [
        Line2D([], [], color=_INK, linestyle="-", label="against cuDNN on ready weights"),
        Line2D([], [], color=_INK, linestyle="--", label="against F.conv2d(x, w * m)"),
    ]
    figure.legend(
        handles=handles,
        title="Geometric means over a network's shapes; above 1 rtk is faster.",
        loc="outside lower left",
        ncols=3,
        frameon=False,
        labelcolor=_INK,
        fontsize=9,
        title_fontsize=9,
        alignment="left",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the table of bench_masked_conv2d.py.")
    parser.add_argument("table", type=Path, help="masked_conv2d.json")
    parser.add_argument("--out", type=Path, default=None, help="folder (default: the table's)")
    arguments = parser.parse_args()
    table = json.loads(arguments.table.read_text())
    folder = arguments.out or arguments.table.parent
    folder.mkdir(parents=True, exist_ok=True)
    for way in WAYS:
        path = folder / f"{arguments.table.stem}-{way}.png"
        draw(table, way).savefig(path)
        print(path)


if __name__ == "__main__":
    main()
