"""``phd-megatron compare A B``: two runs at equal tokens, equal FLOPs and equal time."""

from __future__ import annotations

import argparse
from pathlib import Path

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.tables import print_table
from phd_megatron.console.terminal import show, warn


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron compare",
        description="Compare two runs by their metrics files, at equal tokens, FLOPs and training time.",
    )
    for name in ("first", "second"):
        parser.add_argument(
            name, metavar="[NAME=]PATH", help="a metrics file, a member of a sweep, or a directory with metrics.jsonl"
        )
    parser.add_argument("--output", default="compare", metavar="DIR", help="for compare.md, .png, .svg (%(default)s)")
    parser.add_argument("--unit", default="nats per token", help="of the loss (%(default)s)")
    return parser


def run(argv: list[str]) -> int:
    """Compare, print the tables and draw the plot; UserError when a file cannot be read.

    Returns:
        0, or 1 when one of them has diverged.
    """
    args = parse_strictly(build_parser(), argv)
    from phd_megatron.sweep.compare import diverged_text, read_named, write_comparison
    from phd_megatron.sweep.document import Table, Text

    output = Path(args.output)
    curves = read_named(args.first), read_named(args.second)
    for block in write_comparison(*curves, output, args.unit):
        if isinstance(block, Table):
            print_table("", block.head, block.rows)
        elif isinstance(block, Text):
            show(block.text)
    show(f"\n{output / 'compare.md'}, compare.png, compare.svg")
    diverged = [curve for curve in curves if curve.diverged_at is not None]
    for curve in diverged:
        warn(f"error: {diverged_text(curve)}")
    return 1 if diverged else 0
