"""``phd-megatron plan``: what a run costs, said before a device is booked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phd_megatron.cli.plan_dry import add_flags, refuse_flags, run_dry
from phd_megatron.cli.run_flags import run_options
from phd_megatron.console.arguments import Parser, parse_own
from phd_megatron.console.tables import print_table, short
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from phd_megatron.planning.run_plan import RunPlan


def build_parser() -> Parser:
    """Flags of the command itself; what is left describes the run, as for ``pretrain``."""
    parser = Parser(
        prog="phd-megatron plan",
        usage="phd-megatron plan [--ranks N] [--mfu X] [--mean-document-length N] [--dry-run [--rank R | --all-stages] "
        "[--gpus-per-node N] [--expert-imbalance X] [--json FILE [--order]]] [--preset NAME] [--config FILE] "
        "[--any-field-of-a-run VALUE]",
        description="Parameters, FLOPs, memory of a rank and device hours of a run, by formula; with --dry-run what "
        "the code of a rank sends, holds and multiplies (docs/planning.md). Nothing is started.",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="processes of the run (1)")
    parser.add_argument("--gpus", type=int, metavar="N", help="the same as --ranks")
    parser.add_argument("--mfu", type=float, metavar="X", help="share of the peak that is reached; an assumption (0.4)")
    parser.add_argument(
        "--mean-document-length",
        type=float,
        metavar="N",
        help="tokens of a document, where --reset-attention-mask keeps them apart; lengths are taken as geometric",
    )
    add_flags(parser)
    return parser


def run(argv: list[str]) -> int:
    """Print the plan; UserError for a run that cannot be."""
    args, rest = parse_own(build_parser(), argv, run_options())
    from phd_megatron.runtime.context import choose_device, install_backend

    device = "cpu" if args.dry_run else choose_device("auto")[0]  # a dry run takes the CPU path wherever it is
    install_backend(device)  # before Megatron is imported, for its field names
    from phd_megatron.config.resolve import resolve
    from phd_megatron.planning.peak import ASSUMED_DEVICE, ASSUMED_MFU, PEAK_TFLOPS
    from phd_megatron.planning.run_plan import plan_run
    from phd_megatron.training.start import fix_size, load_config

    args.ranks = _ranks(args.ranks, args.gpus)
    refuse_flags(args)
    mfu = ASSUMED_MFU if args.mfu is None else args.mfu
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu} is no share of the peak; use a value above 0 and at most 1")
    length = args.mean_document_length
    if length is not None and not 1 <= length < float("inf"):
        raise UserError(f"--mean-document-length {length} is no mean of lengths in tokens; use a number from 1 on")
    loaded = load_config(rest)
    config = loaded.config
    notes = loaded.notes + resolve(config)
    samples, iterations = fix_size(config, args.ranks)
    if args.dry_run:
        for note in notes:
            show(f"note: {note}")
        run_dry(args, config)
        return 0
    plan = plan_run(config, samples, args.ranks, length)
    if config.data.reset_attention_mask and length is None:
        notes.append(
            "documents are kept apart, and FLOPs count one a sample, so they are an upper bound; "
            "--mean-document-length N counts shorter ones"
        )
    peak = config.logging.peak_tflops or PEAK_TFLOPS[ASSUMED_DEVICE]
    hours = plan.device_hours(peak, mfu)
    days = [f"days on {args.ranks} rank{'s' * (args.ranks > 1)}", f"{hours / args.ranks / 24:,.3g}"]
    rows = [*_work(plan, iterations), ["device hours", f"{hours:,.4g}"], days, *_memory(plan)]
    print_table("plan", ["what", "value"], rows)
    for note in notes:
        show(f"note: {note}")
    show(
        f"hours: {mfu:.0%} of {peak:g} TFLOP/s a device, dense (assumed: --mfu, --peak-tflops). FLOPs: forward and "
        "backward, visible attention pairs only.\nmemory: an estimate, without recomputation unless whole layers are "
        "recomputed; what the allocator, kernels and communication add comes on top: leave a fifth of the device free"
    )
    return 0


def _ranks(ranks: int | None, gpus: int | None) -> int:
    if ranks is not None and gpus is not None:
        raise UserError(f"--ranks {ranks} and --gpus {gpus} say the same; give one of them")
    name, count = ("--gpus", gpus) if gpus is not None else ("--ranks", 1 if ranks is None else ranks)
    if count < 1:
        raise UserError(f"{name} {count} is out of range; use a value at least 1")
    return count


def _work(plan: RunPlan, iterations: int) -> list[list[str]]:
    """What there is to compute."""
    return [
        ["parameters", short(plan.parameters)],
        ["of these active for a token", short(plan.active_parameters)],
        ["active ones outside the vocabulary's matrices", short(plan.non_embedding_parameters)],
        ["tokens (original)", short(plan.tokens)],
        ["tokens (processed)", short(plan.processed_tokens)],
        ["iterations", f"{iterations:,}"],
        ["training FLOPs of a token", f"{plan.flops_per_token:.4g}"],
        ["training FLOPs", f"{plan.flops:.4g}"],
    ]


def _memory(plan: RunPlan) -> list[list[str]]:
    """What a rank holds."""
    memory = plan.memory
    sizes = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "all": memory.total,
    }
    return [[f"memory of a rank: {name}", f"{size / 2**30:,.2f} GiB"] for name, size in sizes.items()]
