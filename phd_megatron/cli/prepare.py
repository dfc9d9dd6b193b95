"""``phd-megatron prepare``: text into training data."""

from __future__ import annotations

import argparse
import os

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import show, warn
from phd_megatron.errors import UserError


def _number(text: str) -> int:
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit() or len(text) > 18:
        raise UserError(f"--workers {text[:40]!r} is no number of processes; give for example 4")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = Parser(
        prog="phd-megatron prepare",
        description="Turn text into Megatron .bin/.idx data. Each document ends with the end-of-document token.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE_OR_DIR",
        help="files of kind .txt .md .py .jsonl .jsonl.gz .json.gz .parquet, or directories of them",
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
    parser.add_argument("--json-key", default="text", metavar="KEY", help="field or column of the text (%(default)s)")
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
    arguments = parse_strictly(build_parser(), argv)
    from phd_megatron.data.preprocess import prepare

    try:
        result = prepare(
            arguments.input,
            arguments.output_prefix,
            arguments.tokenizer,
            workers=arguments.workers,
            on_decode_error=arguments.on_decode_error,
            json_key=arguments.json_key,
            overwrite=arguments.overwrite,
            progress=not arguments.no_progress,
        )
    except KeyboardInterrupt:
        warn("error: interrupted; nothing was written")
        return 130
    for item in result.skipped:
        lines = f"{item['lines']} lines of " if "lines" in item else ""
        warn(f"skipped {lines}{item['file']}: {item['reason']}")
    for note in result.notes:
        warn(f"note: {note}")
    show(
        f"{result.prefix}.bin/.idx: {result.documents:,} documents, {result.tokens:,} tokens of a vocabulary of "
        f"{result.vocab_size:,}, from {result.bytes / 1e6:.1f} MB of text in {result.seconds:.1f} s "
        f"({result.bytes / 1e6 / max(result.seconds, 1e-9):.1f} MB/s); {result.empty_documents} empty documents and "
        f"{len(result.skipped)} files with undecodable text left out"
    )
    return 0
