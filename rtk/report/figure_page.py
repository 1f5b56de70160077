"""Writes a figure into its folder, and the gallery over all figures of a folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy
from PIL import Image

from rtk.errors import RtkError
from rtk.report.figure import Figure, FigureData, reduce_results
from rtk.report.figure_plot import draw_figure
from rtk.report.figure_table import (
    COMPARISON_HEADS,
    POINT_HEADS,
    comparison_rows,
    notes,
    point_rows,
    sentences,
    table_csv,
)
from rtk.report.page import RUN_COLUMNS, run_row
from rtk.report.plots import to_png
from rtk.report.results import Result, to_csv
from rtk.runs import atomic_write, read_json

_THUMBNAIL = 480  # pixels wide
SUMMARY = "figure.json"  # what the gallery reads


def write_figure(
    figure: Figure,
    results: Sequence[Result],
    folder: str | Path,
    *,
    note: str = "",
    facts: Mapping[str, str] | None = None,
    distances: Mapping[str, float] | None = None,
    features: str = "",
) -> FigureData:
    """Write figure.png, table.csv, results.csv, report.html and figure.json, and return the data.

    A file that is there already with the same content is left as it is.

    Args:
        figure: what to draw and compare.
        results: in the order in which panels appear.
        folder: to write into.
        note: a sentence under the title.
        facts: what was run, by heading.
        distances: target -> Fréchet distance from the source.
        features: what the distances were measured with.

    Raises:
        RtkError: if no result is of any line, or there is nowhere to write.
    """
    folder = Path(folder)
    data = reduce_results(figure, results, distances, features)
    if not data.points:
        raise RtkError(f"{figure.name}: no result is of any of its lines")
    canvas = draw_figure(data)
    png = to_png(canvas)
    width, height = canvas.get_size_inches()
    small = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.thumbnail((_THUMBNAIL, 4 * _THUMBNAIL))
        image.save(small, "PNG")
    write_changed(folder / "figure.png", png)
    write_changed(folder / "thumbnail.png", small.getvalue())
    write_changed(folder / "table.csv", table_csv(data))
    write_changed(folder / "results.csv", to_csv(list(results)))
    page = (
        _environment()
        .get_template("figure.html.j2")
        .render(
            title=figure.title,
            name=figure.name,
            claim=figure.claim,
            note=note,
            image=_embedded(png),
            pixels=round(96 * width),
            alt=f"{figure.title}. {' '.join(sentences(data))}",
            findings=sentences(data),
            facts=facts or {},
            tables=[
                ("Over many sparsities", COMPARISON_HEADS, comparison_rows(data)),
                ("Every point", POINT_HEADS, point_rows(data)),
            ],
            notes=notes(data),
            run_columns=RUN_COLUMNS,
            runs=[run_row(result) for result in results],
            versions=f"Matplotlib {matplotlib.__version__}, NumPy {numpy.__version__}",
        )
    )
    write_changed(folder / "report.html", page)
    summary = {
        "name": figure.name,
        "title": figure.title,
        "claim": figure.claim,
        "note": note,
        "findings": sentences(data),
        "runs": len(results),
        "aspect": round(height / width, 3),
    }
    write_changed(folder / SUMMARY, json.dumps(summary, indent=2, sort_keys=True) + "\n")
    return data


def write_gallery(folder: str | Path, names: Sequence[str], title: str) -> Path:
    """Write index.html over the figures that are in `folder`, and return its path.

    Args:
        folder: with a folder for each figure.
        names: of all figures, in the order of the page; those that are not there yet are named.
        title: of the page.
    """
    folder = Path(folder)
    cards: list[dict[str, Any]] = []
    for name in names:
        if (folder / name / SUMMARY).exists():
            image = (folder / name / "thumbnail.png").read_bytes()
            cards.append({**read_json(folder / name / SUMMARY), "image": _embedded(image)})
    done = {card["name"] for card in cards}
    page = (
        _environment()
        .get_template("gallery.html.j2")
        .render(title=title, cards=cards, missing=[name for name in names if name not in done])
    )
    write_changed(folder / "index.html", page)
    return folder / "index.html"


def write_changed(path: Path, content: bytes | str) -> None:
    """Write a file, unless it is there with this content."""
    payload = content.encode() if isinstance(content, str) else content
    if not path.exists() or path.read_bytes() != payload:
        atomic_write(path, payload)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
