"""Draw docs/img/overview.png: four transformer blocks, and which keys a PHD query sees.

The blocks follow ``norm/schemes.py`` and the mask is ``KVPolicy.mask``, so the figure cannot disagree with the code.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Circle, FancyBboxPatch, Patch

from phd_megatron.console.plots import pyplot
from phd_megatron.norm.schemes import BlockNorm, SublayerNorm, norm_plan
from phd_megatron.phd.kv_policy import KVPolicy

INK = "#2b2d42"
ATTENTION, FFN, NORM, HEAD_NORM = "#cfe1f5", "#fbe3c8", "#d8ecd3", "#b9ddb0"
ORIGINAL, HIDDEN, NOTHING = "#4c72b0", "#e58e45", "#f4f4f6"
WIDTH = 1.5


class Stack:
    """Draws one block from the bottom up; ``y`` is the top of what is drawn so far."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.y = 0.0

    def rounded(self, left: float, bottom: float, width: float, height: float, colour: str, layer: int) -> None:
        """A rounded rectangle."""
        style = "round,pad=0,rounding_size=0.08"
        shape = FancyBboxPatch((left, bottom), width, height, style, fc=colour, ec=INK, lw=1.0, zorder=layer)
        self.axes.add_patch(shape)

    def text(self, x: float, y: float, label: str, size: float = 8.5) -> None:
        """Centred text on top of everything."""
        self.axes.text(x, y, label, ha="center", va="center", fontsize=size, color=INK, zorder=6)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A straight arrow below the boxes."""
        look = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
        self.axes.annotate("", end, start, arrowprops=look, zorder=2)

    def line(self, length: float) -> None:
        """A piece of the main line."""
        self.arrow((0, self.y), (0, self.y + length))
        self.y += length

    def box(self, label: str, colour: str, height: float = 0.62) -> None:
        """A sublayer or norm on the main line."""
        self.line(0.28)
        self.rounded(-WIDTH / 2, self.y, WIDTH, height, colour, 3)
        self.text(0, self.y + height / 2, label)
        self.y += height

    def attention(self, heads: str) -> None:
        """Attention with its per-head norms inside."""
        if not heads:
            self.box("Attention", ATTENTION)
            return
        self.line(0.28)
        self.rounded(-WIDTH / 2, self.y, WIDTH, 1.02, ATTENTION, 3)
        self.text(0, self.y + 0.74, "Attention")
        for index, letter in enumerate(heads):
            left = (index - len(heads) / 2) * 0.46 + 0.03
            self.rounded(left, self.y + 0.10, 0.40, 0.36, HEAD_NORM, 4)
            self.text(left + 0.20, self.y + 0.28, f"N$_{letter.upper()}$", 7.5)
        self.y += 1.02

    def add(self, branch: float) -> None:
        """The plus that joins the residual which left the main line at height ``branch``."""
        self.line(0.24)
        centre, radius, side = self.y + 0.16, 0.16, WIDTH / 2 + 0.34
        self.axes.plot([0, side, side], [branch, branch, centre], color=INK, linewidth=1.1, zorder=1)
        self.arrow((side, centre), (radius, centre))
        self.axes.add_patch(Circle((0, centre), radius, facecolor="white", edgecolor=INK, linewidth=1.1, zorder=3))
        self.text(0, centre - 0.01, "+", 10)
        self.y = centre + radius

    def sublayer(self, norm: SublayerNorm, body: str, heads: str = "") -> None:
        """One sublayer with its norms and residual, as the scheme's record says."""
        branch = self.y + 0.12
        if norm.input_norm:
            self.box("Norm", NORM, 0.42)
            if norm.residual == "normed":
                branch = self.y + 0.12
        if body == "attention":
            self.attention(heads)
        else:
            self.box("FFN", FFN)
        self.add(branch)
        if norm.output_norm:
            self.box("Norm", NORM, 0.42)


def draw_block(axes: Axes, block: BlockNorm, title: str, subtitle: str) -> None:
    """One block diagram."""
    stack = Stack(axes)
    axes.text(0, -0.2, "X", ha="center", va="center", fontsize=9, color=INK)
    stack.sublayer(block.attention, "attention", block.heads)
    stack.sublayer(block.mlp, "ffn")
    stack.line(0.36)
    axes.text(0, stack.y + 0.16, "X′", ha="center", va="center", fontsize=9, color=INK)
    axes.set(xlim=(-1.15, 1.35), ylim=(-0.4, 5.6), aspect="equal")
    axes.axis("off")
    axes.text(0, 6.06, title, ha="center", va="bottom", fontsize=10, fontweight="bold", color=INK)
    axes.text(0, 6.0, subtitle, ha="center", va="top", fontsize=7.5, color="#55586e")


def draw_mask(axes: Axes, policy: KVPolicy, length: int) -> None:
    """Which keys each query sees; rows are queries, columns keys, originals first."""
    visible = policy.mask(length).numpy()
    cells = visible.astype(int)
    cells[:, length:] *= 2
    axes.imshow(cells, cmap=ListedColormap([NOTHING, ORIGINAL, HIDDEN]), vmin=0, vmax=2, interpolation="nearest")
    size = policy.repeat * length
    axes.set_xticks([x - 0.5 for x in range(1, size)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, size)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.7)
    axes.tick_params(which="both", length=0)
    positions = [str(n) for _ in range(policy.repeat) for n in range(length)]
    axes.set_xticks(range(size), positions, fontsize=5.5)
    axes.set_yticks(range(size), positions, fontsize=5.5)
    axes.axhline(length - 0.5, color=INK, linewidth=1.4)
    axes.axvline(length - 0.5, color=INK, linewidth=1.4)
    if policy.chunk:
        for edge in range(policy.chunk, length, policy.chunk):
            start = length + edge - policy.chunk - 0.5
            for low in (start, start + policy.chunk):
                axes.plot([low, low], [length - 0.5, size - 0.5], color=INK, linewidth=0.7, linestyle=(0, (3, 2)))
                axes.plot([length - 0.5, size - 0.5], [low, low], color=INK, linewidth=0.7, linestyle=(0, (3, 2)))
    names = ("original keys (kept)", "hidden keys (short-lived)")
    for index, name in enumerate(names):
        axes.text((index + 0.5) * length - 0.5, -1.9, name, ha="center", va="bottom", fontsize=8.5, color=INK)
    for index, name in enumerate(("original queries", "hidden queries")):
        axes.text(
            -2.2, (index + 0.5) * length - 0.5, name, ha="right", va="center", rotation=90, fontsize=8.5, color=INK
        )
    axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_color(INK)


def overview(output: Path) -> None:
    """Blocks on the left, mask on the right."""
    policy, length = KVPolicy(repeat=2, window=4, chunk=8), 16
    first, second = norm_plan("hybrid_star", 2)
    blocks = (
        (norm_plan("pre", 1)[0], "pre", "the usual block"),
        (norm_plan("post", 1)[0], "post", "the original transformer"),
        (second, "hybrid", "HybridNorm; hybrid_star\nfrom the second block on"),
        (first, "hybrid_star", "first block only"),
    )
    plt = pyplot()
    figure = plt.figure(figsize=(13.6, 5.3))
    left, right = figure.subfigures(1, 2, width_ratios=(8.1, 5.5))
    left.suptitle("Where a block normalises", fontsize=12, color=INK, y=0.985)
    for axes, (block, title, subtitle) in zip(left.subplots(1, len(blocks)), blocks, strict=True):
        draw_block(axes, block, title, subtitle)
    left.subplots_adjust(left=0.01, right=0.98, bottom=0.02, top=0.83, wspace=0.0)
    right.suptitle(f"What a query sees: {policy.name}, {length} tokens", fontsize=12, color=INK, y=0.985)
    axes = right.subplots()
    draw_mask(axes, policy, length)
    right.subplots_adjust(left=0.12, right=0.98, bottom=0.11, top=0.86)
    axes.legend(
        handles=[
            Patch(facecolor=ORIGINAL, label="original key seen"),
            Patch(facecolor=HIDDEN, label="hidden key seen (window W, chunk C)"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=2,
        frameon=False,
        fontsize=8.5,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=140, facecolor="white")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "docs/img/overview.png")
    options = parser.parse_args()
    overview(options.output)
    print(f"figure: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
