"""``phd-megatron prepare merge`` and ``prepare inspect``: what is done with data that was prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import show, warn
from phd_megatron.errors import printable

if TYPE_CHECKING:
    from phd_megatron.data.inspection import Inspection

_BAR = 40  #: characters of the longest bar


def merge_parser() -> Parser:
    """The flags of ``prepare merge``."""
    parser = Parser(
        prog="phd-megatron prepare merge",
        description="Join data sets into one, byte for byte as Megatron's merge_datasets.py does.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="two data sets or more, in order")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    return parser


def inspect_parser() -> Parser:
    """The flags of ``prepare inspect``."""
    parser = Parser(
        prog="phd-megatron prepare inspect",
        description="Check a data set, and say how many documents and tokens it has, and how long they are.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="decode the beginning of N documents")
    parser.add_argument(
        "--tokenizer", metavar="byte|DIR", help="decode, and check ids, with it (default: PREFIX.tokenizer, if there)"
    )
    return parser


def merge(argv: list[str]) -> int:
    """Entry of the action; exit code 0, or UserError."""
    arguments = parse_strictly(merge_parser(), argv)
    from phd_megatron.data import merge as work

    try:
        result = work.merge(arguments.input, arguments.output_prefix, overwrite=arguments.overwrite)
    except KeyboardInterrupt:
        warn("error: interrupted; nothing was written")
        return 130
    about = "" if result.has_tokenizer else "; none of the inputs has a .meta.json, so there is no tokenizer beside it"
    show(
        f"{result.prefix}.bin/.idx: {result.documents:,} documents, {result.sequences:,} sequences, "
        f"{result.tokens:,} tokens of {len(arguments.input)} data sets{about}"
    )
    return 0


def inspect(argv: list[str]) -> int:
    """Entry of the action; exit code 0, or UserError."""
    arguments = parse_strictly(inspect_parser(), argv)
    from phd_megatron.data import inspection

    _show(inspection.inspect(arguments.prefix, samples=arguments.samples, tokenizer=arguments.tokenizer))
    return 0


def _show(found: Inspection) -> None:
    checked = "and ids (all of a small file, else 8 MiB) " if found.has_vocabulary else ""
    show(f"{found.prefix}.bin/.idx: the index {checked}checked; tokens are {found.dtype}")
    if found.sidecar is not None:
        tokenizer = found.sidecar["tokenizer"]
        words = " ".join(f"{key}={printable(str(tokenizer[key]))[:80]}" for key in sorted(tokenizer))
        show(f"prepared by version {printable(str(found.sidecar.get('version')))[:40]} with tokenizer {words}")
    show(f"documents  {found.documents:,} ({found.empty:,} without tokens)")
    show(f"sequences  {found.sequences:,}")
    show(f"tokens     {found.tokens:,}")
    show(
        f"tokens of a document: shortest {found.shortest:,}, mean {found.mean:,.1f}, median {found.median:,.1f}, "
        f"longest {found.longest:,}"
    )
    most = max((number for *_, number in found.histogram), default=1)
    width = len(f"{found.longest:,}") + 1
    for low, high, number in found.histogram:
        share = number / max(1, found.documents)
        bar = "#" * (-(-_BAR * number // most))
        show(f"{low:>{width},} to {high:>{width},}  {bar:<{_BAR}}  {number:,} ({share:.1%})")
    for sample in found.samples:
        show()
        show(f"document {sample.document:,}, {sample.tokens:,} tokens:")
        show(printable(sample.text))
