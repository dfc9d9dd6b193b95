"""``phd-megatron export``: a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import argparse

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import say, show


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron export",
        description="Write a checkpoint, saved by any layout, as a self-contained Hugging Face directory. CPU only.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR[/iter_N]", help="directory of pretrain's --save")
    parser.add_argument("--output", required=True, metavar="HF_DIR", help="directory to make")
    parser.add_argument(
        "--dtype", default="auto", metavar="auto|float32|bfloat16|float16", help="type of the weights (%(default)s)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace HF_DIR if it exists")
    parser.add_argument(
        "--verify",
        choices=("full", "tensors", "none"),
        default="full",
        help="load the result and compare every tensor with the checkpoint, and (full, the default) the logits of "
        "a text with those of the Megatron model: some seconds, and memory for the whole model in float32",
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
        default=True,
        help="use transformers' own class where one computes the same, such as Llama (on)",
    )
    return parser


def run(argv: list[str]) -> int:
    """Export; UserError for anything that stands in the way."""
    args = parse_strictly(build_parser(), argv)
    from phd_megatron.huggingface.export import export_checkpoint

    report = export_checkpoint(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        verify=args.verify,
        native=args.native,
        verify_checkpoint=args.verify_checkpoint,
        log=say,
    )
    show(str(report))
    return 0
