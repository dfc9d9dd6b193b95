"""The plots of benches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.console.plots import pyplot
from phd_megatron.runtime.output import save_figure

if TYPE_CHECKING:
    from phd_megatron.config.plain import Plain

_VARYING = ("policy", "head_dim", "batch", "norms")


def draw_lines(target: Path, option: str, lines: Sequence[Mapping[str, Plain]], x: str, y: str) -> None:
    """One line per name and per value of what else varies, ``y`` over ``x``; ``option`` named the file."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5))
    series: dict[str, list[tuple[Plain, Plain]]] = {}
    varying = [k for k in _VARYING if len({str(line.get(k)) for line in lines}) > 1]
    for line in lines:
        if line.get(y) is not None and line.get(x) is not None:
            label = ", ".join([str(line["name"]), *(f"{k} {line[k]}" for k in varying)])
            series.setdefault(label, []).append((line[x], line[y]))
    for label, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y.replace("_", " "))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    try:
        save_figure(figure, target, option)
    finally:
        plt.close(figure)


def draw_latency(target: Path, curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], title: str) -> None:
    """Latency over K, side by side, as Figure 9 of arXiv 2504.14992.

    Args:
        target: the file of ``--plot``.
        curves: name of a panel to that of a line to its points, (K, milliseconds).
        title: above all of it.
    """
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    figure, row = plt.subplots(1, len(curves), figsize=(9, 3.6))
    for axes, (name, lines) in zip(row, curves.items(), strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set(title=name, xlabel="K", ylabel="ms", xscale="log", yscale="log")
        axes.set_xticks(sorted({k for points in lines.values() for k, _ in points}))
        axes.get_yaxis().set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        for scale in (axes.get_xaxis(), axes.get_yaxis()):
            scale.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend()
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    try:
        save_figure(figure, target, "--plot", dpi=150)
    finally:
        plt.close(figure)
