"""Write the tables that pages take from the code: norm schemes, tested versions, what differs between versions.

``--check`` only compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from phd_megatron.norm.schemes import ALIASES, NORM_SCHEMES, BlockNorm, NormScheme
from phd_megatron.runtime import compatibility, mcore_versions

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- {}: written by tools/write_tables.py; do not edit -->\n", "<!-- end of the table -->\n"
COLUMNS = ("`norm_scheme`", "equations", "norm weights", "default `init`", "reported", "source")
_LAYERS = 8  # enough for a plan to show its kinds of blocks


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def norm_schemes() -> str:
    """One line a row of the code's table."""
    rows = []
    for name, scheme in NORM_SCHEMES.items():
        names = [name, *(alias for alias, row in ALIASES.items() if row == name)]
        shown = ", ".join(f"`{word}`" for word in names)
        rows.append((shown, scheme.formula, weights(scheme), scheme.default_init, scheme.figure, scheme.source))
    return markdown(COLUMNS, rows)


def tested_versions() -> str:
    """What was tested together."""
    head, *rows = compatibility.table()
    return markdown(head, rows)


def differences() -> str:
    """What differs between versions of Megatron-Core."""
    rows = sorted((row.since, row.what, f"`{row.test}`") for row in mcore_versions.DIFFERENCES)
    return markdown(("since", "what", "test"), rows)


#: page, name of the table on it, what makes it
TABLES = (
    ("norms.md", "norm schemes", norm_schemes),
    ("compatibility.md", "tested versions", tested_versions),
    ("compatibility.md", "differences", differences),
)


def weights(scheme: NormScheme) -> str:
    """How many norm weights a block has, with RMSNorm."""
    first, *others = (_block_weights(scheme.plan(index, _LAYERS)) for index in range(_LAYERS))
    text = first if set(others) == {first} else f"first {first}, others {others[-1]}"
    return text + ("; h after the embedding" if scheme.embed_norm else "")


def _block_weights(block: BlockNorm) -> str:
    sublayers = (block.attention, block.mlp)
    wide = sum(norms.input_norm + (norms.output_norm is not None) for norms in sublayers)
    if block.qk_norm_width == "full":
        return f"{_times(wide, 'h')} + (a + g) d"
    return " + ".join(filter(None, (_times(wide, "h"), _times(len(block.heads), "d"))))


def _times(number: int, size: str) -> str:
    return {0: "", 1: size}.get(number, f"{number} {size}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say which pages are out of date, and write nothing")
    check = parser.parse_args().check
    old = False
    for name, table, make in TABLES:
        page = DOCS / name
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN.format(table))
        _, after = rest.split(END, 1)
        new = f"{before}{BEGIN.format(table)}{make()}{END}{after}"
        if check and new != text:
            print(f"{page}: {table} is not what the code says; run python tools/write_tables.py", file=sys.stderr)
            old = True
        if not check:
            page.write_text(new, encoding="utf-8")
    return int(old)


if __name__ == "__main__":
    raise SystemExit(main())
