"""``phd-megatron sweep``: a family of runs, started together, continued, and compared."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from phd_megatron.cli.run_flags import run_options
from phd_megatron.config.catalog import nearest
from phd_megatron.console.arguments import Parser, parse_own, parse_strictly
from phd_megatron.console.tables import print_table, short
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from phd_megatron.sweep.definition import Sweep
    from phd_megatron.sweep.members import PlannedMember
    from phd_megatron.sweep.options import Launcher
    from phd_megatron.sweep.store import Status, Store

_USAGE = """\
phd-megatron sweep --config FILE --output DIR [--dry-run] [OPTIONS] [--any-field-of-a-run VALUE]
       phd-megatron sweep status DIR          how far the members are
       phd-megatron sweep report DIR          Markdown, HTML and plots of what they reached
       phd-megatron sweep member DIR NAME     run one member (SLURM and --launcher print use it)"""


def build_parser() -> Parser:
    """Flags of the command itself; what is left are fields of a run, for all members."""
    parser = Parser(prog="phd-megatron sweep", usage=_USAGE, description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="the sweep file (docs/sweeps.md)")
    parser.add_argument("--output", metavar="DIR", help="the sweep's directory; the same one continues it")
    parser.add_argument("--dry-run", action="store_true", help="print members, costs and memory, and start nothing")
    parser.add_argument("--launcher", choices=["local", "slurm", "print"], help="instead of the file's")
    parser.add_argument("--parallel", type=int, metavar="N", help="members at once, instead of the file's")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes of a member (torchrun), instead of the file's"
    )
    parser.add_argument(
        "--print", action="store_true", dest="print_only", help="slurm: write the script, submit nothing"
    )
    parser.add_argument("--retry-diverged", action="store_true", help="also continue members that diverged")
    return parser


def run(argv: list[str]) -> int:
    """Entry of the command: 0 when every member finished, 1 when one did not, 128 + signal when it was stopped."""
    actions = {"status": _status, "report": _report, "member": _member}
    if argv and argv[0] in actions:
        return actions[argv[0]](argv[1:])
    if argv and not argv[0].startswith("-"):
        hint = nearest(argv[0], actions) or f"use {', '.join(actions)}, or --config FILE to start a sweep"
        raise UserError(f"unknown action {argv[0]!r} of sweep; {hint}")
    args, rest = parse_own(build_parser(), argv, run_options())
    from phd_megatron.runtime.context import choose_device, install_backend

    install_backend(choose_device("auto")[0])  # before Megatron is imported, for its field names
    return _sweep(args, rest)


def _sweep(args: argparse.Namespace, rest: list[str]) -> int:
    from phd_megatron.checkpoint.run_lock import RunLock
    from phd_megatron.config.flags import parse_flags
    from phd_megatron.model.transformer_config import transformer_field_types
    from phd_megatron.sweep.definition import check_fields, read_sweep
    from phd_megatron.sweep.members import plan_members
    from phd_megatron.sweep.store import create

    types = transformer_field_types()
    sweep = read_sweep(args.config, types)
    flags = parse_flags(rest, types)
    if flags.preset is not None:
        raise UserError(
            f"--preset {flags.preset}: presets stand in the sweep file, as base or as an axis; write it there"
        )
    given = {"kind": args.launcher, "parallel": args.parallel, "ranks": args.ranks}
    launcher = replace(sweep.launcher, **{name: value for name, value in given.items() if value is not None}).check()
    if args.print_only and launcher.kind != "slurm":
        raise UserError(f"--print with launcher {launcher.kind}: it is for --launcher slurm; use --launcher print")
    sweep = replace(sweep, launcher=launcher)
    directory = Path(args.output or Path("runs") / sweep.name)
    check_fields(flags.values, "flags", types)
    members, notes = plan_members(sweep, directory, flags.values, check=not args.dry_run)
    _print_plan(sweep, members)
    for note in [*flags.notes, *notes]:
        show(f"note: {note}")
    if args.dry_run:
        return 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {directory}: {error.strerror}; choose another --output") from None
    try:
        lock = RunLock(directory).acquire()
    except UserError as error:
        raise UserError(
            f"a sweep is already at work in {directory}; wait for it, or use another --output ({error})"
        ) from None
    with ExitStack() as stack:
        stack.callback(lock.release)
        store = create(directory, sweep, members)
        return _launch(store, launcher, {m.config.parallel.device for m in members}, args)


def _launch(store: Store, launcher: Launcher, devices: set[str], args: argparse.Namespace) -> int:
    from phd_megatron.sweep.local import LocalRun, unfinished
    from phd_megatron.sweep.slurm import member_line, submit

    names = unfinished(store, args.retry_diverged)
    skipped = len(store.entries) - len(names)
    if skipped:
        show(f"{skipped} of {len(store.entries)} members have ended and are skipped")
    if not names:
        return _verdict(store, {entry.name: store.status(entry.name) for entry in store.entries})
    device = "cpu" if devices == {"cpu"} else "auto"
    if launcher.kind == "print":
        import shlex

        for name in names:
            show(shlex.join(member_line(store, name)))
        return 0
    if launcher.kind == "slurm":
        show(submit(store, names, launcher, uses_gpus=device != "cpu", print_only=args.print_only))
        return 0
    local = LocalRun(store, launcher, device)
    code = _verdict(store, local.run(names))
    return code if local.interrupted_by is None else 128 + local.interrupted_by


def _verdict(store: Store, statuses: Mapping[str, Status]) -> int:
    bad = {name: status for name, status in statuses.items() if status.state != "finished"}
    for name, status in bad.items():
        show(f"{name}: {status.state}{f': {status.message}' if status.message else ''}")
    show(f"{len(statuses) - len(bad)} of {len(statuses)} members finished in {store.directory}")
    if len(bad) < len(statuses):
        show(f"compare them: phd-megatron sweep report {store.directory}")
    return 1 if bad else 0


def _print_plan(sweep: Sweep, members: list[PlannedMember]) -> None:
    columns = ["member", "parameters", "active", "tokens", "iterations", "FLOPs", "device hours", "memory"]
    rows = []
    hours = 0.0
    for member in members:
        plan = member.plan
        needed = plan.device_hours(sweep.planning.peak_tflops, sweep.planning.mfu)
        hours += needed
        rows.append(
            [
                member.name,
                short(plan.parameters),
                short(plan.active_parameters),
                short(plan.tokens),
                f"{member.iterations:,}",
                f"{plan.flops:.3g}",
                f"{needed:,.3g}",
                f"{plan.memory.total / 2**30:,.2f} GiB",
            ]
        )
    ranks = sweep.launcher.ranks * sweep.launcher.nodes
    print_table(f"{sweep.title}: {len(members)} members, {ranks} rank{'s' * (ranks > 1)} each", columns, rows)
    show(
        f"{hours:,.3g} device hours in all at {sweep.planning.mfu:.0%} of {sweep.planning.peak_tflops:g} TFLOP/s "
        "(assumed: `planning` in the sweep file); memory is an estimate for a rank, without recomputation and before "
        "what the allocator and communication add"
    )


def _status(argv: list[str]) -> int:
    parser = Parser(prog="phd-megatron sweep status")
    parser.add_argument("directory", metavar="DIR")
    args = parse_strictly(parser, argv)
    from phd_megatron.sweep.process import present_status
    from phd_megatron.sweep.progress import COLUMNS, row
    from phd_megatron.sweep.store import open_store

    store = open_store(args.directory)
    statuses = {entry.name: present_status(store, entry.name) for entry in store.entries}
    print_table(store.title, COLUMNS, [row(store, name, status) for name, status in statuses.items()])
    for name, status in statuses.items():
        if status.message:
            show(f"{name}: {status.message}")
    return 0


def _member(argv: list[str]) -> int:
    parser = Parser(prog="phd-megatron sweep member")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("name", metavar="NAME")
    args = parse_strictly(parser, argv)
    from phd_megatron.sweep.options import Launcher, read_options
    from phd_megatron.sweep.process import MemberProcess
    from phd_megatron.sweep.store import PLAN_FILE, open_store

    store = open_store(args.directory)
    launcher = read_options(Launcher, store.launcher, f"{store.directory / PLAN_FILE}, launcher").check()
    if store.status(store.entry(args.name).name).state == "finished":
        show(f"{args.name} is finished")
        return 0
    process = MemberProcess(store, args.name, launcher)

    def stop(number: int, frame: FrameType | None) -> None:
        process.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    show(f"{args.name}: {status.state}{f': {status.message}' if status.message else ''}")
    return 0 if status.state == "finished" else 1


def _report(argv: list[str]) -> int:
    parser = Parser(
        prog="phd-megatron sweep report",
        description="Compare the members of a sweep by their metrics files: report.md, report.html, figures.",
    )
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--output", metavar="DIR", help="where to write; default DIR/report")
    args = parse_strictly(parser, argv)
    from phd_megatron.sweep.report import write_report

    paths = write_report(Path(args.directory), Path(args.output) if args.output else None)
    for path in paths:
        show(str(path))
    return 0
