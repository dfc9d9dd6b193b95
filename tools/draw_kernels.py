"""Draw docs/img/kernels.svg: one program of the fused attention kernel, its packed queries and the tiles it visits.

What is visible comes from ``KVPolicy``, so the figure cannot disagree with the code.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.patches import Rectangle

from phd_megatron.console.plots import pyplot
from phd_megatron.phd.kv_policy import KVPolicy

INK, GRID = "#2b2d42", "#ffffff"
ORIGINAL, HIDDEN, NOTHING, SKIPPED = "#4c72b0", "#e58e45", "#eceef2", "#f9f9fa"
POLICY = KVPolicy(3, window=4, chunk=8)
TOKENS, TILE = range(12, 16), 6  # tokens of the query tile; keys of a key tile
ORIGINALS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "img" / "kernels.svg")
    output = parser.parse_args().output
    first = POLICY.first_hidden_key(TOKENS.start)
    keys = [(m, 1) for m in range(ORIGINALS)]
    keys += [(m, i) for m in range(first, TOKENS.stop) for i in range(2, POLICY.repeat + 1)]
    queries = [(n, j) for n in TOKENS for j in range(1, POLICY.repeat + 1)]
    figure, axes = pyplot(8, salt="kernels").subplots(figsize=(11, 4.6))
    gap = 2
    for column, (m, i) in enumerate(keys):
        x = column + (gap if i > 1 else 0)
        for row, (n, j) in enumerate(queries):
            seen = bool(POLICY.visible(*(torch.tensor(value) for value in (n, j, m, i))))
            if seen:
                axes.add_patch(Rectangle((x, row), 1, 1, fc=ORIGINAL if i == 1 else HIDDEN, ec=GRID, lw=0.6))
    rows, hidden = len(queries), len(keys) - ORIGINALS
    for begin in range(0, ORIGINALS, TILE):
        label = "no mask" if begin + TILE - 1 <= TOKENS.start else "masked" if begin <= TOKENS[-1] else "not visited"
        colour = SKIPPED if label == "not visited" else NOTHING
        axes.add_patch(Rectangle((begin, 0), TILE, rows, fc=colour, ec="none", zorder=0))
        axes.add_patch(Rectangle((begin, 0), TILE, rows, fc="none", ec=INK, lw=1.2))
        axes.text(begin + TILE / 2, -0.35, label, ha="center", va="bottom", color=INK)
    axes.add_patch(Rectangle((ORIGINALS + gap, 0), hidden, rows, fc=NOTHING, ec="none", zorder=0))
    axes.add_patch(Rectangle((ORIGINALS + gap, 0), hidden, rows, fc="none", ec=INK, lw=1.2))
    middle = ORIGINALS + gap + hidden / 2
    axes.text(middle, -0.35, "window, masked", ha="center", va="bottom", color=INK)
    axes.text(ORIGINALS / 2, -1.6, f"originals, in key tiles of {TILE}", ha="center", va="bottom", color=INK, size=10)
    where = f"hidden keys {first}..{TOKENS[-1]}, packed (position, copy)"
    axes.text(middle, -1.6, where, ha="center", va="bottom", color=INK, size=10)
    for row, (n, j) in enumerate(queries):
        axes.text(-0.3, row + 0.5, f"token {n}, copy {j}", ha="right", va="center", color=INK)
    axes.text(ORIGINALS / 2, rows + 0.5, "position of the key", ha="center", va="top", color=INK)
    for m in range(0, ORIGINALS, 2):
        axes.text(m + 0.5, rows + 0.1, str(m), ha="center", va="top", color=INK, size=6)
    axes.set_xlim(-5, len(keys) + gap + 0.5)
    axes.set_ylim(rows + 1.6, -2.6)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
