"""Tables as the terminal shows them. What stands in them is made elsewhere, as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import rich.box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from experiments.report import summary

_TITLE_WIDTH = 10  # of a column of figures, whose title is broken into lines


def of_report(tables: Sequence[summary.TextTable]) -> Group:
    """The tables of a report, with an empty line between them."""
    first, *others = tables
    return Group(_of_columns(first), *(part for table in others for part in ("", _of_columns(table))))


def of_cells(cells: Sequence[Sequence[str]], caption: str) -> Table:
    """A table of cells, the first row its head. A row's first cell is text, the others are figures."""
    head, *rows = cells
    view = empty(caption=caption)
    for i, column in enumerate(head):
        view.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        view.add_row(*row)
    return view


def empty(title: str | None = None, caption: str | None = None) -> Table:
    """A table without content, which is drawn with nothing but a line below its head."""
    return Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)


def _of_columns(table: summary.TextTable) -> Table:
    """A table whose columns are given. An arm's name stands only in the first of its rows."""
    view = empty(escape(table.heading), escape(table.caption))
    for column in table.columns:
        if column.is_text:
            view.add_column(escape(column.title), min_width=14, max_width=32, overflow="fold")
        else:
            view.add_column(escape(textwrap.fill(column.title, _TITLE_WIDTH)), justify="right", no_wrap=True)

    above = ""
    for arm, *cells in zip(*(column.cells for column in table.columns), strict=True):
        view.add_row(*map(escape, ("" if arm == above else arm, *cells)))
        above = arm
    return view
