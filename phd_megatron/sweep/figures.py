"""The plots of a report, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.console.plots import COLOURS, line_style, pyplot, tidy
from phd_megatron.runtime.output import save_figure
from phd_megatron.sweep.curves import AXES, Axis, Curve
from phd_megatron.sweep.document import document_kind
from phd_megatron.sweep.scaling import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONT_SIZE = 9


def _save(figure: Figure, directory: Path, stem: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, options in ((f"{stem}.svg", {"metadata": {"Date": None}}), (f"{stem}.png", {"dpi": 110})):
        save_figure(figure, directory / name, "--output", document_kind(directory / name), **options)
    pyplot().close(figure)


def draw_losses(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], directory: Path, stem: str, unit: str, axis: Axis = "tokens"
) -> None:
    """Smoothed training losses: a panel for each key, a colour for each group, a line for each seed.

    The vertical axis shows what lies below the loss at 15 % of a run: the start would hide the differences.
    """
    plt = pyplot(_FONT_SIZE)
    figure, row = plt.subplots(
        1, len(panels), figsize=(1.5 + 4.2 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    for axes, (title, groups) in zip(row[0], panels.items(), strict=True):
        low, high = [], []
        for name, curves in groups.items():
            for index, curve in enumerate(curves):
                look = line_style(names.index(name))
                axes.plot(curve.along(axis), curve.smoothed, linewidth=1.3, label=name if index == 0 else None, **look)
                points = [(curve.along(axis)[step], loss) for step, loss in curve.validation]
                axes.plot(*zip(*points, strict=True), "o", color=look["color"], markersize=3) if points else None
                early = curve.smoothed[min(len(curve.smoothed) - 1, int(0.15 * len(curve.smoothed)))]
                low.append(min([*curve.smoothed, *(loss for _, loss in points)]))
                high.append(early)
        if low and max(high) > min(low):
            margin = 0.05 * (max(high) - min(low))
            axes.set_ylim(min(low) - margin, max(high) + margin)
        tidy(axes, AXES[axis], f"loss ({unit})", title)
    row[0][-1].legend(frameon=False, fontsize=8)
    _save(figure, directory, stem)


def draw_costs(curves: Sequence[Curve], directory: Path, stem: str, unit: str) -> None:
    """Runs over tokens, FLOPs and time side by side."""
    plt = pyplot(_FONT_SIZE)
    figure, row = plt.subplots(1, len(AXES), figsize=(13, 3.8), layout="constrained", sharey=True)
    for axes, (axis, label) in zip(row, AXES.items(), strict=True):
        for number, curve in enumerate(curves):
            axes.plot(curve.along(axis), curve.smoothed, linewidth=1.3, label=curve.name, **line_style(number))
        tidy(axes, label, f"loss ({unit})")
    early = [curve.smoothed[min(len(curve.smoothed) - 1, int(0.15 * len(curve.smoothed)))] for curve in curves]
    low, high = min(min(curve.smoothed) for curve in curves), max(early)
    if high > low:
        row[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    row[0].legend(frameon=False, fontsize=8)
    _save(figure, directory, stem)


def draw_finals(groups: Sequence[tuple[str, Sequence[float]]], directory: Path, stem: str, unit: str) -> None:
    """Final losses: a dot for each seed, a bar at their mean."""
    plt = pyplot(_FONT_SIZE)
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.32 * len(groups)), layout="constrained")
    for number, (_, losses) in enumerate(groups):
        mean = sum(losses) / len(losses)
        axes.plot(losses, [number] * len(losses), "o", markersize=5, alpha=0.7, color=COLOURS[0])
        axes.plot([mean, mean], [number - 0.3, number + 0.3], color=COLOURS[3], linewidth=2)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    axes.invert_yaxis()
    tidy(axes, f"final loss ({unit}); dot: a seed, bar: the mean", "")
    _save(figure, directory, stem)


def draw_scaling(
    laws: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float], Fit | None]],
    directory: Path,
    stem: str,
    unit: str,
) -> None:
    """Final losses over N with the fitted laws: (name, N, D, loss, fit) each."""
    plt = pyplot(_FONT_SIZE)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, sizes, tokens, losses, fit) in enumerate(laws):
        look = line_style(number)
        axes.plot(sizes, losses, "o", color=look["color"], markersize=4, label=name)
        if fit is None:
            continue
        for budget in sorted(set(tokens)):
            low, high = min(sizes), max(sizes)
            grid = [low * (high / low) ** (step / 50) for step in range(51)]
            axes.plot(grid, [fit.predict(n, budget) for n in grid], linewidth=1, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "N, active parameters without embeddings", f"final loss ({unit})")
    _save(figure, directory, stem)


def draw_experts(groups: Mapping[str, tuple[list[float], list[float]]], directory: Path, stem: str, label: str) -> None:
    """An entropy over tokens: a line for each group."""
    plt = pyplot(_FONT_SIZE)
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for number, (name, (tokens, entropy)) in enumerate(groups.items()):
        axes.plot(tokens, entropy, linewidth=1.2, label=name, **line_style(number))
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, AXES["tokens"], label)
    _save(figure, directory, stem)


def draw_layers(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    steps: Sequence[int],
    directory: Path,
    stem: str,
    label: str,
    logarithmic: bool,
) -> None:
    """A statistic over the layers: a row of panels for each key, a panel for each step, a line for each group.

    A group without values has no line; the others keep the looks that they have where it has one.
    """
    plt = pyplot(_FONT_SIZE)
    shape = len(panels), len(steps)
    size = (1.5 + 3.2 * shape[1], 0.6 + 2.6 * shape[0])
    figure, grid = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, sharex="row")
    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    for row, (title, groups) in zip(grid, panels.items(), strict=True):
        for index, (axes, step) in enumerate(zip(row, steps, strict=True)):
            for name, by_step in groups.items():
                if not (values := by_step[index]):
                    continue
                numbers = range(1, len(values) + 1)
                axes.plot(numbers, values, marker=".", linewidth=1.2, label=name, **line_style(names.index(name)))
            axes.xaxis.get_major_locator().set_params(integer=True)
            if logarithmic:
                axes.set_yscale("log")
            tidy(axes, "layer", label if index == 0 else "", f"{title}, step {step}" if title else f"step {step}")
    drawn = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    grid[0][-1].legend(drawn.values(), drawn.keys(), frameon=False, fontsize=8)
    _save(figure, directory, stem)
