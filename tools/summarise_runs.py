"""Print a table of runs: last validation loss, perplexity and speed; ``summarise_runs.py NAME=FILE...``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from phd_megatron.errors import UserError
from phd_megatron.runtime.output import json_report, write_file
from phd_megatron.training.metrics_reader import Run, add_run_arguments, runs_of

REPORT = json_report("a summary of this script", "run", "training_loss", "validation_loss")


def summary(run: Run) -> dict[str, float | str | None]:
    """What the table shows of one run. The loss difference is added by the caller."""
    loss = run.last("validation_loss")
    return {
        "run": run.name,
        "iterations": run.steps[-1]["iteration"],
        "samples": run.steps[-1]["consumed_samples"],
        "training_loss": run.last("lm_loss"),
        "validation_loss": loss,
        "perplexity": None if loss is None else math.exp(loss),
        "tokens_per_second": run.median("tokens_per_second"),
        "processed_tokens_per_second": run.median("processed_tokens_per_second"),
    }


def shown(value: float | str | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def table(rows: list[dict[str, float | str | None]], title: str) -> Table:
    """The first run is the one that differences refer to."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    result.add_column("run", no_wrap=True)
    for column in ("validation\nloss", "difference", "perplexity", "tokens/s", "processed\ntokens/s"):
        result.add_column(column, justify="right")
    first = rows[0]["validation_loss"]
    for row in rows:
        loss = row["validation_loss"]
        both = isinstance(loss, float) and isinstance(first, float)
        difference = loss - first if both else None  # type: ignore[operator]
        result.add_row(
            str(row["run"]),
            shown(loss, ".4f"),
            "" if row is rows[0] else shown(difference, "+.4f"),
            shown(row["perplexity"], ".3f"),
            shown(row["tokens_per_second"], ",.0f"),
            shown(row["processed_tokens_per_second"], ",.0f"),
        )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    rows = [summary(run) for run in runs_of(parser, options.runs)]
    Console().print(table(rows, options.title))
    if len({(row["iterations"], row["samples"]) for row in rows}) > 1:
        print("note: the runs have not consumed the same samples, so their losses do not compare")
    if options.json:
        try:
            write_file(options.json, "--json", REPORT, json.dumps(rows, indent=1) + "\n")
        except UserError as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
