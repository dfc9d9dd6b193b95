"""``phd-megatron parity``: does every layout give the numbers of one rank, for this configuration on this machine?"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.cli.pretrain import asked_device
from phd_megatron.cli.run_flags import run_options
from phd_megatron.console.arguments import Parser, parse_own
from phd_megatron.console.tables import print_table
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError
from phd_megatron.runtime.capabilities import probe
from phd_megatron.runtime.context import choose_device, install_backend, usable_cores
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.output import check_file, json_report, text_report, write_file
from phd_megatron.runtime.temporary import temporary_directory

if TYPE_CHECKING:
    from phd_megatron.config.layouts import Layout
    from phd_megatron.parity.compare import Tolerance
    from phd_megatron.parity.runs import Row

    Plain = str | int | float | None | dict[str, "Plain"]

_TITLE = "relative errors against one rank,"
_JSON = json_report("a report of `phd-megatron parity`", "tolerance", "layouts")
_MARKDOWN = text_report("a table of `phd-megatron parity`", _TITLE)
COLUMNS = ("layout", "ranks", "loss", "grad norm", "gradients", "worst parameter", "result")


def build_parser() -> Parser:
    """The flags of this command; all others are pretrain's."""
    from phd_megatron.config.layouts import MEANINGS

    words = "; ".join(f"{name}: {text}" for name, text in MEANINGS.items())
    parser = Parser(
        prog="phd-megatron parity",
        usage="phd-megatron parity --config FILE [--layouts LIST] [OPTIONS] [FLAGS OF pretrain]",
        description="Train a few steps on one rank and in each layout, and compare losses, gradient norms and the "
        "gradient of every parameter. The configuration's own layout, length, checkpoints and metrics are not used; "
        "the micro-batch is the same everywhere and the global batch fits every layout. Exit code: 0 all equal, 1 a "
        "tolerance is exceeded or a run failed, 2 bad input.",
        epilog=f"Words of a layout, joined by +: {words}. All flags of pretrain are accepted: pretrain --help.",
    )
    parser.add_argument("--layouts", metavar="LIST", help="such as tp2,tp2+sp,pp2 (default: a covering set that fits)")
    parser.add_argument(
        "--max-ranks", type=int, metavar="N", help="most ranks of a default layout (default: 8, or what fits here)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--work-dir", metavar="DIR", help="keep the runs' files there (default: a temporary directory)")
    return parser


def run(argv: list[str]) -> int:
    """Compare, print, and say with the exit code whether all is equal."""
    from phd_megatron.training.start import load_config

    options, rest = parse_own(build_parser(), argv, run_options())
    if Environment.read().launched:
        raise UserError("parity starts torchrun by itself, once for each number of ranks; start it as a plain program")
    if options.max_ranks is not None and options.max_ranks < 1:
        raise UserError(f"--max-ranks {options.max_ranks}: use 1 or more")
    for path, option, kind in ((options.json, "--json", _JSON), (options.markdown, "--markdown", _MARKDOWN)):
        if path is not None:
            check_file(path, option, kind)
    device = choose_device(asked_device(rest))[0]
    install_backend(device)  # before Megatron is imported

    from phd_megatron.config.layouts import covering, parse_layouts
    from phd_megatron.parity.compare import tolerance_of
    from phd_megatron.parity.runs import run_parity
    from phd_megatron.runtime.implementations import use_transformer_engine

    most = _ranks_that_fit(device)
    given = options.layouts is not None
    layouts = parse_layouts(options.layouts) if given else covering(min(8, options.max_ranks or 8, most))
    loaded = load_config(rest)
    config = loaded.config
    for note in loaded.notes:
        show(f"note: {note}")
    tolerance = tolerance_of(config, use_transformer_engine(config.model.transformer_impl, probe(device))[0])
    beyond = [layout for layout in layouts if device == "cuda" and layout.ranks > most]
    with _directory(options.work_dir) as work:
        fitting = [layout for layout in layouts if layout not in beyond]
        rows = run_parity({"": (config, fitting)}, work, {"": tolerance}, keep=options.work_dir is not None)[""]
    if not given:
        left_out = [row.layout for row in rows if row.status == "refused"]
        rows = [row for row in rows if row.status != "refused"]
        if left_out:
            show(f"left out, since they do not fit this configuration: {', '.join(left_out)}")
    rows += [_beyond(layout, most) for layout in beyond]
    _report(rows, tolerance, options)
    if all(row.status == "refused" for row in rows):
        raise UserError("no layout could be run; the reasons are above")
    return 1 if any(row.is_bad for row in rows) else 0


def _ranks_that_fit(device: str) -> int:
    """GPUs of this machine; on the CPU ranks may share cores."""
    if device == "cpu":
        return max(4, usable_cores())
    import torch

    return torch.cuda.device_count()


def _beyond(layout: Layout, most: int) -> Row:
    from phd_megatron.parity.runs import Row

    return Row(layout.name, layout.ranks, "refused", note=f"{layout.ranks} ranks, and this machine has {most} devices")


@contextlib.contextmanager
def _directory(asked: str | None) -> Iterator[Path]:
    if asked is None:
        with temporary_directory("parity") as place:
            yield place
        return
    path = Path(asked)
    if path.exists() and not path.is_dir():
        raise UserError(f"--work-dir {asked} exists and is no directory; give a new directory")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"--work-dir {asked} is not empty; give a new directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --work-dir {asked}: {error.strerror}; give another directory") from None
    yield path


def _report(rows: Sequence[Row], tolerance: Tolerance, options: argparse.Namespace) -> None:
    title = (
        f"{_TITLE} {tolerance.name}, at most {tolerance.value:g} "
        f"(floor of a gradient: {tolerance.floor:g} of the global norm)"
    )
    table = [cells(row) for row in rows]
    print_table(title, COLUMNS, table)
    for row in rows:
        if row.note:
            show(f"{row.layout}: {row.status}: {row.note}")
    if options.json:
        content = {"tolerance": dataclasses.asdict(tolerance), "layouts": [_plain(row) for row in rows]}
        write_file(options.json, "--json", _JSON, json.dumps(content, indent=1) + "\n")
    if options.markdown:
        notes = [f"\n{row.layout}: {row.note.splitlines()[0]}\n" for row in rows if row.note]
        text = f"{title}\n\n{markdown(COLUMNS, table)}" + "".join(notes)
        write_file(options.markdown, "--markdown", _MARKDOWN, text)


def _plain(row: Row) -> dict[str, Plain]:
    """A row as JSON has it, which knows no infinity: an error that is not finite is null."""
    values = dataclasses.asdict(row)
    for name, value in (values["comparison"] or {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            values["comparison"][name] = None
    return values


def cells(row: Row) -> list[str]:
    """One line of the table."""
    found = row.comparison
    numbers = [""] * 3 if found is None else [f"{x:.1e}" for x in (found.loss, found.grad_norm, found.gradient)]
    return [row.layout, str(row.ranks), *numbers, found.parameter if found else "", row.status]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ["---"] * len(columns), *rows])
