"""The flags of every bench, and what is refused before anything is loaded or measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.bench.place import TOLERANCES
from phd_megatron.bench.results import check_reports
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy

#: sizes of ``bench train``
SIZES: dict[str, dict[str, int]] = {
    "quickstart": {
        "num_layers": 6,
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 256,
        "vocab_size": 384,
        "micro_batch_size": 16,
    },
    "12x768": {
        "num_layers": 12,
        "hidden_size": 768,
        "ffn_hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "seq_length": 1024,
        "vocab_size": 32000,
        "micro_batch_size": 1,
    },
    "1p2b": {  # preset phd-1.2b
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "seq_length": 4096,
        "vocab_size": 32000,
        "micro_batch_size": 1,
    },
}
#: members of ``bench train --preset``: options of ``pretrain``
MEMBERS = {
    "vanilla": "--norm-scheme pre --phd-repeat 1",
    "hybrid_star": "--norm-scheme hybrid_star --phd-repeat 1",
    "K=2": "--norm-scheme pre --phd-repeat 2",
    "K=3": "--norm-scheme pre --phd-repeat 3",
    "repeated": "--phd-copy-positions repeated",
    "fraction": "--phd-copy-positions fraction",
    "vector": "--phd-copy-embedding vector",
    "delayed": "--norm-scheme pre --phd-repeat 1 --fp8-format hybrid --fp8-recipe delayed",
    "tensorwise": "--norm-scheme pre --phd-repeat 1 --fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--norm-scheme pre --phd-repeat 1 --fp8-format e4m3 --fp8-recipe blockwise",
    "grouped_mm": "--moe-experts-backend grouped_mm",
    "te": "--moe-experts-backend te",
    "sequential": "--moe-experts-backend sequential",
    # Recorded in the third step, the last that is not timed.
    "graph": "--cuda-graph-impl local --cuda-graph-scope full_iteration --cuda-graph-warmup-steps 2 "
    "--overlap-grad-reduce false --overlap-param-gather false",
}
#: models of ``bench generate`` that are compared with vanilla
VARIANTS = ("cswa", "swa", "phd", "naive")


@dataclass(frozen=True)
class Flags:
    """Flags of one bench.

    Attributes:
        add: puts them into a parser.
        counts: those that are 1 or more, besides ``rounds`` and ``threads``.
    """

    add: Callable[[Parser], None]
    counts: tuple[str, ...]


def parse(bench: str, argv: list[str], description: str | None) -> argparse.Namespace:
    """Flags of one bench, checked.

    Raises:
        UserError: for an unknown flag, a count below 1, heads that cannot share keys, or a file that is not replaced.
    """
    args = parse_strictly(parser(bench, description), argv)
    check_reports(args)
    for name in (*FLAGS[bench].counts, "rounds", "threads"):
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    if "kv_heads" in args and args.heads % args.kv_heads:
        raise UserError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}; change one of them")
    if bench == "norm_rope":
        for norms in args.norms:
            if not set(norms) <= set("qkv"):
                raise UserError(f"--norms {norms}: name some of q, k and v, such as qk")
    if bench == "generate" and min(args.repeats) < 2:
        raise UserError(f"--repeats {args.repeats}: K = 1 is always measured; name values of 2 or more")
    return args


def parser(bench: str, description: str | None = None) -> Parser:
    """The parser of one bench."""
    program = "phd-megatron bench " + {"norm_rope": "norm-rope", "members": "train --preset NAME"}.get(bench, bench)
    made = Parser(prog=program, description=description)
    FLAGS[bench].add(made)
    return made


def policies_of(args: argparse.Namespace) -> list[KVPolicy]:
    """One for each ``--repeat``.

    Raises:
        UserError: ``--window`` or ``--chunk`` cannot be.
    """
    from phd_megatron.phd.kv_policy import KVPolicy

    try:
        return [KVPolicy(repeat, args.window, args.chunk or None) for repeat in args.repeat]
    except ValueError as error:
        raise UserError(str(error)) from error


def _policy(parser: Parser, repeat: int) -> None:
    parser.add_argument(
        "--repeat", type=int, nargs="+", default=[repeat], help=f"K, copies of a token (default {repeat})"
    )
    parser.add_argument("--window", type=int, default=16, help="W, hidden positions seen (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=32, help="C, 0 for no chunks (default %(default)s)")


def _heads(parser: Parser, heads: int, kv_heads: int) -> None:
    parser.add_argument("--heads", type=int, default=heads, help="query heads (default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=kv_heads, help="key-value heads (default %(default)s)")


def _kernel(parser: Parser) -> None:
    """Flags that every bench of a kernel has."""
    parser.add_argument("--dtype", choices=TOLERANCES, default=None, help="default float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds after one to warm up")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    _json(parser)
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE", help="also write one line per measurement")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="also draw them (.png, .svg, .pdf)")


def _json(parser: Parser) -> None:
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers there")


def _attention(parser: Parser) -> None:
    parser.add_argument("--seq-length", type=int, nargs="+", default=[2048], help="original tokens (default 2048)")
    _policy(parser, 2)
    _heads(parser, 8, 2)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64], help="size of a head (default 64)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument(
        "--backends", nargs="+", default=None, metavar="NAME", help="only these (default: all that can run here)"
    )
    parser.add_argument(
        "--causal-kernels",
        nargs="+",
        default=[],
        metavar="NAME",
        help="time vanilla and backends with each of these vendor's operators too, such as cudnn 'flash-attn 4'",
    )
    parser.add_argument("--only-phd", action="store_true", help="leave out the dense mask and naive repetition")
    parser.add_argument(
        "--fail-above", type=float, default=None, metavar="RATIO", help="exit 1 if auto's backend / floor exceeds it"
    )
    _kernel(parser)


def _decode(parser: Parser) -> None:
    parser.add_argument("--kv-length", type=int, nargs="+", default=[4096], help="cached originals (default 4096)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences (default 1)")
    _policy(parser, 4)
    _heads(parser, 16, 4)
    parser.add_argument("--head-dim", type=int, default=128, help="size of a head (default %(default)s)")
    _kernel(parser)


def _documents(parser: Parser) -> None:
    parser.add_argument("--seq-length", type=int, default=4096, help="original tokens (default %(default)s)")
    parser.add_argument(
        "--mean-document-length", type=int, nargs="+", default=[512], metavar="N", help="in tokens (default 512)"
    )
    _policy(parser, 2)
    _heads(parser, 8, 2)
    parser.add_argument("--head-dim", type=int, default=64, help="size of a head (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--backend", default="auto", help="implementation of attention (default %(default)s)")
    parser.add_argument(
        "--fail-above", type=float, default=None, metavar="X", help="exit 1 if time / share of pairs exceeds it"
    )
    _kernel(parser)


def _norm_rope(parser: Parser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[4096], help="K * s rows (default 4096)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    _heads(parser, 16, 4)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128], help="size of a head (default 128)")
    parser.add_argument("--norms", nargs="+", default=["qkv"], metavar="SET", help="subsets of qkv that are normed")
    _kernel(parser)


def _generate(parser: Parser) -> None:
    parser.add_argument("--repeats", type=int, nargs="+", default=[2, 3, 4, 8], metavar="K", help="beside K = 1")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["cswa", "swa", "naive"])
    parser.add_argument("--window", type=int, default=16, help="W of cswa and swa (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=32, help="C of cswa (default %(default)s)")
    parser.add_argument("--norm-scheme", default="hybrid_star", help="default %(default)s")
    parser.add_argument("--num-layers", type=int, default=16, help="default %(default)s")
    parser.add_argument("--hidden-size", type=int, default=768, help="default %(default)s")
    parser.add_argument("--ffn-hidden-size", type=int, default=2304, help="default %(default)s")
    parser.add_argument("--num-attention-heads", type=int, default=16, help="default %(default)s")
    parser.add_argument("--num-query-groups", type=int, default=4, help="key-value heads (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=50304, help="tied embedding (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt (default %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="decoded tokens of a round (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds after one to warm up")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--device", default=None, help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    _json(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (PNG, SVG, PDF): latency over K")


def _train(parser: Parser) -> None:
    parser.add_argument("--size", choices=SIZES, default="quickstart", help="model and batch (default %(default)s)")
    parser.add_argument("--seq-length", type=int, default=None, help="instead of the size's own")
    parser.add_argument("--micro-batch-size", type=int, default=None, help="instead of the size's own")
    parser.add_argument("--repeat", type=int, default=2, help="K of the PHD contender (default %(default)s)")
    parser.add_argument("--norm-scheme", default="hybrid_star", help="scheme of a further contender at K = 1")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each, after two to warm up")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 parameters")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--transformer-impl", choices=("auto", "local", "transformer_engine"), default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: one per usable core)")
    _json(parser)
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if we are slower than Hugging Face or PHD exceeds K"
    )


def _members(parser: Parser) -> None:
    parser.add_argument("--preset", required=True, help="the model (docs/presets.md)")
    parser.add_argument(
        "--members",
        nargs="+",
        default=["vanilla", "hybrid_star", "K=2", "K=3"],
        metavar="NAME",
        help=f"of {', '.join(MEMBERS)}; joined by + where both shall hold, as K=2+delayed or K=2+vector",
    )
    parser.add_argument(
        "--define",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "OPTIONS"),
        help='a further name for --members, by options of pretrain: --define small "--num-layers 4"',
    )
    parser.add_argument("--options", default="", help='further options of pretrain for all, e.g. "--vocab-size 50304"')
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument(
        "--num-microbatches",
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches of a step (default %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each, after three to warm up")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--peak-tflops", type=float, default=None, help="instead of the table's for this device")
    _json(parser)


FLAGS = {
    "attention": Flags(_attention, ("seq_length", "repeat", "heads", "kv_heads", "head_dim", "batch")),
    "decode": Flags(_decode, ("kv_length", "batch", "repeat", "heads", "kv_heads", "head_dim")),
    "documents": Flags(
        _documents, ("seq_length", "mean_document_length", "repeat", "heads", "kv_heads", "head_dim", "batch")
    ),
    "norm_rope": Flags(_norm_rope, ("rows", "batch", "heads", "kv_heads", "head_dim")),
    "generate": Flags(
        _generate,
        (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "vocab_size",
            "prompt",
            "steps",
            "batch",
        ),
    ),
    "train": Flags(_train, ("repeat", "seq_length", "micro_batch_size")),
    "members": Flags(_members, ("micro_batch_size", "num_microbatches")),
}
