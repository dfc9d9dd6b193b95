#!/usr/bin/env python3
"""One plot of several results of ``phd-megatron bench attention|decode|norm-rope``, written with ``--json``.

python tools/draw_bench.py --x seq_length --y ratio_to_floor --names sdpa_triton --output plot.svg attention_*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from phd_megatron.bench.plots import draw_lines
from phd_megatron.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--x", required=True, help="key of a shape")
    parser.add_argument("--y", required=True, help="key of a row")
    parser.add_argument("--names", nargs="*", default=[], help="only rows whose name has one of these in it")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    lines = [
        {**result["shape"], **row}
        for path in args.results
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]
        for row in result["rows"]
        if not args.names or any(name in row["name"] for name in args.names)
    ]
    try:
        draw_lines(args.output, "--output", lines, args.x, args.y)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
