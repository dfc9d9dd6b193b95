"""``phd-megatron generate``: continue a prompt."""

from __future__ import annotations

import argparse

from phd_megatron.cli.model_flags import add_model_flags
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron generate",
        description="Continue a prompt through the KV cache. Greedy unless a sampling flag is given.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR_OR_HF_DIR", help="pretrain's --save directory, or an export"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (%(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample, with logits divided by T")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of mass P")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of sampling")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time (the default)")
    add_model_flags(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python files in HF_DIR")
    return parser


def run(argv: list[str]) -> int:
    """Print the prompt's continuation, then speed and cache size."""
    args = parse_strictly(build_parser(), argv)
    from phd_megatron.huggingface.generation import Sampling, check_amount, check_prompt, generate_text, load

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    check_amount(args.max_new_tokens)
    check_prompt(args.prompt)
    if sampling.options()["do_sample"] and args.greedy:
        raise UserError("--greedy and a sampling flag (--temperature, --top-k, --top-p) exclude each other; keep one")
    model, tokenizer = load(args.checkpoint, args.device, args.trust_remote_code, args.verify_checkpoint)
    result = generate_text(model, tokenizer, args.prompt, args.max_new_tokens, sampling, args.decode_kernel)
    show(args.prompt + result.text)
    show()
    show(result.summary())
    return 0
