"""``phd-megatron average``: the mean of a run's checkpoints as one checkpoint."""

from __future__ import annotations

import argparse

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import say, show
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import install_backend
from phd_megatron.runtime.environment import Environment


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron average",
        description="Average the parameters of checkpoints of one run, saved by any layout, into a checkpoint without "
        "optimizer, which export, evaluate and generate take, and pretrain --load --finetune goes on from. CPU only; "
        "needs memory for the model.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="directory of pretrain's --save")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, metavar="N", help="average the newest N complete checkpoints")
    which.add_argument("--iterations", type=int, nargs="+", metavar="I", help="average those of these iterations")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--verify-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every file of the checkpoints with its checksum first (on)",
    )
    return parser


def run(argv: list[str]) -> int:
    """Average; UserError for anything that stands in the way."""
    args = parse_strictly(build_parser(), argv)
    Environment.read().refuse_others("average")
    count = args.last if args.iterations is None else len(args.iterations)
    if count < 2:
        words = f"--last {args.last}" if args.iterations is None else f"--iterations {args.iterations[0]}"
        raise UserError(f"{words}: a mean is of two checkpoints or more; give 2 or more")
    install_backend("cpu")  # before Megatron is imported

    from phd_megatron.training.averaging import average, choose

    iterations = choose(args.checkpoint, args.last, args.iterations)
    done = average(args.checkpoint, iterations, args.output, verify=args.verify_checkpoint, log=say)
    show(
        f"averaged {len(iterations)} checkpoints of {args.checkpoint} (iterations {', '.join(map(str, iterations))}) "
        f"to {done.directory}: {done.tensors} tensors, {done.parameters:,} parameters"
    )
    return 0
