"""``phd-megatron doctor``: versions, devices, and which implementation each operation uses here, and why."""

from __future__ import annotations

import argparse
import json

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import show


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(prog="phd-megatron doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as of pretrain")
    return parser


def run(argv: list[str]) -> int:
    """Print the report. 0 also when optional packages are missing: the report says what that costs."""
    arguments = parse_strictly(build_parser(), argv)
    from phd_megatron.runtime.doctor import examine, format_report

    report = examine(arguments.device)
    show(json.dumps(report.as_dict(), indent=2) if arguments.json else format_report(report))
    return 0
