"""What benches write: JSON, CSV and plots, by one rename each, over their own files alone."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from phd_megatron.bench.place import Place
from phd_megatron.bench.plots import draw_lines
from phd_megatron.config.plain import Plain
from phd_megatron.errors import UserError
from phd_megatron.runtime.output import PLOT, Kind, check_file, json_report, text_report, write_file

#: of kernels, ``generate``, ``members`` and ``train``
REPORT = json_report(
    "a report of `phd-megatron bench`",
    "settings",
    "where",
    "results",
    others=(
        ("settings", "where", "torch", "worst_error", "rows"),
        ("settings", "where", "peak_tflops", "members"),
        ("size", "precision", "where", "peak_tflops", "tokens", "seconds", "time_ratio", "tflops"),
    ),
)
TABLE = text_report("a table of `phd-megatron bench`", "machine,device,dtype,torch,threads,date,", "model,prefill ms")
_OUTPUTS: dict[str, Kind] = {"json": REPORT, "csv": TABLE, "plot": PLOT}


@dataclass
class Row:
    """One line of a result: what was measured, its numbers by name, and what the JSON says of it beside them."""

    name: str
    numbers: dict[str, float]
    details: dict[str, Plain] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Plain]:
        """Flat, as the files have it."""
        return {"name": self.name, **self.numbers, **self.details}


@dataclass
class Result:
    """Rows of one measured shape."""

    shape: dict[str, str | int | float]
    rows: list[Row]
    details: dict[str, Plain] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Plain]:
        """As the JSON has it."""
        return {"shape": self.shape, "rows": [row.as_dict() for row in self.rows], **self.details}


def check_reports(args: argparse.Namespace) -> None:
    """Make the folders of what ``--json``, ``--csv`` and ``--plot`` name, and refuse files that are not a bench's.

    Raises:
        UserError: before anything is measured.
    """
    for name, kind in _OUTPUTS.items():
        target: Path | None = getattr(args, name, None)
        if target is None:
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {target.parent}: {error.strerror}; choose another --{name}") from error
        check_file(target, f"--{name}", kind)


def settings_of(args: argparse.Namespace) -> dict[str, Plain]:
    """The flags, without those that name files."""
    return {name: value for name, value in vars(args).items() if name not in _OUTPUTS}


def write_json(target: Path | None, report: Mapping[str, Plain]) -> None:
    """Write a report where ``--json`` asks for one."""
    if target is not None:
        write_file(target, "--json", REPORT, json.dumps(report, indent=1) + "\n")


def write_table(target: Path | None, columns: Sequence[str], rows: Sequence[Sequence[Plain]]) -> None:
    """Write lines where ``--csv`` asks for them."""
    if target is not None:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([columns, *rows])
        write_file(target, "--csv", TABLE, file.getvalue())


class Report:
    """Results of a kernel bench, written anew with each one: what is measured is kept, if a later one breaks.

    Args:
        args: the flags, of which ``--json``, ``--csv`` and ``--plot`` say what is written.
        place: where it is measured.
        x: key of the shape that the plot has on its horizontal axis.
        y: number of the rows that it has on its vertical axis.
    """

    def __init__(self, args: argparse.Namespace, place: Place, x: str, y: str) -> None:
        import torch

        self._args, self._x, self._y = args, x, y
        self._results: list[Result] = []
        self._where: dict[str, Plain] = {
            "machine": place.machine,
            "device": str(place.device),
            "dtype": place.dtype_name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        }

    def add(self, result: Result) -> None:
        """One more shape."""
        self._results.append(result)
        args = self._args
        results = [each.as_dict() for each in self._results]
        write_json(args.json, {"settings": settings_of(args), "where": self._where, "results": results})
        lines = [{**self._where, **each.shape, **row.as_dict()} for each in self._results for row in each.rows]
        lines = [{k: v for k, v in line.items() if not isinstance(v, (list, dict))} for line in lines]
        columns = list(dict.fromkeys(name for line in lines for name in line))
        write_table(args.csv, columns, [[line.get(name, "") for name in columns] for line in lines])
        if args.plot is not None:
            draw_lines(args.plot, "--plot", lines, self._x, self._y)
