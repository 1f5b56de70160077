"""Renders `report.html`: one file that needs nothing else, neither network nor JavaScript."""

from __future__ import annotations

import base64
import platform
from itertools import groupby
from pathlib import Path

import jinja2
import matplotlib
import numpy

from rtk.report.plots import Plot
from rtk.report.results import MIOU, Result
from rtk.report.study import Study
from rtk.report.summary import facts, findings, warnings
from rtk.report.table import Column, build_table, percent

_TEMPLATE = "report.html.j2"


def _image(plot: Plot) -> dict[str, str]:
    data = base64.b64encode(plot.png).decode()
    return {
        "src": f"data:image/png;base64,{data}",
        "alt": plot.alt,
        "name": f"plots/{plot.path.name}",
        "pixels": f"{96 * plot.inches:.0f}",  # CSS has 96 of them per inch
    }


def _heads(columns: list[Column]) -> list[tuple[str, int]]:
    """Return the upper headings of the table and how many columns each is over."""
    return [(metric, len([*group])) for metric, group in groupby(columns, key=lambda c: c.metric)]


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def run_row(result: Result) -> list[str]:
    """Return the cells of a result under RUN_COLUMNS."""

    def text(value: object) -> str:
        return "" if value is None else str(value)

    return [
        result.run,
        result.pretrain,
        text(result.pretrain_seed),
        " ".join(filter(None, [result.scheme, result.granularity])),
        percent(result.sparsity),
        "" if result.actual_sparsity is None else f"{100 * result.actual_sparsity:.3f} %",
        result.task,
        text(result.transfer),
        text(result.seed),
        _accuracy(result.top1),
        _accuracy(result.mean_per_class),
        _accuracy(result.pgd_top1),
        _accuracy(result.value(MIOU)),
        text(result.images),
        text(result.config_hash),
        text(result.checkpoint_sha256)[:12],
    ]


RUN_COLUMNS = (
    "run",
    "pretraining",
    "pretraining seed",
    "ticket",
    "sparsity",
    "actual sparsity",
    "target",
    "transfer",
    "seed",
    "top-1 %",
    "mean per class %",
    "PGD top-1 %",
    "mean IoU %",
    "images",
    "config",
    "checkpoint SHA-256",
)


def _versions(study: Study) -> list[tuple[str, str]]:
    return [
        ("rtk (evaluation)", ", ".join(study.distinct("rtk")) or "not recorded"),
        ("Python", platform.python_version()),
        ("NumPy", numpy.__version__),
        ("Matplotlib", matplotlib.__version__),
        ("Jinja2", jinja2.__version__),
    ]


def render_page(study: Study, plots: list[Plot], title: str, note: str = "") -> str:
    """Return the page as HTML; every text out of the runs is escaped.

    Args:
        study: what to show.
        plots: as `write_plots` gives them, the overview first.
        title: of the page.
        note: the caller's sentence under the title, or nothing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    table = build_table(study)
    overview, *single = plots
    return environment.get_template(_TEMPLATE).render(
        title=title,
        note=note,
        facts=facts(study),
        findings=findings(study),
        warnings=warnings(study),
        overview=_image(overview),
        table=table,
        heads=_heads(table.columns),
        figures=[_image(plot) for plot in single],
        run_columns=RUN_COLUMNS,
        runs=[run_row(result) for result in study.results],
        versions=_versions(study),
    )
