"""``python -m evidence``: build texts, run the queue in pieces, keep the results, write the report."""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from .queue import Queue

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/trained"
CORPUS = ROOT / ".corpus"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of queue, runs and report")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of packages, texts and archives")
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="packages into train, valid and valid_folders, as JSON lines")
    corpus.add_argument("text")
    corpus.add_argument("--update", action="store_true", help="take the packages' present versions and note them")
    packed = commands.add_parser("pack", help="tokenise a text and pack it for the GPU machine")
    packed.add_argument("text")
    packed.add_argument("--part-bytes", type=int, default=48_000_000, help="of each part")
    packed.add_argument("--workers", type=int, default=2)
    hard = commands.add_parser(
        "ngram", help="whether the validation parts of a prepared text are like its training part"
    )
    hard.add_argument("text")
    hard.add_argument("--counted", type=int, default=60_000_000, help="tokens of the training part")
    commands.add_parser("status", help="what of the queue has been run, what is next, what waits")
    commands.add_parser("run", help="take the next experiments that fit the time (tests/gpu/run.sh evidence)")
    commands.add_parser("rates", help="write the rates that the grids give so far into rates.yaml")
    fold = commands.add_parser("fold", help="put the records that a piece left into runs/")
    fold.add_argument("file", type=Path)
    commands.add_parser("report", help="write README.md and its figures from runs/")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return _COMMANDS[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _corpus(args: argparse.Namespace) -> int:
    from .corpus import build, summary

    definition = args.results / "texts" / f"{args.text}.yaml"
    print("\n".join(summary(build(definition, args.corpus / "debs", args.corpus / args.text, args.update))))
    return 0


def _pack(args: argparse.Namespace) -> int:
    from .prepared import prepare_and_pack

    for part in prepare_and_pack(args.corpus / args.text, args.corpus / "ship", args.part_bytes, args.workers):
        print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")
    return 0


def _ngram(args: argparse.Namespace) -> int:
    from .ngram import compare_parts, lines_of
    from .prepared import DATA, VOCABULARY

    found = compare_parts(args.corpus / args.text / DATA, VOCABULARY, args.counted, 2_100_000)
    print("\n".join(lines_of(found)))
    return 0


def _run(args: argparse.Namespace) -> int:
    from .piece import open_piece

    piece = open_piece()
    queue = _queue(piece.queue)
    from .runner import Runner

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # runs save, records are written
    Runner(piece, queue).run()
    return 0


def _queue(path: Path) -> Queue:
    from phd_megatron.runtime.context import choose_device, install_backend

    install_backend(choose_device("auto")[0])  # before Megatron is imported, for its field names
    from phd_megatron.model.transformer_config import transformer_field_types

    from .queue import read_queue

    return read_queue(path, transformer_field_types())


def _status(args: argparse.Namespace) -> int:
    queue = _queue(args.results / "queue.yaml")
    for variant, why in queue.blocked.items():
        print(f"variant {variant} cannot be run: {why}")
    for section in queue.sections:
        if section.name == queue.anchor:
            continue
        for text in section.texts:
            found = [e for e in queue.experiments if e.section is section and e.text == text]
            done = [e for e in found if (queue.runs / f"{e.name}.json").exists()]
            waits = Counter(e.waits_for for e in found if e.waits_for)
            why = "".join(f"; {count} wait for {what}" for what, count in waits.items())
            print(f"item {section.item}, {text}-{section.name}: {len(done)} of {len(found)} run{why}")
    return 0


def _fold(args: argparse.Namespace) -> int:
    from .fold import fold

    for line in fold(args.file, args.results / "runs", ROOT):
        print(line)
    return 0


def _rates(args: argparse.Namespace) -> int:
    from .piece import DONE, work_folder
    from .rates import choose_rates, read_records, write_rates

    queue = _queue(args.results / "queue.yaml")
    rates = choose_rates(queue, read_records([queue.runs, work_folder() / DONE]))
    print(f"{write_rates(queue, rates)}: {', '.join(f'{text} {name}' for text, of in rates.items() for name in of)}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import write_report

    print(write_report(_queue(args.results / "queue.yaml"), args.results))
    return 0


_COMMANDS = {
    "corpus": _corpus,
    "pack": _pack,
    "ngram": _ngram,
    "status": _status,
    "run": _run,
    "rates": _rates,
    "fold": _fold,
    "report": _report,
}

if __name__ == "__main__":
    raise SystemExit(main())
