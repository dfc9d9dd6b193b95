"""``phd-megatron import``: a Hugging Face directory as a checkpoint to go on from."""

from __future__ import annotations

import argparse
from typing import get_args

from phd_megatron.config.schema import CopyPositions
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import say, show
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import install_backend
from phd_megatron.runtime.environment import Environment

_MOST_EXPERTS = 4096

_MOST = {
    "phd_repeat": 1 << 16,
    "upcycle_experts": 1 << 14,
    "moe_router_topk": 1 << 14,
    "seq_length": 1 << 31,
    "make_vocab_size_divisible_by": 1 << 20,
}


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron import",
        description="Make a Megatron checkpoint of a Llama, Qwen3, OLMo 2, Mixtral, Qwen3-MoE or OLMoE directory, or "
        "of an export of ours. pretrain --load DIR --finetune goes on from it under any layout. CPU only; needs memory "
        "for the model in its own type, and to verify it in float32.",
    )
    parser.add_argument("--hf-dir", required=True, metavar="HF_DIR", help="config.json, safetensors, tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--phd-repeat", type=int, metavar="K", help="go on as a PHD model with K copies of a token")
    parser.add_argument("--phd-window", type=int, metavar="W", help="its window")
    parser.add_argument("--phd-chunk", type=int, metavar="C", help="its chunks; without W and C the paper's 16 and 32")
    parser.add_argument(
        "--phd-copy-positions",
        choices=get_args(CopyPositions),
        help="RoPE of its copies; token (the default) and fraction leave originals where the model has its tokens",
    )
    parser.add_argument(
        "--phd-copy-embedding", choices=("none", "vector"), help="vector adds a learned one to each copy, zero at first"
    )
    parser.add_argument("--upcycle-experts", type=int, metavar="E", help="make every FFN E experts, each a copy of it")
    parser.add_argument("--moe-router-topk", type=int, metavar="N", help="of which N compute a row (2)")
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens of a sample (default: the model's positions)"
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="padding of rows (%(default)s)"
    )
    parser.add_argument(
        "--verify",
        choices=("full", "none"),
        default="full",
        help="compare the checkpoint's logits of a text with transformers' (full, the default); with --phd-repeat "
        "those of its parameters without copies, then the originals beside copies with these after every layer but the "
        "last, and print the loss of the text with and without",
    )
    return parser


def run(argv: list[str]) -> int:
    """Import; UserError for anything that stands in the way."""
    args = parse_strictly(build_parser(), argv)
    Environment.read().refuse_others("import")
    if args.moe_router_topk is not None and args.upcycle_experts is None:
        raise UserError("--moe-router-topk without --upcycle-experts; give both, or leave it out")
    for name, most in _MOST.items():
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: use a number from 1 to {most:,}")
    names = ("phd_repeat", "phd_window", "phd_chunk", "phd_copy_positions", "phd_copy_embedding")
    phd = {name: getattr(args, name) for name in names}
    if args.upcycle_experts is not None and args.upcycle_experts > _MOST_EXPERTS:
        raise UserError(f"--upcycle-experts {args.upcycle_experts}: use at most {_MOST_EXPERTS:,}")
    install_backend("cpu")  # before Megatron is imported

    from phd_megatron.huggingface.importing.checkpoint import Changes, Imported, import_directory
    from phd_megatron.huggingface.verify import verify_import

    changes = Changes(
        {name: value for name, value in phd.items() if value is not None},
        args.upcycle_experts,
        2 if args.moe_router_topk is None else args.moe_router_topk,
        args.seq_length,
        args.make_vocab_size_divisible_by,
    )

    def verify(imported: Imported) -> None:
        losses = verify_import(imported.directory, imported.source.path, imported.architecture)
        if losses is not None:
            show(f"loss of a text at step 0: {losses.here:.4f} with copies, {losses.source:.4f} of {args.hf_dir}")

    check = verify if args.verify == "full" else lambda imported: None
    done = import_directory(args.hf_dir, args.output, changes, log=say, check=check)
    verified = "verified" if args.verify == "full" else "not verified"
    show(
        f"imported {args.hf_dir} to {done.directory}: {done.architecture.name}, {done.tensors} tensors read, "
        f"{done.parameters:,} parameters, {verified}\n"
        f"go on with: phd-megatron pretrain --load {args.output} --finetune --data-path ... --save ..."
    )
    return 0
