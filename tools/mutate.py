"""Do the tests see bugs? Plants those of ``tests/mutants`` and some drawn by chance, and prints the score by area.

    python tools/mutate.py                      # both kinds; an hour on two cores
    python tools/mutate.py planted --area sweep
    python tools/mutate.py drawn --count 80 --seed 3 --results /tmp/drawn.jsonl

Works in copies of the checkout. Exit code 1 when too few are seen: less than 95 % of all, or 90 % of an area's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mutation.bugs import Near, TableError, equivalent, planted
from mutation.campaign import CAUGHT, EQUIVALENT, SURVIVED, UNTESTED, Campaign, Outcome, score
from mutation.draw import draw

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "tests/mutants"
WANTED, WANTED_OF_AN_AREA = 0.95, 0.90


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("planted", "drawn", "both"), default="both")
    parser.add_argument("--area", action="append", default=[], help="only of this area; may be repeated")
    parser.add_argument("--count", type=int, help="bugs to draw (default: as many as are planted)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn ones")
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time, each in its copy")
    parser.add_argument("--results", type=Path, help="JSON lines that grow; bugs that stand there are not tried again")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables")
    parser.add_argument("--list", action="store_true", help="print the bugs and run nothing")
    arguments = parser.parse_args(argv)
    try:
        near = Near(arguments.tables)
        by_hand = [bug for bug in planted(arguments.tables, ROOT) if not arguments.area or bug.area in arguments.area]
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = len(by_hand) if arguments.count is None else arguments.count
    bugs = [] if arguments.kind == "drawn" else by_hand
    if arguments.kind != "planted":
        bugs += draw(ROOT, count, arguments.seed, near, arguments.area)
    if arguments.list:
        for bug in bugs:
            print(f"{bug.area:12} {bug.file}:{bug.line}  {bug.what}: {bug.context(ROOT)}")
        return 0
    campaign = Campaign(
        ROOT,
        jobs=arguments.jobs,
        equivalent=equivalent(arguments.tables),
        results=arguments.results,
        say=lambda text: print(text, flush=True),
    )
    try:
        outcomes = campaign.run(bugs)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(outcomes))
    return 0 if is_enough(outcomes) else 1


def is_enough(outcomes: Sequence[Outcome]) -> bool:
    """Whether 95 % of all bugs were seen, and 90 % of each area's."""
    return all(
        caught >= (WANTED if area == "all" else WANTED_OF_AN_AREA) * total
        for area, (caught, total) in score(outcomes).items()
    )


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of areas, and every bug that was not seen."""
    lines = ["", f"{'area':14}{'planted':>12}{'drawn':>12}{'seen':>8}"]
    kinds = [score([outcome for outcome in outcomes if outcome.drawn is drawn]) for drawn in (False, True)]
    for area, (seen, total) in score(outcomes).items():
        parts = "".join(f"{'{}/{}'.format(*kind.get(area, (0, 0))):>12}" for kind in kinds)
        lines.append(f"{area:14}{parts}{seen / total:>8.0%}")
    for verdict, title in (
        (SURVIVED, "survived"),
        (UNTESTED, "no table names tests for"),
        (EQUIVALENT, "not counted, since nothing can tell them apart"),
    ):
        rows = [outcome for outcome in outcomes if outcome.verdict == verdict]
        if rows:
            lines += ["", f"{title}:"] + [f"  {row.file}: {row.what}: {row.change}" for row in rows]
    caught = [outcome for outcome in outcomes if outcome.verdict == CAUGHT]
    lines += ["", f"{len(outcomes)} bugs, {len(caught)} seen"]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
