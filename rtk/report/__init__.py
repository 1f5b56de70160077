"""Tables, plots and one HTML page out of the files that runs leave behind."""

from __future__ import annotations

from pathlib import Path

from rtk.report.compare import compare_kept
from rtk.report.figure import Figure, FigureData, Line
from rtk.report.figure_page import write_figure, write_gallery
from rtk.report.kept import Kept, Number, Stage, numbers_of, public_name, write_kept
from rtk.report.page import render_page
from rtk.report.paper import PAPER
from rtk.report.plots import write_plots
from rtk.report.readme import is_kept, rebuild
from rtk.report.results import Result, read_results, read_runs, to_csv
from rtk.report.study import Study
from rtk.report.table import build_table
from rtk.report.terminal import format_table
from rtk.runs import atomic_write

__all__ = [
    "PAPER",
    "Figure",
    "FigureData",
    "Kept",
    "Line",
    "Number",
    "Result",
    "Stage",
    "Study",
    "compare_kept",
    "is_kept",
    "numbers_of",
    "print_table",
    "public_name",
    "read_results",
    "read_runs",
    "rebuild",
    "write_figure",
    "write_gallery",
    "write_kept",
    "write_report",
]


def write_report(
    folder: str | Path, out: str | Path | None = None, note: str = "", title: str = ""
) -> Path:
    """Write `results.csv`, `plots/*.png` and `report.html` of every `result.json` in a folder.

    Args:
        folder: read with all the folders in it.
        out: folder to write into; `folder` by default.
        note: a sentence of the caller under the title, e.g. "small, for a first look".
        title: of the page; made from the folder's name by default.

    Returns:
        The path of report.html.

    Raises:
        RtkError: no folder, no result in it, a broken result, or nowhere to write.
    """
    folder = Path(folder)
    out = folder if out is None else Path(out)
    results = read_results(folder)
    study = Study(results)
    atomic_write(out / "results.csv", to_csv(results))
    plots = write_plots(study, out / "plots")
    title = title or f"Ticket report: {folder.resolve().name}"
    page = render_page(study, plots, title=title, note=note)
    atomic_write(out / "report.html", page)
    return out / "report.html"


def print_table(folder: str | Path) -> str:
    """Return the table of every `result.json` under `folder`, as text of at most 100 columns.

    Raises RtkError as `read_results` does.
    """
    return format_table(build_table(Study(read_results(folder))))
