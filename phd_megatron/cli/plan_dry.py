"""``phd-megatron plan --dry-run``: flags, refusals and tables."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from phd_megatron.config.schema import RunConfig
from phd_megatron.console.arguments import Parser
from phd_megatron.console.tables import print_table, short
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError
from phd_megatron.runtime.output import check_file, json_report, write_file

if TYPE_CHECKING:
    from phd_megatron.planning.dry_plan import RankPlan

REPORT = json_report("what a dry run wrote", "dry_run")
_SHOWN = 8  # products


def add_flags(parser: Parser) -> None:
    """Flags of a dry run."""
    parser.add_argument(
        "--dry-run", action="store_true", help="run the code of one rank without values: transfers, memory, products"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="the rank of the dry run (0)")
    parser.add_argument("--all-stages", action="store_true", help="the first rank of every pipeline stage instead")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks that talk over NVLink (8)")
    parser.add_argument(
        "--expert-imbalance", type=float, metavar="X", help="times their even share that this rank's experts get (1)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that the dry run found there")
    parser.add_argument("--order", action="store_true", help="with --json: transfers and products one after the other")


def refuse_flags(args: argparse.Namespace) -> None:
    """Refuse what only a dry run has, without one, and what it cannot take, before any work.

    Raises:
        UserError: with the flag.
    """
    used = ("rank", "all_stages", "gpus_per_node", "expert_imbalance", "json", "order")
    given = [name for name in used if getattr(args, name) not in (None, False)]
    if given and not args.dry_run:
        raise UserError(f"--{given[0].replace('_', '-')} is of a dry run alone; add --dry-run, or leave it out")
    if args.dry_run and (args.mfu is not None or args.mean_document_length is not None):
        name = "--mfu" if args.mfu is not None else "--mean-document-length"
        raise UserError(f"{name} says nothing to a dry run, which times nothing and knows no documents; leave it out")
    if args.rank is not None and args.all_stages:
        raise UserError(f"--rank {args.rank} and --all-stages both say which ranks; give one of them")
    if args.rank is not None and not 0 <= args.rank < args.ranks:
        raise UserError(
            f"--rank {args.rank} is not in a world of {args.ranks}; ranks count from 0 to {args.ranks - 1}: correct "
            "it, or --gpus"
        )
    if args.gpus_per_node is not None and args.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node {args.gpus_per_node} is out of range; use a value at least 1")
    if args.order and args.json is None:
        raise UserError("--order goes into the file of --json, and there is none; add --json FILE, or leave it out")
    if args.json is not None:
        check_file(args.json, "--json", REPORT)


def run_dry(args: argparse.Namespace, config: RunConfig) -> None:
    """Trace the ranks that are asked for, print them, and write the file.

    Raises:
        UserError: for a run that cannot be traced.
    """
    from phd_megatron.runtime.parallel_dims import ParallelDims
    from phd_megatron.training.dry_run import dry_run

    ranks = [args.rank or 0]
    if args.all_stages:
        dims = ParallelDims.from_config(config.parallel, args.ranks)
        ranks = [stage * (args.ranks // dims.pp) for stage in range(dims.pp)]
    plans = []
    for rank in ranks:
        plan = dry_run(
            config,
            args.ranks,
            rank,
            per_node=args.gpus_per_node or 8,
            imbalance=1.0 if args.expert_imbalance is None else args.expert_imbalance,
            order=args.order,
        )
        plans.append(plan)
        _print(plan)
    show(
        "dry run: the code of these ranks without values, on the CPU path: a GPU's kernels hold other temporaries, and "
        "what the allocator wastes\nand NCCL's buffers hold is not in it. Bytes of a transfer are those of its whole "
        "tensor. Rows of experts are routed "
        + ("evenly" if args.expert_imbalance is None else f"{args.expert_imbalance:g} times evenly to these ranks")
        + (f"; micro-batches beyond {plans[0].run[-1]} follow from those run" if len(plans[0].run) > 1 else "")
    )
    if args.json is not None:
        found = {"dry_run": [plan.as_dict() for plan in plans], "gpus_per_node": args.gpus_per_node or 8}
        write_file(args.json, "--json", REPORT, json.dumps(found, indent=1) + "\n")


def _print(plan: RankPlan) -> None:
    title = f"rank {plan.rank} of {plan.world_size}: {plan.layout}, {plan.microbatches} micro-batches a step"
    words = [[name, text] for name, text in plan.path.items()]
    print_table(title, ["traced", "what"], words)
    kinds = {*plan.held, *plan.at_peak}
    order = [name for name in ("weights", "gradients", "optimizer", "activations") if name in kinds]
    rows = [
        [name, _gib(plan.held.get(name, 0)), _gib(plan.at_peak.get(name, 0))]
        for name in [*order, *sorted(kinds - {*order})]
    ]
    print_table(
        "memory",
        ["kind", "between steps", "at the peak"],
        [*rows, ["all", _gib(sum(plan.held.values())), _gib(plan.peak)]],
    )
    transfers = [
        [f"{row.kind} {row.group}", str(row.size), str(row.stride), row.link, f"{row.calls:,}", f"{row.bytes:,}"]
        for row in plan.collectives
    ]
    print_table("transfers of a step", ["what", "ranks", "stride", "link", "calls", "bytes"], transfers)
    largest = sorted(plan.products.items(), key=lambda item: -item[0].flops * item[1])
    products = [
        [p.what, f"{p.batch} x [{p.m}, {p.k}] [{p.k}, {p.n}]", f"{calls:,}", short(p.flops * calls)]
        for p, calls in largest[:_SHOWN]
    ]
    others = sum(p.flops * calls for p, calls in largest[_SHOWN:])
    products.append([f"{max(0, len(largest) - _SHOWN)} others", "", "", short(others)])
    print_table(f"products of a step: {plan.flops:.4g} FLOPs", ["what", "shapes", "calls", "FLOPs"], products)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f} GiB"
