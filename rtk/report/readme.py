"""README.md over kept figures: plots, tables, tests, what the paper found and what was found here.

All of it comes from the CSVs in the folder (`rtk.report.kept`), so that it can be made again
anywhere, without a GPU and without the runs.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from rtk.errors import RtkError
from rtk.report.cost import by_kind, cost, engine_rows, taken
from rtk.report.figure import FigureData, reduce_results
from rtk.report.figure_page import write_changed
from rtk.report.figure_plot import draw_figure
from rtk.report.figure_table import (
    COMPARISON_HEADS,
    comparison_rows,
    notes,
    p_value,
    plus_minus,
    sentences,
    table_csv,
)
from rtk.report.kept import OFF, Kept, read_kept
from rtk.report.paper import PAPER
from rtk.report.plots import to_png
from rtk.report.table import percent
from rtk.report.verdict import Judgement, judge, overall

README = "README.md"
_DPI = 100
_COLOURS = 64  # of a palette: a plot has few, and its file becomes a third
_RULE = (
    "An expectation is a difference that the paper's claim puts above 0. It is averaged, seed by "
    "seed, over the sparsities above 0 and then over the panels, and put to a paired t-test over "
    "the seeds. *agrees*: above 0 with p < 0.05, and no panel contradicts. *disagrees*: below 0 "
    "with p < 0.05, or a panel contradicts: below 0 by itself with p < 0.05 after Holm's "
    "correction for the number of panels (where the claim is about most panels only, panels do "
    "not count). *cannot tell*: anything else. A figure agrees if all its expectations do and "
    "disagrees if one does. (`rtk/report/verdict.py`)"
)


def rebuild(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write plots, tables and README.md of the figures that are kept in `folder`.

    Args:
        folder: with the CSVs of `rtk reproduce --keep`: fig1.csv, fig1-engine-off.csv, ...
        out: folder to write FIG.png, FIG-table.csv and README.md to; `folder` by default.

    Returns:
        The path of README.md.

    Raises:
        RtkError: where there is no kept figure, or a file is damaged.
    """
    folder = Path(folder)
    out = folder if out is None else Path(out)
    kept = {name: read_kept(folder / f"{name}.csv") for name in PAPER if _is_there(folder, name)}
    plain = {
        name: read_kept(folder / f"{name}{OFF}.csv")
        for name in PAPER
        if _is_there(folder, f"{name}{OFF}")
    }
    if not kept:
        alone = f"; {next(iter(plain))} is there with the engine off only" if plain else ""
        raise RtkError(
            f"report: no kept figure in {folder}, as fig1.csv{alone}; "
            "`rtk reproduce fig1 --keep FOLDER` writes one"
        )
    figures = {
        name: reduce_results(each.figure, each.results, each.distances, each.features)
        for name, each in kept.items()
    }
    for name, data in figures.items():
        if not data.points:
            raise RtkError(
                f"{folder / name}.csv: no result is of any line of {name}; keep it again"
            )
    judged = {name: judge(data, PAPER[name].expectations) for name, data in figures.items()}
    for name, data in figures.items():
        write_changed(out / f"{name}.png", _small_png(data))
        write_changed(out / f"{name}-table.csv", table_csv(data))
    lines = [*_head(kept, plain, judged)]
    for name, each in kept.items():
        others = [other for other in kept.values() if other is not each]
        lines += _section(each, figures[name], judged[name], others, plain.get(name))
    write_changed(out / README, "\n".join(lines) + "\n")
    return out / README


def is_kept(folder: str | Path) -> bool:
    """Whether `rebuild` finds a figure in `folder`."""
    return any(_is_there(Path(folder), name) for name in PAPER)


def _is_there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.csv").is_file()


def _small_png(data: FigureData) -> bytes:
    canvas = draw_figure(data)
    canvas.set_dpi(_DPI)
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(to_png(canvas))) as image:
        few = image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
        few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _head(
    kept: dict[str, Kept], plain: dict[str, Kept], judged: dict[str, list[Judgement]]
) -> Iterable[str]:
    scales = ", ".join(dict.fromkeys(each.scale for each in kept.values()))
    devices = ", ".join(dict.fromkeys(each.device for each in kept.values()))
    yield "# The figures of arXiv 2304.11834, run again"
    yield ""
    yield (
        f"Scale {scales}, on {devices}. Made of the CSVs beside it by `rtk report --from`, which "
        "needs neither a GPU nor the runs; each of them is what `rtk reproduce FIGURE --keep` "
        "wrote at the end of a figure. Nothing here is written by hand."
    )
    yield ""
    yield from dict.fromkeys(each.note for each in kept.values() if each.note)
    yield ""
    rows = []
    for name, each in kept.items():
        found = cost(each, [other for other in kept.values() if other is not each])
        rows.append(
            [
                f"[{name}](#{name})",
                each.figure.title,
                f"**{overall(judged[name])}**",
                str(len(each.stages)),
                taken(found.seconds),
                taken(found.shared),
                taken(cost(plain[name], []).seconds) if name in plain else "",
            ]
        )
    heads = ["figure", "what", "verdict", "stages", "GPU seconds", "of them shared"]
    heads += ["GPU seconds, engine off"]
    yield from _table(_named_device(heads, kept.values()), rows)
    yield ""
    whole = cost(None, list(kept.values()))
    unit = _unit(kept.values())
    yield (
        f"All figures together: {whole.stages} stages, {taken(whole.shared)} {unit}. A stage that "
        "several figures use (a pretraining, a ticket) ran once; it counts in each of them, and "
        "once here. A stage's seconds are its share of the device: where several ran at the same "
        "time, the time is divided among them."
    )
    if whole.unknown:
        yield f"Of {whole.unknown} stages no time was noted."
    yield ""
    yield f"**The verdict.** {_RULE}"


def _section(
    kept: Kept,
    data: FigureData,
    judgements: Sequence[Judgement],
    others: Sequence[Kept],
    plain: Kept | None,
) -> Iterable[str]:
    name = kept.figure.name
    yield ""
    yield f"## {name}"
    yield ""
    yield f"{kept.figure.title}."
    yield ""
    yield f"![{kept.figure.title}]({name}.png)"
    yield ""
    yield f"**The paper:** {kept.figure.claim}"
    yield ""
    yield f"**Here:** {' '.join(sentences(data))}"
    yield ""
    yield f"**Verdict: {overall(judgements)}.**"
    yield ""
    yield from _table(
        ("expected", "difference ± se (points)", "seeds", "p", "panels ahead", "verdict"),
        [_judgement_row(judgement) for judgement in judgements],
    )
    yield ""
    yield "Each panel, a seed's mean over the sparsities being one pair:"
    yield ""
    yield from _table(COMPARISON_HEADS, comparison_rows(data))
    yield ""
    yield from _folded("Every point", _table(*_points(data)))
    yield ""
    yield from _folded("What the numbers mean", [f"- {note}" for note in notes(data)])
    if kept.facts:
        yield ""
        facts = [f"- {heading}: {text}" for heading, text in kept.facts.items()]
        yield from _folded("What was run", facts)
    yield ""
    found = cost(kept, others)
    parts = ", ".join(f"{kind} {taken(seconds)}" for kind, seconds in by_kind(kept).items())
    shared = f"; {taken(found.shared)} of them are of stages shared with {', '.join(found.with_)}"
    yield (
        f"**Cost:** {taken(found.seconds)} {_unit([kept])} over {found.stages} stages "
        f"({parts}){shared if found.with_ else ''}."
    )
    if plain is not None:
        yield ""
        yield "**What the engine saves:** the same stages, with the same seeds, by PyTorch alone."
        yield ""
        yield from _table(*engine_rows(kept, plain))


def _judgement_row(judgement: Judgement) -> list[str]:
    test = judgement.test
    text = judgement.expectation.text
    if test is None:
        return [text, "not in these runs", "", "", "", judgement.verdict]
    against = f" (against: {', '.join(judgement.against)})" if judgement.against else ""
    panels = "" if judgement.expectation.more else f"{judgement.ahead} of {judgement.panels}"
    shown = plus_minus(test.difference, "+")
    return [text, shown, str(test.n), p_value(test.t), panels, f"{judgement.verdict}{against}"]


def _points(data: FigureData) -> tuple[list[str], list[list[str]]]:
    """Return a row for each panel, measure and sparsity, and a column for each line."""
    lines = data.figure.lines
    heads = ["panel", "metric", "sparsity", *(line.label for line in lines)]
    for line in lines:
        if line.against is not None:
            heads += [f"{line.label} - {line.against}", "p"]
    points = {(p.panel, p.measure, p.sparsity, p.line): p for p in data.points}
    rows = []
    for measure in data.measures:
        for panel in data.panels:
            inside = {p.sparsity for p in data.points if (p.panel, p.measure) == (panel, measure)}
            for sparsity in sorted(inside):
                own = [points.get((panel, measure, sparsity, line.label)) for line in lines]
                row = [data.panel_name(panel), measure.name, percent(sparsity)]
                row += ["" if point is None else plus_minus(point.estimate) for point in own]
                for point, line in zip(own, lines, strict=True):
                    if line.against is not None:
                        test = None if point is None else point.test
                        row += ["" if test is None else plus_minus(test.difference, "+")]
                        row += ["" if test is None else p_value(test.t)]
                rows.append(row)
    return heads, rows


def _unit(kept: Iterable[Kept]) -> str:
    return "CPU seconds" if all(each.device == "CPU" for each in kept) else "GPU seconds"


def _named_device(heads: Sequence[str], kept: Iterable[Kept]) -> list[str]:
    unit = _unit(kept)
    return [head.replace("GPU seconds", unit) for head in heads]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]


def _folded(summary: str, lines: Iterable[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>"]
