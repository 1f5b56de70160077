"""Formats the table as plain text for a terminal."""

from __future__ import annotations

import itertools
import textwrap

from rtk.report.table import Cell, Column, Row, Table

WIDTH = 100
_GAP = "  "


def _column_lines(column: Column, cells: list[Cell]) -> list[str]:
    """Return a column's name and its cells, all of one width, the ± under each other."""
    number = max(1, *(len(cell.number) for cell in cells))
    spread = max(len(cell.spread) for cell in cells)
    lines = [column.name]
    for cell in cells:
        text = f"{cell.number or '-':>{number}}"
        lines.append(f"{text} ±{cell.spread:>{spread}}" if cell.spread else text)
    width = max(map(len, lines))
    return [line.ljust(width) for line in lines]


def _key_lines(rows: list[Row]) -> list[str]:
    """Return the columns that say what a row is, with their names, as one column."""
    keys = [("ticket", "sparsity", "n"), *((row.ticket, row.sparsity, row.seeds) for row in rows)]
    ticket, sparsity, seeds = [max(map(len, column)) for column in zip(*keys, strict=True)]
    return [_GAP.join([a.ljust(ticket), b.rjust(sparsity), c.rjust(seeds)]) for a, b, c in keys]


def _units(columns: list[Column]) -> list[list[int]]:
    """Return which columns stay on one line: a variant and its difference, natural and the next."""
    starts = [
        i
        for i, column in enumerate(columns)
        if not column.is_difference
        and (i == 0 or column.variant != 1 or columns[i - 1].metric != column.metric)
    ]
    return [[*range(a, b)] for a, b in itertools.pairwise([*starts, len(columns)])]


def _width(columns: list[list[str]]) -> int:
    return sum(len(_GAP) + len(lines[0]) for lines in columns)


def _panels(table: Table, rows: list[Row]) -> list[list[str]]:
    """Return the lines of the table, all columns beside each other if they fit, else in panels."""
    keys = _key_lines(rows)
    columns = [
        _column_lines(column, [row.cells[i] for row in rows])
        for i, column in enumerate(table.columns)
    ]
    packed: list[list[int]] = [[]]
    for unit in _units(table.columns):
        needed = len(keys[0]) + _width([columns[i] for i in packed[-1] + unit])
        if packed[-1] and needed > WIDTH:
            packed.append([])
        packed[-1] += unit
    panels = []
    for panel in packed:
        heading = " " * len(keys[0])
        for metric, group in itertools.groupby(panel, key=lambda i: table.columns[i].metric):
            heading += (_GAP + metric).ljust(_width([columns[i] for i in group]))
        lines = zip(keys, *(columns[i] for i in panel), strict=True)
        panels.append([heading, *(_GAP.join(line) for line in lines)])
    return panels


def format_table(table: Table) -> str:
    """Return `table` as text of at most 100 columns, where no name alone is longer."""
    rows = [row for block in table.blocks for row in block.rows]
    panels = _panels(table, rows)
    lines: list[str] = []
    start = 2  # after the two lines of heading
    for block in table.blocks:
        end = start + len(block.rows)
        lines += textwrap.wrap(block.title, WIDTH, subsequent_indent="    ")
        for panel in panels:
            lines += ["", *panel[:2], *panel[start:end]]
        lines.append("")
        start = end
    for note in [*(f"{short}: {full}." for short, full in table.aliases.items()), *table.notes]:
        lines += textwrap.wrap(note, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(line.rstrip() for line in lines) + "\n"
