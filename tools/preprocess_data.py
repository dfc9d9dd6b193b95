#!/usr/bin/env python3
"""Megatron's ``preprocess_data.py`` by its own flags: JSON lines into ``P_KEY_document.bin/.idx``.

    python tools/preprocess_data.py --input X.jsonl --output-prefix P --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model DIR --workers 4 --append-eod

``phd-megatron prepare`` does the same and reads more kinds of files.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", required=True, help="a file of JSON lines, or of another kind that prepare reads")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys to take, one data set each")
    parser.add_argument(
        "--tokenizer-type", required=True, choices=("HuggingFaceTokenizer", "ByteTokenizer"), help="kind of tokenizer"
    )
    parser.add_argument("--tokenizer-model", help="directory of the Hugging Face tokenizer")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    return parser


def main(argv: list[str]) -> int:
    from phd_megatron.data.preprocess import prepare_keys

    arguments = parse_strictly(build_parser(), argv)
    spec = "byte" if arguments.tokenizer_type == "ByteTokenizer" else arguments.tokenizer_model
    if spec is None:
        raise UserError("--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model; give the tokenizer's directory")
    for result in prepare_keys(
        [arguments.input],
        arguments.output_prefix,
        spec,
        arguments.json_keys,
        workers=arguments.workers,
        append_eod=arguments.append_eod,
        overwrite=arguments.overwrite,
    ):
        print(f"{result.prefix}: {result.documents} documents, {result.tokens} tokens")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
