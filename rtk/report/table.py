"""The table of a study: its rows and cells, for the terminal's text and for the HTML page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from rtk.report.results import OOD
from rtk.report.statistics import Estimate
from rtk.report.study import Setting, Study, metric_name

_LONGEST_HEADER = 16


@dataclass(frozen=True)
class Cell:
    """A number and what stands after its ±, in percent or points; empty where there is none."""

    number: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Args:
        metric: its heading's upper line, e.g. "top-1 %".
        name: its heading's lower line: a variant or "difference".
        variant: index of the variant in `Study.variants`.
        is_difference: variant - natural instead of the variant itself.
    """

    metric: str
    name: str
    variant: int
    is_difference: bool = False


@dataclass(frozen=True)
class Row:
    """One setting: a ticket, its sparsity, its number of seeds, and a cell per column."""

    ticket: str
    sparsity: str
    seeds: str
    cells: list[Cell]


@dataclass(frozen=True)
class Block:
    """The rows of one target and one transfer."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Table:
    """Everything the table shows.

    Args:
        columns: the columns of numbers.
        blocks: the rows, by target and transfer.
        notes: one sentence each: what the signs mean.
        aliases: short name -> the pretraining's full name, where that is too long for a heading.
    """

    columns: list[Column]
    blocks: list[Block]
    notes: list[str]
    aliases: dict[str, str]


def percent(sparsity: float) -> str:
    """Return a sparsity in percent, e.g. 0.95 -> "95 %"."""
    return f"{100 * sparsity:.4g} %"


def _cell(estimate: Estimate | None, sign: str = "") -> Cell:
    if estimate is None:
        return Cell()
    number = f"{100 * estimate.mean:{sign}.1f}"
    if float(number) == 0:
        number = "0.0"  # a difference that rounds to nothing has no sign
    return Cell(number, "" if estimate.spread is None else f"{100 * estimate.spread:.1f}")


def _seeds(study: Study, setting: Setting) -> str:
    """Return the number of seeds; per variant, as in 3/2, where they differ."""
    counts = [study.seeds(setting, variant) for variant in study.variants]
    return str(counts[0]) if len(set(counts)) == 1 else "/".join(map(str, counts))


def _notes(study: Study, rows: list[Row]) -> list[str]:
    notes = ["n: number of seeds."]
    if any("/" in row.seeds for row in rows):
        notes = [f"n: number of seeds; as {'/'.join(study.variants)} where they differ."]
        if study.baseline:
            notes.append("Differences are over the seeds that both have.")
    repeated = any(cell.spread for row in rows for cell in row.cells)
    if repeated:
        notes.append("±: sample standard deviation over the seeds.")
    if study.baseline and len(study.variants) > 1:
        error = "; its ±: standard error over the pairs" if repeated else ""
        notes.append(f"difference: minus {study.baseline}, in points, paired by seed{error}.")
    if "pgd_top1" in study.metrics:
        attacks = study.distinct("attack")
        notes.append(f"PGD: {' or '.join(attacks) if attacks else 'attack not recorded'}.")
    if any(metric.startswith(OOD) for metric in study.metrics):
        notes.append("OoD AUC: ROC-AUC of the confidence, test images against those of that set.")
    if not repeated:
        notes.append("One seed: no spread can be given.")
    return notes


def build_table(study: Study) -> Table:
    """Return the table of `study`: one row per target, transfer, granularity, scheme, sparsity."""
    aliases = {}
    names = []
    for i, variant in enumerate(study.variants):
        if len(variant) > _LONGEST_HEADER:
            aliases[f"variant {i + 1}"] = variant
            variant = f"variant {i + 1}"
        names.append(variant)

    columns = []
    for metric in study.metrics:
        for i, variant in enumerate(study.variants):
            heading = f"{metric_name(metric)} %"
            columns.append(Column(heading, names[i], i))
            if study.baseline and variant != study.baseline:
                columns.append(Column(heading, "difference", i, is_difference=True))

    def row(setting: Setting) -> Row:
        cells = []
        for metric in study.metrics:
            for variant in study.variants:
                cells.append(_cell(study.estimate(setting, variant, metric)))
                if study.baseline and variant != study.baseline:
                    cells.append(_cell(study.difference(setting, variant, metric), "+"))
        ticket = " ".join(filter(None, [setting.scheme, setting.panel.granularity]))
        return Row(ticket, percent(setting.sparsity), _seeds(study, setting), cells)

    def title(setting: Setting) -> str:
        panel = setting.panel
        what = f"transfer {panel.transfer}" if panel.transfer else "the pretrained model itself"
        context = zip(study.varying, panel.context, strict=True)
        parts = [f"target {panel.target}", *(f"{key} {value or 'none'}" for key, value in context)]
        return ", ".join([*parts, what])

    blocks = [
        Block(heading, [row(setting) for setting in settings])
        for heading, settings in itertools.groupby(study.groups, key=title)
    ]
    rows = [row for block in blocks for row in block.rows]
    return Table(columns, blocks, _notes(study, rows), aliases)
