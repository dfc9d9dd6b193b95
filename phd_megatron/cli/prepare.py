"""``phd-megatron prepare``: text into training data."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, TypedDict

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import show, warn
from phd_megatron.data.inputs import SUPPORTED
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from phd_megatron.data.preprocess import PrepareResult
    from phd_megatron.data.readers import OnDecodeError


class _Options(TypedDict):
    workers: int
    on_decode_error: OnDecodeError
    overwrite: bool
    progress: bool


def _number(text: str) -> int:
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit() or len(text) > 18:
        raise UserError(f"--workers {text[:40]!r} is no number of processes; give for example 4")
    return int(text)


_USAGE = """\
phd-megatron prepare --input FILE_OR_DIR ... --output-prefix P [OPTIONS]
       phd-megatron prepare merge --input PREFIX ... --output-prefix P    join data sets
       phd-megatron prepare inspect PREFIX [--samples N]                  check one, and say what it holds"""


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = Parser(
        prog="phd-megatron prepare",
        usage=_USAGE,
        description="Turn text into Megatron .bin/.idx data. Each document ends with the end-of-document token.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE_OR_DIR",
        help=f"files of kind {SUPPORTED}, directories of them, or data sets that Hugging Face's save_to_disk wrote",
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx, P.tokenizer/, ...")
    parser.add_argument(
        "--tokenizer",
        default="byte",
        metavar="byte|bpe:N|DIR",
        help="raw bytes, a BPE tokenizer of N tokens trained here, or a Hugging Face tokenizer directory",
    )
    parser.add_argument(
        "--workers", type=_number, default=os.cpu_count() or 1, metavar="N", help="processes (as many as cores)"
    )
    parser.add_argument(
        "--json-key", metavar="KEY", help="field or column of the text, or a.b for field b of object a (text)"
    )
    parser.add_argument(
        "--json-keys", nargs="+", metavar="KEY", help="several, each into a data set of its own, P_KEY_document"
    )
    parser.add_argument(
        "--on-decode-error",
        choices=("fail", "skip"),
        default="fail",
        help="what to do with text that is not valid UTF-8 (or, for .py, what its coding line says)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument("--no-progress", action="store_true", help="show no progress")
    return parser


def run(argv: list[str]) -> int:
    """Entry of the command; exit code 0, or UserError."""
    if argv and argv[0] in ("merge", "inspect"):
        from phd_megatron.cli import prepare_data_sets

        return (prepare_data_sets.merge if argv[0] == "merge" else prepare_data_sets.inspect)(argv[1:])
    if argv and not argv[0].startswith("-"):
        raise UserError(f"unknown action {argv[0][:80]!r} of prepare; use merge, inspect, or --input to prepare text")
    arguments = parse_strictly(build_parser(), argv)
    if arguments.json_key is not None and arguments.json_keys is not None:
        raise UserError("--json-key and --json-keys: both name the keys of the text; give one of them")
    from phd_megatron.data.preprocess import prepare, prepare_keys

    options: _Options = {
        "workers": arguments.workers,
        "on_decode_error": arguments.on_decode_error,
        "overwrite": arguments.overwrite,
        "progress": not arguments.no_progress,
    }
    words = arguments.input, arguments.output_prefix, arguments.tokenizer
    try:
        if arguments.json_keys is not None:
            for result in prepare_keys(*words, arguments.json_keys, **options):
                _report(result)
        else:
            _report(prepare(*words, json_key=arguments.json_key or "text", **options))
    except KeyboardInterrupt:
        warn("error: interrupted; what is not reported above was not written")
        return 130
    return 0


def _report(result: PrepareResult) -> None:
    for item in result.skipped:
        counted = next((f"{item[unit]} {unit} of " for unit in item if unit not in ("file", "reason")), "")
        warn(f"skipped {counted}{item['file']}: {item['reason']}")
    for note in result.notes:
        warn(f"note: {note}")
    show(
        f"{result.prefix}.bin/.idx: {result.documents:,} documents, {result.tokens:,} tokens of a vocabulary of "
        f"{result.vocab_size:,}, from {result.bytes / 1e6:.1f} MB of text in {result.seconds:.1f} s "
        f"({result.bytes / 1e6 / max(result.seconds, 1e-9):.1f} MB/s); {result.empty_documents} empty documents and "
        f"{len(result.skipped)} files with undecodable text left out"
    )
