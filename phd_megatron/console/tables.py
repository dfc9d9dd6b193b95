"""Small result tables on standard output, and how numbers stand in them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from phd_megatron.console.terminal import show


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text, first column to the left and the others to the right.

    Drawn with ``rich`` on a terminal that has it; plain, aligned and uncut where it goes to a file or a pipe.
    """
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left")
            for index, column in enumerate(columns):
                table.add_column(column, justify="right" if index else "left", overflow="fold")
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    show(title)
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        show("  ".join(cells).rstrip())


def milliseconds(value: float) -> str:
    """Three digits of a time."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def short(number: float) -> str:
    """``1234567`` to ``1.23M``: three digits or more, with k, M, B or T."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            scaled = number / unit
            return f"{scaled:.2f}{letter}" if scaled < 100 else f"{scaled:.0f}{letter}"
    return f"{number:.4g}"


def gib(count: float) -> str:
    """A number of bytes in GiB."""
    return f"{count / 2**30:,.1f} GiB"
