"""``phd-megatron export``: a checkpoint as a Hugging Face directory, or as Megatron-Core's own model saves it."""

from __future__ import annotations

import argparse

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import say, show
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import choose_device, install_backend

_SHARD_SIZE = "5GB"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron export",
        description="Write a checkpoint, saved by any layout, as a self-contained Hugging Face directory, or for "
        "Megatron-LM and Bridge. CPU only.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR[/iter_N]", help="directory of pretrain's --save")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--to",
        choices=("hf", "megatron"),
        default="hf",
        help="a Hugging Face directory (%(default)s), or parameters as Megatron-Core's own GPTModel saves them: "
        "torch_dist, for --load --finetune of Megatron-LM, of models with K = 1 and pre or pre_qk",
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="auto|float32|bfloat16|float16", help="type of the weights (%(default)s)"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help=f"of one weight file ({_SHARD_SIZE})")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is such an export")
    parser.add_argument(
        "--verify",
        choices=("full", "tensors", "none"),
        help="load the result and compare every tensor with the checkpoint, and (full, the default of hf) the logits "
        "of a text with those of the Megatron model: some seconds, and memory for the whole model in float32",
    )
    parser.add_argument(
        "--verify-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every file of the checkpoint with its checksum first (on)",
    )
    parser.add_argument(
        "--native",
        action=argparse.BooleanOptionalAction,
        help="use transformers' own class where one computes the same, such as Llama (on)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja text of how a conversation becomes a prompt, tried and then saved with the tokenizer; without one "
        "the model continues texts, and serve and chat say so",
    )
    return parser


def run(argv: list[str]) -> int:
    """Export; UserError for anything that stands in the way."""
    args = parse_strictly(build_parser(), argv)
    if args.to == "megatron":
        return _to_megatron(args)
    from phd_megatron.huggingface.export import export_checkpoint

    report = export_checkpoint(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size or _SHARD_SIZE,
        overwrite=args.overwrite,
        verify=args.verify or "full",
        native=args.native is not False,
        verify_checkpoint=args.verify_checkpoint,
        chat_template=args.chat_template,
        log=say,
    )
    show(str(report))
    return 0


def _to_megatron(args: argparse.Namespace) -> int:
    given = {"--max-shard-size": args.max_shard_size, "--native": args.native, "--chat-template": args.chat_template}
    if unused := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{' and '.join(unused)} with --to megatron: no effect on it; leave that out")
    if args.verify == "full":
        raise UserError("--verify full with --to megatron: logits are compared for --to hf only; use tensors or none")
    install_backend(choose_device("cpu", 0)[0])  # before Megatron is imported

    from phd_megatron.huggingface.to_megatron import export_to_megatron

    report = export_to_megatron(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        overwrite=args.overwrite,
        verify=args.verify != "none",
        verify_checkpoint=args.verify_checkpoint,
        log=say,
    )
    show(report)
    return 0
