"""Write the table of norm schemes in docs/norms.md from the code's table; ``--check`` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from phd_megatron.norm.schemes import ALIASES, NORM_SCHEMES, BlockNorm, NormScheme

PAGE = Path(__file__).resolve().parents[1] / "docs" / "norms.md"
BEGIN, END = "<!-- written by tools/write_norms_table.py; do not edit -->\n", "<!-- end of the table -->\n"
COLUMNS = ("`norm_scheme`", "equations", "norm weights", "default `init`", "reported", "source")
_LAYERS = 8  # enough for a plan to show its kinds of blocks


def table() -> str:
    """One line a row of the code's table, Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, scheme in NORM_SCHEMES.items():
        names = [name, *(alias for alias, row in ALIASES.items() if row == name)]
        shown = ", ".join(f"`{word}`" for word in names)
        rows.append((shown, scheme.formula, weights(scheme), scheme.default_init, scheme.figure, scheme.source))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the page is up to date, and write nothing")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}{table()}{END}{after}"
    if check and new != text:
        print(f"{PAGE} is not what the code says; run python tools/write_norms_table.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
